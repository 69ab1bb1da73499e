"""The dense oracle, and tiny random models of every family."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import Tensor

import krony
from krony.text.data import load_text

SMALL = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
LLAMA = {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}

FAMILIES = {
    "gpt2": lambda: hf.GPT2Config(
        vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64, **TOKENS
    ),
    "llama": lambda: hf.LlamaConfig(**SMALL, **LLAMA, **TOKENS),
    "mistral": lambda: hf.MistralConfig(**SMALL, **LLAMA, **TOKENS),
    "qwen2": lambda: hf.Qwen2Config(**SMALL, **LLAMA, **TOKENS),
    "phi3": lambda: hf.Phi3Config(**SMALL, **LLAMA, **TOKENS),
    "gpt_neox": lambda: hf.GPTNeoXConfig(
        **SMALL, intermediate_size=64, max_position_embeddings=64, **TOKENS
    ),
    "opt": lambda: hf.OPTConfig(
        **SMALL, ffn_dim=64, max_position_embeddings=64, word_embed_proj_dim=32, **TOKENS
    ),
    "gpt_neo": lambda: hf.GPTNeoConfig(
        vocab_size=96,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        max_position_embeddings=64,
        window_size=16,
        **TOKENS,
    ),
    "phi": lambda: hf.PhiConfig(
        **SMALL, intermediate_size=64, max_position_embeddings=64, **TOKENS
    ),
}


def tiny(family: str, **changes: object) -> hf.PreTrainedModel:
    """A seeded random model of that family, in evaluation mode."""
    torch.manual_seed(0)
    config = FAMILIES[family]()
    for name, value in changes.items():
        setattr(config, name, value)
    return hf.AutoModelForCausalLM.from_config(config).eval()


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
KERNEL_DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
launches = pytest.mark.skipif(
    KERNEL_DEVICE == "cpu" and not INTERPRETED, reason="run by test_under_the_interpreter"
)


def in_the_interpreter(file: str) -> None:
    """The tests of a file that launch Triton kernels, in a process with Triton's interpreter."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", file, "-k", "not interpreter"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout


def scaled_logits() -> hf.PreTrainedModel:
    """A tiny model that scales its logits, so that they are more than hidden states and head."""
    torch.manual_seed(0)
    return hf.CohereForCausalLM(
        hf.CohereConfig(**SMALL, **LLAMA, **TOKENS, logit_scale=0.25)
    ).eval()


def healing_inputs(folder: Path) -> Path:
    """A tiny factored GPT-2 ("small") with the packaged tokenizer, the "dense" one, "text.txt"."""
    torch.manual_seed(0)
    config = hf.GPT2Config(
        vocab_size=4096, n_embd=16, n_layer=2, n_head=2, n_positions=32,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = hf.GPT2LMHeadModel(config)
    tokenizer = krony.load_tokenizer("demo")
    krony.save_model(model, folder / "dense", tokenizer)
    krony.compress(model, krony.make_plan(model, small=(2, 2)), init="van-loan")
    krony.save_model(model, folder / "small", tokenizer)
    (folder / "text.txt").write_text(load_text("python-docs").text[:8000])
    return folder


def replicated(module):
    """As `nn.DataParallel` does it for another device."""
    twin = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        twin._modules[name] = child and replicated(child)
    for name, parameter in module._parameters.items():
        setattr(twin, name, None if parameter is None else parameter.clone())
    return twin


def dense_sum(outer: Tensor, inner: Tensor) -> Tensor:
    """The oracle: Σ_r outer_r ⊗ inner_r by torch.kron, one term after the other."""
    return torch.stack([torch.kron(a, b) for a, b in zip(outer, inner, strict=True)]).sum(0)


def group_dense(group) -> Tensor:
    """The oracle's W of a KroneckerGroup, from its parameters."""
    large, small = group.large_factors, group.scaled_small
    if group.layout == "small-outer":
        return dense_sum(small, large)
    return dense_sum(large, small)


def logits(model: hf.PreTrainedModel, length: int = 12) -> Tensor:
    """Logits of a fixed little batch."""
    ids = torch.arange(2 * length).reshape(2, length) % 90
    with torch.inference_mode():
        return model(input_ids=ids).logits


def shared_data() -> Path:
    """Where the public sets are, if they are."""
    here = Path(__file__).parent.parent
    return Path(os.environ.get("KRONY_DATA", here / ".." / "shared" / "data"))


def refused_without_krony(path: Path) -> str:
    """What a process that does not import krony says when it is given that model and stops."""
    script = f"import transformers as hf; hf.AutoModelForCausalLM.from_pretrained({str(path)!r})"
    # Commands that ran in this process told transformers to be quiet.
    loud = {k: v for k, v in os.environ.items() if k != "TRANSFORMERS_VERBOSITY"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, env=loud)
    assert done.returncode != 0
    return done.stderr
