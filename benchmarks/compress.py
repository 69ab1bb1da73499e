"""Minutes, memory and quality of `krony compress` on a real model, stage by stage.

    python recipes/smollm2.py runs/smollm2
    python benchmarks/compress.py runs/smollm2 --text corpus.txt --evaluate wiki.test.raw.txt

Every stage's seconds are those of the wall and those of the processors (all threads together): on a
machine that does other work too, only the latter can be compared.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch

import krony
from krony.compression import calibrate
from krony.compression.budget import make_budget_plan
from krony.compression.factorise import DATA
from krony.compression.work import Work, beside
from krony.hf.checkpoints import load_tokenizer, save_model, write_json
from krony.measure import evaluate, info
from krony.measure.memory import peak_resident_bytes
from krony.text import data

EVALUATED, WINDOW = 24, 1024


class Stages:
    """Seconds of one stage after the other."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.wall, self.processors = time.perf_counter(), time.process_time()

    def end(self, name: str) -> None:
        """Close the stage that has run since the last one ended."""
        wall, processors = time.perf_counter(), time.process_time()
        row = {
            "stage": name,
            "seconds": round(wall - self.wall, 1),
            "processor_seconds": round(processors - self.processors, 1),
            "peak_bytes_so_far": peak_resident_bytes(),
        }
        self.rows.append(row)
        self.wall, self.processors = wall, processors
        print(row, flush=True)


def main() -> None:
    """Compress with the defaults, evaluate before and after, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source")
    parser.add_argument("--text", required=True, help="calibration text, as krony compress takes")
    parser.add_argument("--evaluate", required=True, help="raw WikiText-2 test, or another text")
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--objective", default="size")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--memory", type=float, default=4.0, help="gigabytes")
    parser.add_argument("--keep", type=Path, help="write the compressed model here")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/scale-compress.json"))
    arguments = parser.parse_args()
    stages = Stages()
    model, tokenizer = krony.load_model(arguments.source), load_tokenizer(arguments.source)
    before = info.parameters(model)
    windows = calibrate.calibration_windows(
        arguments.text, model, tokenizer, arguments.windows, arguments.window
    )
    stages.end("load")
    keep = arguments.keep or Path("runs/compressed")
    work = Work.of(model, windows, 0, beside(keep))
    seen = ["Calibrating"]

    def watch(what: str, _: int, __: int) -> None:
        if what != seen[0]:
            stages.end(seen[0])
            seen[0] = what

    found = make_budget_plan(
        model,
        windows,
        share=arguments.budget,
        objective=arguments.objective,
        work=work,
        memory=int(arguments.memory * 1e9),
        progress=watch,
    )
    stages.end(seen[0])
    krony.compress(
        model, found.plan, init=DATA, calibration=windows, moments=found.moments, work=work
    )
    stages.end("Fitting")
    if arguments.keep:
        save_model(model, arguments.keep, tokenizer)
        stages.end("Saving")
    work.remove()
    text = data.load_text(arguments.evaluate)
    ids = evaluate.tokenize(tokenizer, data.Text(text.name, text.text[:400_000], text.origin))
    rows = {}
    dense = krony.load_model(arguments.source, torch.bfloat16)
    for name, each in (("dense", dense), ("compressed", model.bfloat16())):
        result = evaluate.perplexity(each, ids[: EVALUATED * WINDOW], text, WINDOW)
        rows[name] = {"parameters": info.parameters(each), "perplexity": result.perplexity}
        print(name, rows[name], flush=True)
    record = {
        "what": f"MLPs at {arguments.budget} of their parameters, objective {arguments.objective}",
        "model": Path(arguments.source).name,
        "parameters": before,
        "environment": evaluate.environment(),
        "calibration": f"{arguments.windows} windows of {arguments.window} tokens",
        "memory_asked": arguments.memory * 1e9,
        "protocol": f"first {EVALUATED} windows of {WINDOW} tokens, no BOS, bfloat16",
        "predicted_nats": found.harm,
        "stages": stages.rows,
        "models": rows,
        "seed": 0,
    }
    write_json(arguments.out, record)


if __name__ == "__main__":
    main()
