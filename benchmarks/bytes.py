"""Whether two versions write the same bytes: hashes of what a fixed list of commands writes.

python benchmarks/bytes.py old.json     with the other version first in PYTHONPATH
python benchmarks/bytes.py new.json --against old.json

Packaged model, one thread. What was written stays in old/ and new/, beside the hashes: where bytes
differ, tensors and JSON are compared by name. Nothing of krony is imported here, so that any
version can be run.
"""

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

DATA = "--calibration python-docstrings --windows 16"
SIDE = "--layout small-outer"  # said, because what is taken without it may change
HEALING = "--data python-docstrings --teacher demo --dtype float32"
COMMANDS = f"""
compress demo van-loan --small 2x2 --init van-loan {SIDE}
compress demo scaled --shape 512x128 --init van-loan-scaled {SIDE}
compress demo outer --small 2x2 --init van-loan --layout large-outer
compress demo prune --small 2x1 --init prune {SIDE}
compress demo random --small 2x2 --init random --seed 3 {SIDE}
compress demo terms --small 4x4 --terms 3 --scalars --init van-loan {SIDE}
compress demo data --small 4x4 --terms 6 --init data {SIDE} {DATA}
compress demo quarter --budget 0.25 {DATA}
compress demo decode --budget 0.25 --objective decode {DATA}
heal scaled healed --tokens 50K {HEALING}
heal scaled adapted --tokens 20K --recipe lora {HEALING}
quantize scaled int8 --to int8
quantize data int4 --to int4
export data dense --to dense
export scaled alone --to self-contained
export scaled graph --to onnx
evaluate data --data python-docs --json evaluated.json
generate quarter hello
schemes --json
"""
PARTS = 12  # of a hash, in digits


def commands(small: bool) -> list[str]:
    """One a line, in order: later ones read what earlier ones wrote."""
    lines = COMMANDS.strip().splitlines()
    return [line for line in lines if " scaled" in line and "heal" not in line] if small else lines


def digest(content: bytes) -> str:
    """The first digits of its SHA-256."""
    return hashlib.sha256(content).hexdigest()[:PARTS]


def run(line: str, folder: Path) -> dict[str, Any]:
    """One command there: its exit code, and hashes of the files or of the lines that it wrote."""
    before = set(folder.rglob("*"))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "krony", *line.split()],
        cwd=folder, env=environment, capture_output=True, check=False,
    )  # fmt: skip
    made = sorted(path for path in set(folder.rglob("*")) - before if path.is_file())
    found = {str(path.relative_to(folder)): digest(path.read_bytes()) for path in made}
    if not found:
        (folder / f"{line.split()[0]}.stdout").write_bytes(done.stdout)
        found = {f"{line.split()[0]}.stdout": digest(done.stdout)}
    record = {"command": line, "code": done.returncode, "files": found}
    if done.returncode:
        record["error"] = done.stderr.decode(errors="replace")[-300:]
    return record


def unlike(path: str, ours: Path, theirs: Path) -> str:
    """In what two files of other bytes differ."""
    if not (ours / path).exists() or not (theirs / path).exists():
        return "other bytes"
    if path.endswith(".safetensors"):
        return unlike_tensors(ours / path, theirs / path)
    if path.endswith(".json"):
        pair = [_flat(json.loads((side / path).read_text("utf-8"))) for side in (theirs, ours)]
        return _keys(*pair)
    return "other bytes"


