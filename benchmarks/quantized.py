"""What quantisation costs a factored model, beside the dense one quantised the same way.

Every model is stored in float16, as it is and in each form, read back, and run in float32 on the
head of the language reference. Nothing is trained.

python benchmarks/quantized.py demo MODEL ... [--tokens 16384]
"""

import argparse
import tempfile
from pathlib import Path

import torch
import transformers

import krony
from krony.cli.tables import megabytes
from krony.hf import checkpoints
from krony.measure import evaluate
from krony.nn.packing import FORMS
from krony.text import data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="+", help="the dense one first, then factored ones")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results/quantized.json"
    )
    options = parser.parse_args()
    transformers.logging.disable_progress_bar()
    text = data.load_text("python-docs")
    rows = []
    print("| model | weights | on disk | perplexity | against itself in float16 |")
    print("|---|---|---|---|---|")
    for source in options.models:
        tokenizer = krony.load_tokenizer(source)
        ids = evaluate.tokenize(tokenizer, text)[: options.tokens]
        first = None
        for form in ("float16", *FORMS):
            model = krony.load_model(source, torch.float16)
            if form in FORMS:
                krony.quantize(model, form)
            with tempfile.TemporaryDirectory() as folder:
                krony.save_model(model, Path(folder) / "model", tokenizer)
                size = checkpoints.directory_bytes(Path(folder) / "model")
                again = krony.load_model(Path(folder) / "model", torch.float32)
            found = evaluate.perplexity(again, ids, text)
            first = first or found.perplexity
            name = Path(source).name
            rows.append({"model": name, "form": form, "bytes": size, **found.to_dict()})
            print(
                f"| {name} | {form} | {megabytes(size)} | {found.perplexity:.2f} "
                f"| {found.perplexity / first:.4f}x |",
                flush=True,
            )
    checkpoints.write_json(options.out, {"environment": evaluate.environment(), "rows": rows})


if __name__ == "__main__":
    main()
