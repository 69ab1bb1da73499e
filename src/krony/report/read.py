"""What a page is made of: model directories, folders of comparisons, files of figures.

Nothing is loaded as a model: sizes are read from the heads of the weight files, shapes from the
plan.
"""

import json
import math
import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from krony.errors import KronyError
from krony.hf.integrity import check_tensors
from krony.hf.plan import MatrixPlan, Plan
from krony.hf.vetting import check_finite, configuration, weights

BLOCK = re.compile(r"\.(\d+)\.")
NO_WEIGHTS = ("I64", "I32", "BOOL")  # places and masks
Record = dict[str, Any]


@dataclass
class Directory:
    """A model directory.

    Attributes:
        parameters, bytes: as stored, tied ones once.
        by_block: parameters of each block, as they are now.
        plan: what was planned for its matrices; None: a dense model.
        provenance: how it was made. heal: what heal.json says.
    """

    path: Path
    config: Record
    parameters: int = 0
    bytes: int = 0
    by_block: dict[int, int] = field(default_factory=dict)
    plan: Plan | None = None
    provenance: Record = field(default_factory=dict)
    heal: Record | None = None
    dtype: str = ""

    @property
    def name(self) -> str:
        """Of its folder."""
        return self.path.name

    @property
    def dense_parameters(self) -> int:
        """Of the model that it was made from."""
        before = self.provenance.get("parameters")
        if isinstance(before, dict) and isinstance(before.get("before"), int):
            return int(before["before"])
        return self.parameters + (sum(m.saved for m in self.plan.matrices) if self.plan else 0)


@dataclass
class Found:
    """All that was given."""

    directories: list[Directory] = field(default_factory=list)
    comparisons: list[Record] = field(default_factory=list)
    evaluations: list[Record] = field(default_factory=list)
    benches: list[Record] = field(default_factory=list)


def read(paths: list[Path]) -> Found:
    """Sort what is given.

    Raises:
        KronyError: a path that is none of: a model directory, a comparison's folder, a file that
            --json of evaluate or bench, or compare, wrote.
    """
    found = Found()
    for path in paths:
        if (path / "compare.json").is_file():
            found.comparisons.append(_json(path / "compare.json"))
        elif (path / "config.json").is_file():
            found.directories.append(directory(path))
        elif path.is_file() and path.suffix == ".json":
            _sort(_json(path), path, found)
        else:
            if path.suffix.lower() == ".gguf":
                check_folder(path)
            raise KronyError(
                f"{path} is nothing to report on; give a model directory, the folder of a "
                "comparison, or a file that krony evaluate --json or krony bench --json wrote"
            )
    return found


def _sort(record: Record, path: Path, found: Found) -> None:
    if "settings" in record and "rows" in record:
        found.comparisons.append(record)
    elif "results" in record or "tasks" in record:
        found.evaluations.append(record)
    elif "rows" in record and "environment" in record:
        found.benches.append(record)
    else:
        raise KronyError(f"{path} has no figures that krony wrote; give a file of --json")


def _json(path: Path) -> Record:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise KronyError(f"can't read {path}: {error}") from error
    if not isinstance(content, dict):
        raise KronyError(f"{path} has no figures that krony wrote; give a file of --json")
    return content


def check_folder(path: Path) -> None:
    """Raise `KronyError` for what is no directory of a model."""
    if path.is_file() and path.suffix.lower() == ".gguf":
        raise KronyError(
            f"{path} is a GGUF file, and only directories of models are reported on and pushed; "
            "give the directory that it was exported from"
        )
    if not (path / "config.json").is_file():
        raise KronyError(f"{path} has no config.json, so it is no model directory")


def directory(path: Path) -> Directory:
    """A model directory, without loading the model.

    Raises:
        KronyError: weights that are missing or have NaN in them, files that say what can't be.
    """
    check_folder(path)
    found = weights(path)
    config = configuration(path, found)
    check_finite(found)
    check_tensors(path)
    made = Directory(path, config)
    quantization = config.get("quantization_config") or {}
    if isinstance(quantization, dict) and quantization.get("quant_method") == "kronecker":
        made.plan = Plan.from_dict(quantization["plan"])
        made.provenance = quantization.get("provenance") or {}
    elif isinstance(config.get("krony"), dict):
        made.provenance = config["krony"]
    if (path / "heal.json").is_file():
        made.heal = _json(path / "heal.json")
    kinds: dict[str, int] = defaultdict(int)
    for name, shape in found.shapes.items():
        size, dtype = math.prod(shape), found.dtypes[name]
        bits = re.search(r"\d+", dtype)  # BF16, F8_E4M3; BOOL is a byte
        made.bytes += size * (int(bits[0]) if bits else 8) // 8
        if dtype in NO_WEIGHTS:
            continue
        made.parameters += size
        kinds[dtype] += size
        if place := BLOCK.search(name):
            block = int(place[1])
            made.by_block[block] = made.by_block.get(block, 0) + size
    made.dtype = max(kinds, key=lambda kind: kinds[kind]) if kinds else ""
    return made


def block_of(matrix: MatrixPlan) -> int | None:
    """The block that a matrix stands in."""
    place = BLOCK.search(f".{matrix.name}.")
    return int(place[1]) if place else None


def saved_by_block(plan: Plan) -> dict[int, int]:
    """Parameters that each block lost."""
    found: dict[int, int] = defaultdict(int)
    for matrix in plan.matrices:
        if (block := block_of(matrix)) is not None:
            found[block] += matrix.saved
    return dict(found)
