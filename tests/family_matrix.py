"""Every decoder class that is tried, tiny, and the chain that each of them goes through.

python tests/family_matrix.py writes benchmarks/results/families.json and docs/families.md.
"""

import json
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers as hf

import krony
from krony.export.onnx import onnx
from krony.export.self_contained import self_contained
from krony.hf.probes import left_out
from krony.text.blocks import from_ids

ROOT = Path(__file__).parents[1]
SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
LAYERED = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64}
LAYERED |= {"encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 64}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
EXPERTS |= {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4}
# model_type: what differs from SMALL.
FAMILIES: dict[str, dict[str, Any]] = {
    "apertus": {},
    "arcee": {},
    "bart": {**LAYERED, "is_decoder": True},
    "biogpt": {},
    "bitnet": {},
    "blenderbot": LAYERED,
    "bloom": {"n_layer": 2, "n_head": 4},
    "codegen": GPT,
    "cohere": {},
    "cohere2": {},
    "ctrl": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "dff": 64},
    "ernie4_5": {},
    "exaone4": {},
    "falcon": {"new_decoder_architecture": False, "multi_query": True},
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 8},
    "gemma3_text": {"query_pre_attn_scalar": 8},
    "glm": {},
    "glm4": {},
    "gpt2": GPT,
    "gpt_bigcode": GPT,
    "gpt_neo": {
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 16,
    },
    "gpt_neox": {},
    "gptj": GPT,
    "granite": {},
    "granitemoe": EXPERTS,
    "gpt_oss": EXPERTS,
    "helium": {},
    "llama": {},
    "mbart": {**LAYERED, "is_decoder": True},
    "minicpm3": {
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
    },
    "ministral": {},
    "mistral": {},
    "mixtral": EXPERTS,
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "expansion_ratio": 2},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {},
    "olmoe": EXPERTS,
    "openai-gpt": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "persimmon": {},
    "phi": {"num_key_value_heads": 4},
    "phi3": {},
    "qwen2": {},
    "qwen2_moe": EXPERTS,
    "qwen3": {},
    "qwen3_moe": {**EXPERTS, "mlp_only_layers": [0]},
    "seed_oss": {},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {},
    "vaultgemma": {"query_pre_attn_scalar": 8},
    "xglm": {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 64},
}
ONNX = ("gemma", "gpt2", "llama", "qwen3")
STEPS = ("plan", "compress", "reload", "heal", "fold", "self-contained", "onnx")


def tiny(family: str) -> hf.PreTrainedModel:
    """A seeded random model of a family, in evaluation mode."""
    torch.manual_seed(0)
    settings = {**SMALL, **FAMILIES[family]}
    try:
        config = hf.AutoConfig.for_model(family, **settings)
    except AttributeError:  # of some, the size of a head follows from the others
        del settings["head_dim"]
        config = hf.AutoConfig.for_model(family, **settings)
    return hf.AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def logits(model: hf.PreTrainedModel) -> torch.Tensor:
    """Of a fixed little batch."""
    return model(input_ids=torch.arange(24).reshape(2, 12) + 2, use_cache=False).logits


