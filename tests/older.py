"""Directories of every kind, written with this transformers, give the same logits in version 4.

    python tests/older.py write DIR            in the project's environment
    python tests/older.py read DIR             in one with transformers 4 and without krony

`make older` does both. GPT-2, Llama (its rotary frequencies scaled) and Qwen2 (tied), tiny.
"""

import sys
from pathlib import Path

import torch
import transformers as hf

IDS = (torch.arange(60) * 7 % 4096).reshape(2, 30)
TEXT = "Return the number of items.\n\tIf none, 0!"
TOKENS = {"vocab_size": 4096, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
LLAMA = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
}
SCALED = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
PLAIN = {"rope_type": "default", "rope_theta": 1000000.0}
NEAR = 1e-4  # of the largest logit: attention sums in another order


def configurations() -> dict[str, hf.PretrainedConfig]:
    """Of the three families."""
    return {
        "gpt2": hf.GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=64, **TOKENS),
        "llama": hf.LlamaConfig(**LLAMA, **TOKENS, rope_parameters=SCALED),
        "qwen2": hf.Qwen2Config(**LLAMA, **TOKENS, rope_parameters=PLAIN, tie_word_embeddings=True),
    }


def write(folder: Path) -> None:
    """Dense, plain, factored, folded and quantized; beside each directory its logits."""
    import krony
    from krony.export.self_contained import self_contained

    tokenizer = krony.load_tokenizer("demo")
    windows = torch.randint(0, 4096, (16, 64), generator=torch.Generator().manual_seed(0))

    def done(name: str, model: hf.PreTrainedModel) -> None:
        with torch.inference_mode():
            torch.save(model(IDS).logits.float(), folder / f"{name}.pt")

    for family, config in configurations().items():
        torch.manual_seed(0)
        model = hf.AutoModelForCausalLM.from_config(config).eval()
        dense = krony.save(model, folder / f"{family}-dense", tokenizer)
        done(f"{family}-dense", model)
        parameters = sum(p.numel() for p in model.parameters()) - 20_000
        plain = krony.slim(model, windows, parameters=parameters)
        krony.save(plain, folder / f"{family}-plain", tokenizer)
        done(f"{family}-plain", plain)
        for form in ("factored", "int8", "int4"):
            model = krony.load_model(dense)
            krony.compress(model, krony.make_plan(model, small=(2, 2), terms=2), init="van-loan")
            if form != "factored":
                krony.quantize(model, form)
            self_contained(model, folder / f"{family}-{form}", tokenizer)
            done(f"{family}-{form}", model)
            if form == "factored":
                model.dequantize()
                krony.save(model, folder / f"{family}-folded", tokenizer)
                done(f"{family}-folded", model)
    (folder / "tokens.txt").write_text(" ".join(map(str, tokenizer(TEXT)["input_ids"])))


def read(folder: Path) -> int:
    """How many directories differ; a line for each."""
    assert "krony" not in sys.modules
    hf.logging.set_verbosity_error()
    wanted_tokens = (folder / "tokens.txt").read_text()
    wrong, found = 0, sorted(folder.glob("*.pt"))
    for path in found:
        directory = path.with_suffix("")
        model = hf.AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True).eval()
        with torch.inference_mode():
            logits = model(IDS).logits.float()
        wanted = torch.load(path)
        error = float((logits - wanted).abs().max() / wanted.abs().max())
        tokens = hf.AutoTokenizer.from_pretrained(directory)(TEXT)["input_ids"]
        same = " ".join(map(str, tokens)) == wanted_tokens
        wrong += not (error < NEAR and same)
        print(f"{directory.name:16} logits differ by {error:.1e}, tokens {'the same' * same}")
    print(f"{len(found) - wrong} passed, {wrong} failed with transformers {hf.__version__}")
    return wrong if found else 1


if __name__ == "__main__":
    task, place = sys.argv[1], Path(sys.argv[2])
    place.mkdir(parents=True, exist_ok=True)
    sys.exit(write(place) if task == "write" else read(place))