def unlike_tensors(ours: Path, theirs: Path) -> str:
    """Names that only one has, and how far the values of the others are apart."""
    from safetensors import safe_open

    with safe_open(theirs, "pt") as old, safe_open(ours, "pt") as new:
        both = sorted(set(old.keys()) & set(new.keys()))
        said = [f"{len(both)} tensors in both"]
        for what, names in (("gone", set(old.keys()) - set(new.keys())),
                            ("new", set(new.keys()) - set(old.keys()))):  # fmt: skip
            if names:
                said.append(f"{len(names)} {what}")
        shapes, farthest = 0, 0.0
        for name in both:
            a, b = old.get_tensor(name), new.get_tensor(name)
            if a.shape != b.shape or a.dtype != b.dtype:
                shapes += 1
            elif a.numel():
                a, b = a.double(), b.double()
                apart = float((a - b).norm() / a.norm().clamp_min(1e-30))
                farthest = max(farthest, apart)
        if shapes:
            said.append(f"{shapes} of another shape or type")
        rest = len(both) - shapes
        same = "equal" if not farthest else f"at most {farthest:.1e} apart"
        if rest:
            said.append(f"{rest if shapes else 'all'} {same}")
        if (old.metadata() or {}) != (new.metadata() or {}):
            said.append("other metadata")
    return ", ".join(said)


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        parts = [_flat(inner, f"{name}.{key}" if name else key) for key, inner in value.items()]
        return {key: inner for part in parts for key, inner in part.items()}
    return {name: value}


def _first_of(key: str, others: dict[str, Any]) -> str:
    """The part of a key that nothing among the others begins with."""
    parts = key.split(".")
    heads = (".".join(parts[: n + 1]) for n in range(len(parts)))
    return next((h for h in heads if not any(o == h or o.startswith(f"{h}.") for o in others)), key)


def _keys(old: dict[str, Any], new: dict[str, Any]) -> str:
    parts = {
        "gone": sorted({_first_of(key, new) for key in set(old) - set(new)}),
        "new": sorted({_first_of(key, old) for key in set(new) - set(old)}),
        "other": sorted(key for key in set(old) & set(new) if old[key] != new[key]),
    }
    said = (f"{what}: {', '.join(keys[:6])}" + " ..." * (len(keys) > 6)
            for what, keys in parts.items() if keys)  # fmt: skip
    return "; ".join(said) or "the same values, written in another way"


def compared(new: Path, old: Path) -> list[dict[str, Any]]:
    """A row a command: how many files are equal, and in what each of the others differs.

    Args:
        new, old: hashes, each with the folder of its name beside it.
    """
    ours, theirs = (json.loads(path.read_text("utf-8")) for path in (new, old))
    before = {row["command"]: row for row in theirs["rows"]}
    rows = []
    for row in ours["rows"]:
        were, files = before.get(row["command"], {"files": {}})["files"], row["files"]
        equal = [path for path in files if were.get(path) == files[path]]
        differs = {path: "new" for path in files if path not in were}
        differs |= {path: "gone" for path in were if path not in files}
        for path in sorted(set(were) & set(files) - set(equal)):
            differs[path] = unlike(path, new.with_suffix(""), old.with_suffix(""))
        rows.append({"command": row["command"], "equal": len(equal), "differs": differs})
    return rows


def main() -> None:
    """Run the commands, write the hashes, say what is different."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="NAME.json", help="hashes; files go to NAME")
    parser.add_argument("--against", type=Path, help="hashes of another version")
    parser.add_argument("--small", action="store_true", help="a few commands, to see that it runs")
    options = parser.parse_args()
    folder: Path = options.out.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        parser.error(f"{folder} is not empty")
    version = importlib.metadata.version
    content: dict[str, Any] = {
        "what": "hashes of what commands write",
        "environment": {
            "date": datetime.now(UTC).date().isoformat(),
            "python": platform.python_version(),
            "torch": version("torch"),
            "transformers": version("transformers"),
            "cpu": platform.processor() or platform.machine(),
            "gpu": None,
        },
        "rows": [],
    }
    for line in commands(options.small):
        content["rows"].append(run(line, folder))
        options.out.write_text(json.dumps(content, indent=1), encoding="utf-8")
        code = content["rows"][-1]["code"]
        print(f"{'failed: ' if code else ''}{line}", flush=True)
    if options.against:
        content["against"] = compared(options.out, options.against)
        options.out.write_text(json.dumps(content, indent=1), encoding="utf-8")
        for row in content["against"]:
            print(f"{row['command']}: {row['equal']} equal")
            for path, how in row["differs"].items():
                print(f"    {path}: {how}")


if __name__ == "__main__":
    main()
