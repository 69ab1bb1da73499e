"""Is it right on this GPU? The tests of kernels and CUDA graphs, and perplexity beside the CPU's.

python benchmarks/checks.py [--model DIRECTORY]
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import krony
from krony.measure import evaluate
from krony.text import data
from records import RESULTS, Record, parser
from shapes import low_rank
from timing import device_here

ROOT = RESULTS.parents[1]
# What launches kernels or records graphs. A file that is not there is no error: names change.
TESTS = ("tests/nn/test_kernels.py", "tests/nn/test_gpu*.py", "tests/nn/test_products.py")
GRAPHS = ("tests/measure/test_bench.py", "same_tokens")
DIGITS = 5e-5  # relative: four digits
TOKENS = 8192


def run_tests(record: Record, small: bool) -> bool:
    """Every file in a process of its own, so that a crash of one leaves the others."""
    jobs = [([str(path)], "") for pattern in TESTS for path in sorted(ROOT.glob(pattern))]
    jobs.append(([str(ROOT / GRAPHS[0])], GRAPHS[1]))
    if small:
        jobs = [([str(ROOT / "tests/nn/test_products.py")], "half_precision")]
    passed = True
    for files, chosen in jobs:
        name = Path(files[0]).name
        if not record.has_time(name, 20):
            continue
        command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", *files]
        command += ["-k", chosen] if chosen else []
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        last = (done.stdout.strip().splitlines() or [done.stderr.strip()])[-1]
        failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
        row = {"file": name, "exit_code": done.returncode, "summary": last, "failed": failed}
        record.add(row, "tests")
        print(f"{name}: {last}", *failed, sep="\n  ", flush=True)
        passed = passed and done.returncode == 0
    return passed


def made(source: str, how: str) -> PreTrainedModel:
    """The model as it is, or with factored MLPs, in float32."""
    model = krony.load_model(source, torch.float32)
    if how == "factored":
        plan = krony.make_plan(model, small=(2, 2))
        krony.compress(model, plan, init="van-loan-scaled")
    elif how == "low rank":
        krony.compress(model, low_rank(model, 0.5), init="van-loan")
    return model


def compare(record: Record, source: str, text: data.Text, tokens: int) -> bool:
    """Perplexity in float32 on both, and on this device in bfloat16, which says how far that is."""
    agree, device = True, device_here()
    ids = evaluate.tokenize(krony.load_tokenizer(source), text)[:tokens]
    for how in ("dense", "factored", "low rank"):
        name = f"{Path(source).name}, {how}"
        if not record.has_time(f"perplexity of {name}", 30):
            continue
        model: Any = made(source, how)
        row: dict[str, Any] = {"model": name, "text": text.name, "tokens": len(ids)}
        row["cpu"] = evaluate.perplexity(model, ids).perplexity
        row["here"] = evaluate.perplexity(model.to(device), ids).perplexity
        row["here_bfloat16"] = evaluate.perplexity(model.to(torch.bfloat16), ids).perplexity
        row["agree"] = abs(row["here"] / row["cpu"] - 1) < DIGITS
        record.add(row, "perplexity")
        print(row, flush=True)
        agree = agree and row["agree"]
    return agree


def main() -> int:
    """All of it; 1 where something is wrong."""
    options_of = parser(__doc__ or "", "checks")
    options_of.add_argument("--model", help="a directory beside the packaged model, if it is there")
    options = options_of.parse_args()
    record = Record("tests and perplexity on a GPU", options)
    tokens = 512 if options.small else TOKENS
    right = compare(record, "demo", data.load_text("python-docs"), tokens)
    if options.model and Path(options.model).is_dir() and not options.small:
        right = compare(record, options.model, data.load_text("python-docs"), tokens) and right
    right = run_tests(record, options.small) and right
    record.content["right"] = right
    record.write()
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
