"""The table of docs/gpu.md: every script, when it last ran, where its results stand, what is stale.

    python benchmarks/gpu/state.py

A result is stale where what it measures has changed since the commit that it names, or, where it
names none, since the commit that brought it.
"""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks/results"


@dataclass(frozen=True)
class Script:
    """Its results, below benchmarks/results, and the sources that they are of."""

    name: str
    tells: str
    results: tuple[str, ...]
    sources: tuple[str, ...]


KERNELS = ("src/krony/nn", "src/krony/runtime.py", "src/krony/measure/runtimes.py")
# Where the kernels were when the first results were made.
BEFORE_ROOMS = ("kernels", "triton_kernels", "gpu_mlp", "mlp", "products", "runtimes")
HEALING = (*KERNELS, "src/krony/healing")
COMPRESSION = ("src/krony/compression", "src/krony/maths")
SCRIPTS = (
    Script("01-tests.sh", "whether the kernels are right", ("gpu/checks.json",), KERNELS),
    Script(
        "02-training.sh",
        "what a step of healing costs",
        ("gpu/mixing.json", "gpu/training-*.json"),
        HEALING,
    ),
    Script("03-heal.sh", "what comes of a real model", ("gpu/study/*budget.json",), COMPRESSION),
    Script("04-rivals.sh", "the same by other methods", ("gpu/study/*.json",), COMPRESSION),
    Script(
        "05-kernels.sh",
        "decode, prefill, MLPs, blocks",
        ("gpu/decode-*.json", "gpu/forward.json", "gpu/launches.json"),
        KERNELS,
    ),
    Script("06-paper.sh", "the paper's 81M at GPT-2's shapes", ("gpu/paper-*.json",), HEALING),
    Script("07-compression.sh", "minutes at 1.5B", ("gpu/compression-*.json",), COMPRESSION),
    Script(
        "before there were scripts",
        "GPT-2's shapes: MLPs, whole models",
        ("forward-gpu*.json", "model-gpu*.json"),
        (*KERNELS, *(f"src/krony/{name}.py" for name in BEFORE_ROOMS)),
    ),
)


def git(*arguments: str) -> str:
    """What git prints; nothing where it fails."""
    command = ["git", "-C", str(ROOT), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def commit_of(path: Path, environment: dict[str, Any]) -> str:
    """That its figures are of."""
    named = str(environment.get("commit", "")).removesuffix("-dirty")
    return named or git("log", "-1", "--format=%h", "--", str(path))


def stale(commit: str, sources: tuple[str, ...]) -> str:
    """What changed since."""
    changed = git("log", "--reverse", "--format=%h", f"{commit}..HEAD", "--", *sources).split()
    if not changed:
        return "no"
    last = f" to {changed[-1]}" if len(changed) > 1 else ""
    return f"{len(changed)} commits since: {changed[0]}{last}"


def row(script: Script) -> list[str]:
    """Of the table."""
    files = sorted({p for pattern in script.results for p in RESULTS.glob(pattern)})
    if not files:
        return [script.name, script.tells, "never", "", ""]
    found = [(p, json.loads(p.read_text(encoding="utf-8"))["environment"]) for p in files]
    path, last = max(found, key=lambda pair: pair[1]["date"])
    commit = commit_of(path, last)
    ran = f"{last['date']}, {last['gpu']}, torch {last['torch']}, "
    ran += f"transformers {last['transformers']}, {commit}"
    places = ", ".join(f"`benchmarks/results/{p.relative_to(RESULTS)}`" for p in files)
    return [script.name, script.tells, ran, places, stale(commit, script.sources)]


def main() -> None:
    """Print it."""
    rows = [["script", "tells", "last run", "results", "stale"], ["---"] * 5]
    for line in rows + [row(script) for script in SCRIPTS]:
        print("| " + " | ".join(line) + " |")


if __name__ == "__main__":
    main()
