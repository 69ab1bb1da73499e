"""GGUF, the file of llama.cpp and what is built on it: ordinary models and their tokenizers.

Names of tensors and keys are those of the `gguf` package; what an architecture does beside them
(rotary pairs side by side in Llama, transposed matrices in GPT-2) follows llama.cpp's converter.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from krony.errors import KronyError
from krony.hf.gguf import ARCHITECTURES, needed, pre_tokenizer_name
from krony.hf.modeling import config_of
from krony.hf.offload import check_present
from krony.hf.saving import write_file
from krony.hf.ties import output_is_tied

TYPES = ("f16", "bf16", "q8_0", "q4_0")
BLOCK = 32  # numbers of a row that q8_0 and q4_0 give one scale


def gguf(
    model: PreTrainedModel,
    destination: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    to: str = "f16",
) -> list[str]:
    """Write an ordinary model and its tokenizer as one GGUF file.

    Matrices are stored in that type, vectors in float32. In q4_0 the embedding and the output
    matrix get 8 bits; rows that blocks of 32 don't divide stay in f16.

    Args:
        to: "f16", "bf16", "q8_0" or "q4_0".
    Returns:
        Names of the matrices that stayed in f16 instead.
    Raises:
        KronyError: no `gguf` package, a factored model, an architecture or a tokenizer that is not
            among those that krony writes, numbers beyond the type, a destination that exists.
    """
    package = needed()
    if to not in TYPES:
        raise KronyError(f"no type {to!r} of GGUF; there are {', '.join(TYPES)}")
    check_present(model, "write a GGUF file of the model")
    if config_of(model) is not None:
        raise KronyError(
            "GGUF has no factored layers; fold the model first (krony export --to dense), or make "
            "an ordinary one (krony compress --structure plain)"
        )
    config: Any = model.config
    if config.model_type not in ARCHITECTURES:
        raise KronyError(
            f"a GGUF file of a {config.model_type} can't be written; krony knows "
            f"{', '.join(ARCHITECTURES)}, for others there is llama.cpp's converter"
        )
    if Path(destination).suffix.lower() != ".gguf":
        raise KronyError(f"{destination} would not be known for a GGUF file; end it in .gguf")
    if Path(destination).exists():
        raise KronyError(f"{destination} exists already; remove it, or write to another file")
    tensors = list(_tensors(model, package))
    words = None if tokenizer is None else _Words.of(tokenizer, len(tensors[0][1]))
    kept: list[str] = []

    def write(path: Path) -> None:
        writer = package.GGUFWriter(path, ARCHITECTURES[config.model_type])
        _settings(writer, config, package, to)
        if words is not None:
            words.write(writer, package)
        for name, tensor in tensors:
            stored = _type_of(name, tensor, to)
            if stored == "f16" and to not in ("f16", "bf16"):
                kept.append(name)
            kind = package.GGMLQuantizationType[stored.upper()]
            data = package.quants.quantize(tensor.float().numpy(), kind)
            writer.add_tensor(name, data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    write_file(destination, write)
    return kept


def _type_of(name: str, tensor: Tensor, to: str) -> str:
    """How a tensor is stored."""
    if tensor.dim() < 2 or name.startswith("position_embd"):
        return "f32"
    if to in ("q8_0", "q4_0") and tensor.shape[-1] % BLOCK:
        return "f16"
    if to == "q4_0" and name in ("token_embd.weight", "output.weight"):
        return "q8_0"
    if to in ("f16", "q8_0", "q4_0") and not float(tensor.abs().max()) < 65504:
        raise KronyError(f"{name} has numbers beyond float16; write the file with --type bf16")
    return to


def _settings(writer: Any, config: Any, package: Any, to: str) -> None:
    """The configuration under GGUF's names."""
    heads, groups = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(inner or 4 * config.hidden_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups or heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(package.LlamaFileType[f"MOSTLY_{to.upper()}"])
    if config.model_type == "gpt2":
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(size)
    writer.add_value_length(size)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(size)
    if rope.get("rope_type", "default") == "linear":
        writer.add_rope_scaling_type(package.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif rope.get("rope_type", "default") not in ("default", "llama3"):
        raise KronyError(
            f"rotary scaling of kind {rope['rope_type']} can't be written to GGUF; use llama.cpp's "
            "converter"
        )


def _tensors(model: PreTrainedModel, package: Any) -> Iterator[tuple[str, Tensor]]:
    """Names in GGUF and matrices as (outputs, inputs), the embedding first."""
    config: Any = model.config
    arch = package.MODEL_ARCH[ARCHITECTURES[config.model_type].upper()]
    names = package.get_tensor_name_map(arch, config.num_hidden_layers)
    tied = output_is_tied(model)
    change: Callable[[str, Tensor], Tensor] = CHANGES.get(config.model_type, lambda _, t: t)
    if config.model_type in ("llama", "mistral"):
        change = _side_by_side(config)
    for name, tensor in sorted(model.state_dict().items(), key=lambda kv: "embed" not in kv[0]):
        if name == "lm_head.weight" and tied:
            continue
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise KronyError(f"{name} has no name in GGUF, so the model can't be written to it")
        yield found, change(name, tensor.detach().cpu()).contiguous()
    if config.model_type != "gpt2" and config.rope_parameters.get("rope_type") == "llama3":
        yield "rope_freqs.weight", _factors(model)


def _transposed(name: str, tensor: Tensor) -> Tensor:
    """GPT-2 stores its matrices as (inputs, outputs)."""
    ends = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    return tensor.T if name.endswith(ends) else tensor


CHANGES: dict[str, Callable[[str, Tensor], Tensor]] = {"gpt2": _transposed}


def _side_by_side(config: Any) -> Callable[[str, Tensor], Tensor]:
    """llama.cpp turns neighbors of a head's query, transformers its first half with its second."""
    counts = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}

    def change(name: str, tensor: Tensor) -> Tensor:
        count = counts.get(name.split(".")[-2])
        if count is None:
            return tensor
        halves: Any = tensor.unflatten(0, (count, 2, -1))
        turned: Tensor = halves.transpose(1, 2).flatten(0, 2)
        return turned

    return change


def _factors(model: PreTrainedModel) -> Tensor:
    """What the rotary frequencies of Llama 3 are divided by, (half of a head,)."""
    config: Any = model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    powers = torch.arange(0, size, 2, dtype=torch.float32) / size
    plain: Tensor = config.rope_parameters["rope_theta"] ** -powers
    rotary: Any = model.base_model.rotary_emb
    factors: Tensor = plain / rotary.inv_freq.cpu().float()
    return factors


class _Words:
    """A byte-level BPE tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, state: dict[str, Any], size: int):
        self.tokenizer, self.size = tokenizer, size
        self.model, self.added = state["model"], state["added_tokens"]
        self.pre = pre_tokenizer_name(state.get("pre_tokenizer"))

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, size: int) -> "_Words":
        """Raises `KronyError` for a tokenizer of another kind."""
        backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        state = None if backend is None else json.loads(backend.to_str())
        if state is None or state["model"].get("type") != "BPE":
            raise KronyError(
                f"the tokenizer is a {type(tokenizer).__name__} and no byte-level BPE, the kind "
                "that krony writes to GGUF; use llama.cpp's converter"
            )
        return cls(tokenizer, state, size)

    def write(self, writer: Any, package: Any) -> None:
        """Tokens, merges, the special ones and the chat template."""
        kinds = package.TokenType
        tokens = {number: (token, kinds.NORMAL) for token, number in self.model["vocab"].items()}
        for entry in self.added:
            kind = kinds.CONTROL if entry["special"] else kinds.USER_DEFINED
            tokens[entry["id"]] = (entry["content"], kind)
        rows = [tokens.get(i, (f"[PAD{i}]", kinds.UNUSED)) for i in range(self.size)]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list([token for token, _ in rows])
        writer.add_token_types([kind for _, kind in rows])
        merges = self.model["merges"]
        writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
        tokenizer: Any = self.tokenizer
        for word in ("bos", "eos", "unk", "pad"):
            if (number := getattr(tokenizer, f"{word}_token_id", None)) is not None:
                getattr(writer, f"add_{word}_token_id")(number)
        first = tokenizer("a")["input_ids"][:1]
        writer.add_add_bos_token(first == [tokenizer.bos_token_id])
        if isinstance(template := getattr(tokenizer, "chat_template", None), str):
            writer.add_chat_template(template)