def chain(family: str, folder: Path, with_onnx: bool = False) -> dict[str, Any]:
    """All steps for one family.

    Returns:
        {"class", "matrices", "share": of the parameters that can be factored, "left": a sentence
        on what can't, and a step: "yes", "-" or what it said}.
    """
    model = tiny(family)
    source = krony.save_model(model, folder / "dense")
    model = krony.load_model(source)
    before = logits(model)
    total = sum(p.numel() for p in model.parameters())
    row: dict[str, Any] = {"family": family, "class": type(model).__name__}
    row |= {"left": left_out(model)} | dict.fromkeys(STEPS, "-")
    windows = torch.randint(2, 96, (16, 32), generator=torch.Generator().manual_seed(0))
    steps = iter(STEPS)
    step = next(steps)
    try:
        plan = krony.make_plan(model, small=(2, 2), target="everything")
        row |= {"matrices": len(plan.matrices), "share": plan.dense_parameters / total}
        row["plan"], step = "yes", next(steps)
        krony.compress(model, plan, init="data", calibration=windows)
        small = krony.save_model(model, folder / "small")
        row["compress"], step = "yes", next(steps)
        again = krony.load_model(small)
        assert torch.equal(logits(again), logits(model)), "other logits"
        row["reload"], step = "yes", next(steps)
        blocks = from_ids(windows)
        config = krony.HealConfig(
            tokens=256, batch_tokens=128, dtype="float32", eval_every=256, loss="ce"
        )
        record = krony.heal(again, blocks, config, run=folder / "run", evaluation=blocks)
        assert record.best > 0
        healed = logits(again.eval())
        assert not torch.equal(healed, logits(model)), "nothing was trained"
        row["heal"], step = "yes", next(steps)
        folded = krony.load_model(small)
        folded.dequantize()
        folded = hf.AutoModelForCausalLM.from_pretrained(krony.save_model(folded, folder / "fold"))
        assert type(folded.get_input_embeddings()) is type(tiny(family).get_input_embeddings())
        torch.testing.assert_close(
            logits(folded.eval()), logits(model), rtol=1e-3, atol=1e-4 * float(before.abs().max())
        )
        row["fold"], step = "yes", next(steps)
        whole = self_contained(model, folder / "whole")
        assert torch.equal(logits(krony.load_model(whole)), logits(model)), "other logits"
        row["self-contained"], step = "yes", next(steps)
        if with_onnx and family in ONNX:
            onnx(model, folder / "onnx")
            row["onnx"] = "yes"
    except Exception as error:  # the table says what happened
        text = str(error).strip()
        row[step] = f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"
    return row


def passed(row: dict[str, Any]) -> bool:
    """Whether nothing failed."""
    return all(row[step] in ("yes", "-") for step in STEPS) and row["self-contained"] == "yes"


def table(rows: list[dict[str, Any]]) -> str:
    """The page in Markdown."""
    good = sum(map(passed, rows))
    lines = [
        "# Families",
        "",
        f"Decoder classes of transformers that were tried, tiny (two blocks, width 32) and with "
        f"random weights: {good} of {len(rows)} go the whole way. Matrices of MLPs, attention and "
        "the embedding are all factored, by data; the model is saved and loaded again (equal to "
        "the bit), healed, folded to dense and written self-contained. ONNX was tried for "
        f"{', '.join(ONNX)}. This page is written by `tests/family_matrix.py`.",
        "",
        "| class | factored | of the parameters | chain | ONNX | what stays |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        failed = [f"{step}: {row[step]}" for step in STEPS if row[step] not in ("yes", "-")]
        lines.append(
            f"| {row['class']} | {row.get('matrices', 0)} matrices | {row.get('share', 0):.0%} "
            f"| {'yes' if passed(row) else '; '.join(failed)[:160]} | {row['onnx']} "
            f"| {(row['left'] or '').removeprefix('what is no linear layer stays as it is: ')} |"
        )
    return "\n".join(lines) + "\n"


def main(chosen: list[str]) -> None:
    """Run the chains, print what failed, and write the results unless only some were chosen."""
    from krony.hf.saving import write_json, write_text
    from krony.measure.evaluate import environment

    warnings.simplefilter("ignore")
    hf.logging.set_verbosity_error()
    hf.logging.disable_progress_bar()
    torch.set_num_threads(1)
    rows = []
    for family in chosen or FAMILIES:
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            rows.append(chain(family, Path(folder), with_onnx=True))
        said = [f"{s}: {rows[-1][s]}" for s in STEPS if rows[-1][s] not in ("yes", "-")]
        print(f"{family:16} {time.perf_counter() - started:5.1f} s", *said, flush=True)
    if not chosen:
        record = {"environment": environment(), "seed": 0, "rows": rows}
        write_json(ROOT / "benchmarks" / "results" / "families.json", record)
        write_text(ROOT / "docs" / "families.md", table(rows))
    print(json.dumps({"passed": sum(map(passed, rows)), "tried": len(rows)}))


if __name__ == "__main__":
    main(sys.argv[1:])
