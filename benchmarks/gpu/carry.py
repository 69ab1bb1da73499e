"""Carry a large file to a machine that takes 64 MiB at a time: cut it here, join it there.

    python benchmarks/gpu/carry.py cut SmolLM2-135M-Instruct.Q4_1.gguf carried/parts
    python benchmarks/gpu/carry.py join carried/parts model.gguf
    python benchmarks/gpu/carry.py model model.gguf carried/smollm2

`cut` writes parts of at most 60 MB and a note with the hash of the whole, by which `join` knows
that all of it arrived. `model` makes a Hugging Face directory in bfloat16 of a GGUF file; it needs
the gguf package, one pure wheel.
"""

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

PART_BYTES = 60_000_000
NOTE = "parts.json"


def cut(file: Path, folder: Path, size: int = PART_BYTES) -> list[Path]:
    """The parts, written."""
    content = file.read_bytes()
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for number, start in enumerate(range(0, len(content), size)):
        parts.append(folder / f"part-{number:02}")
        parts[-1].write_bytes(content[start : start + size])
    note = {"file": file.name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / NOTE).write_text(
        json.dumps(note | {"parts": [p.name for p in parts]}, indent=2) + "\n"
    )
    return parts


def join(folder: Path, file: Path) -> None:
    """The whole file again. Exits with a sentence where a part is missing or damaged."""
    note = json.loads((folder / NOTE).read_text())
    missing = [name for name in note["parts"] if not (folder / name).exists()]
    if missing:
        sys.exit(f"{folder} lacks {', '.join(missing)} of {note['file']}; carry them too")
    content = b"".join((folder / name).read_bytes() for name in note["parts"])
    if hashlib.sha256(content).hexdigest() != note["sha256"]:
        sys.exit(f"the parts in {folder} do not make {note['file']} again; carry them once more")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)


def model(file: Path, folder: Path) -> None:
    """A model directory in bfloat16, and its tokenizer, of a GGUF file."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    loaded = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    # A fresh one, that does not remember that its numbers were quantized.
    values = {k: v for k, v in loaded.config.to_dict().items() if k != "quantization_config"}
    made = AutoModelForCausalLM.from_config(type(loaded.config)(**values), dtype=torch.bfloat16)
    made.load_state_dict(loaded.state_dict())
    made.tie_weights()
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main(arguments: list[str]) -> None:
    """One of the three."""
    jobs: dict[str, Callable[[Path, Path], object]] = {"cut": cut, "join": join, "model": model}
    if len(arguments) != 3 or arguments[0] not in jobs:
        sys.exit(__doc__)
    jobs[arguments[0]](Path(arguments[1]), Path(arguments[2]))


if __name__ == "__main__":
    main(sys.argv[1:])
