"""What quantization costs a factored model, beside the dense one quantized the same way.

Every model is stored in float16, as it is and in each form, read back, and run in float32 on the
head of the language reference. Nothing is trained.

python benchmarks/quantized.py demo MODEL ... [--tokens 16384]
"""

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
from records import Record, parser


def main() -> None:
    """Quantise, measure, print the table, write the JSON."""
    made = parser(__doc__ or "", "quantized")
    made.add_argument("models", nargs="+", help="the dense one first, then factored ones")
    made.add_argument("--tokens", type=int, default=16384)
    options = made.parse_args()
    if options.small:
        options.tokens = 512
    record = Record("perplexity of quantized weights", options)
    transformers.logging.disable_progress_bar()
    text = data.load_text("python-docs")
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
            record.add({"model": name, "form": form, "bytes": size, **found.to_dict()})
            print(
                f"| {name} | {form} | {megabytes(size)} | {found.perplexity:.2f} "
                f"| {found.perplexity / first:.4f}x |",
                flush=True,
            )


if __name__ == "__main__":
    main()
