"""Checksums: one flipped bit in a model directory is found, and which tensor it is in.

`config.json` holds them under `quantization_config`, beside the plan:

    checksums   {"algorithm": "xxh3_64",
                 "tensors": {name: checksum of its dtype, shape and bytes as they are stored},
                 "files": {name: of a safetensors file its header's, of any other that is read
                           with a model its content's},
                 "config": of the rest of config.json, in whatever way it is laid out}

They are taken of the bytes in the files, so that dtypes, devices and ties in memory play no part.
XXH3 finds accidents at the speed of memory; against somebody who changes a model on purpose it
is no protection, as nothing in the same directory could be.
"""

import json
import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from krony.errors import KronyError
from krony.hf.companions import GENERATION, is_companion
from krony.hf.strict import mapping, read_json

ALGORITHM = "xxh3_64"
# Bytes of weights up to which loading checks them: 5 ms of 300 or more, less than 2 %. Beyond, both
# grow with the size, and checking takes some 10 % of loading from the system's cache.
MOST = 2**25
CONFIG, KEY, SECTION = "config.json", "checksums", "quantization_config"


@dataclass(frozen=True)
class Verified:
    """What was compared: numbers of tensors and files, and the bytes of the tensors."""

    tensors: int
    files: int
    bytes: int


def record(folder: Path) -> None:
    """Add checksums to the config.json of a factored model, as the last thing that is written."""
    path = folder / CONFIG
    config = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(config.get(SECTION), dict) or "plan" not in config[SECTION]:
        return
    config[SECTION].pop(KEY, None)
    tensors: dict[str, str] = {}
    for weights in sorted(folder.glob("*.safetensors")):
        tensors |= dict(_tensors(weights))
    files = {
        file.relative_to(folder).as_posix(): _file(file)
        for file in sorted(folder.rglob("*"))
        if file.is_file() and _matters(file.relative_to(folder).as_posix())
    }
    config[SECTION][KEY] = {
        "algorithm": ALGORITHM,
        "config": _config(config),
        "files": files,
        "tensors": dict(sorted(tensors.items())),
    }
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def verify(folder: Path, progress: Callable[[str], None] | None = None) -> Verified:
    """Compare everything in a model directory with its checksums.

    Args:
        progress: called with the name of every tensor.
    Raises:
        KronyError: no checksums, or the first thing that differs, and how many others do.
    """
    config, sums = _read(folder)
    if sums is None:
        raise KronyError(
            f"{folder} has no checksums: it is no factored model, or it was written by krony 0.1 "
            "or by transformers; krony.save_model writes them"
        )
    wrong: list[str] = []
    found: dict[str, str] = {}
    size = 0
    for weights in sorted(folder.glob("*.safetensors")):
        size += weights.stat().st_size
        for name, checksum in _tensors(weights):
            found[name] = checksum
            if progress is not None:
                progress(name)
    wrong += [f"the tensor {name}" for name in sums["tensors"] if name not in found]
    wrong += [
        f"the tensor {name}"
        for name, checksum in found.items()
        if sums["tensors"].get(name) != checksum
    ]
    for name, checksum in sums["files"].items():
        file = folder / name
        if not file.is_file() or _file(file) != checksum:
            wrong.append(f"the header of {name}" if name.endswith(".safetensors") else name)
    if sums["config"] != _config(config):
        wrong.append(CONFIG)
    if wrong:
        raise KronyError(_message(folder, wrong))
    return Verified(len(found), len(sums["files"]) + 1, size)


def check_tensors(folder: Path) -> None:
    """Compare the tensors of a directory that has checksums; files beside them may have been edited
    since. Raises `KronyError`."""
    _, sums = _read(folder)
    if sums is None:
        return
    found = {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in _tensors(path)}
    wanted = sums["tensors"]
    if wrong := [f"the tensor {name}" for name in wanted if found.get(name) != wanted[name]]:
        raise KronyError(_message(folder, wrong))


def check_factors(folder: Path) -> None:
    """Compare the factors alone, in models of up to `MOST` bytes: a part of loading.

    Raises:
        KronyError: a factor that is not what was written.
    """
    files = sorted(folder.glob("*.safetensors"))
    if sum(file.stat().st_size for file in files) > MOST:
        return
    config, sums = _read(folder)
    if sums is None:
        return
    names = tuple(f"{matrix['name']}.groups." for matrix in config[SECTION]["plan"]["matrices"])
    wanted = {name: v for name, v in sums["tensors"].items() if name.startswith(names)}
    wrong = [
        f"the tensor {name}"
        for weights in files
        for name, checksum in _tensors(weights, wanted)
        if wanted[name] != checksum
    ]
    if wrong:
        raise KronyError(_message(folder, wrong))


def _matters(name: str) -> bool:
    """Whether a file says what the model is; reports hold times, which are never the same."""
    code = name.endswith((".safetensors", ".safetensors.index.json", ".py"))
    return code or name == GENERATION or is_companion(name)


def _message(folder: Path, wrong: list[str]) -> str:
    more = f", and so are {len(wrong) - 1} more" if len(wrong) > 1 else ""
    return (
        f"{wrong[0]} in {folder} is not what krony wrote{more}: damaged on the way, or changed "
        "since; copy the directory again, or make the model again"
    )


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The configuration, and its checksums if it has any of the kind that is known."""
    config = mapping(read_json(folder / CONFIG), str(folder / CONFIG))
    section = config.get(SECTION)
    sums = section.get(KEY) if isinstance(section, dict) else None
    if not isinstance(sums, dict) or sums.get("algorithm") != ALGORITHM:
        return config, None
    if not all(isinstance(sums.get(key), dict) for key in ("tensors", "files")) or not isinstance(
        sums.get("config"), str
    ):
        raise KronyError(f"the checksums in {folder / CONFIG} are damaged; make the model again")
    if any(Path(name).is_absolute() or ".." in Path(name).parts for name in sums["files"]):
        raise KronyError(f"the checksums in {folder / CONFIG} name files outside of {folder}")
    return config, sums


def _config(config: dict[str, Any]) -> str:
    section = {key: value for key, value in config[SECTION].items() if key != KEY}
    text = json.dumps({**config, SECTION: section}, sort_keys=True)
    return xxhash.xxh3_64_hexdigest(text.encode())


def _file(path: Path) -> str:
    if path.suffix != ".safetensors":
        return xxhash.xxh3_64_hexdigest(path.read_bytes())
    with path.open("rb") as file:
        start = file.read(8)
        return xxhash.xxh3_64_hexdigest(start + file.read(int.from_bytes(start, "little")))


def _tensors(path: Path, wanted: dict[str, str] | None = None) -> Iterator[tuple[str, str]]:
    """(name, checksum) of the tensors in a safetensors file, in the order of the file."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            start = 8 + int.from_bytes(data[:8], "little")
            header = json.loads(data[8:start])
            entries = [(k, v) for k, v in header.items() if k != "__metadata__"]
            entries.sort(key=lambda entry: entry[1]["data_offsets"])
            view = memoryview(data)
            try:
                for name, entry in entries:
                    if wanted is not None and name not in wanted:
                        continue
                    first, last = entry["data_offsets"]
                    if not 0 <= first <= last <= len(data) - start:
                        raise ValueError(f"{name} lies outside of the file")
                    checksum = xxhash.xxh3_64(f"{entry['dtype']} {entry['shape']}".encode())
                    with view[start + first : start + last] as part:
                        checksum.update(part)
                    yield name, checksum.hexdigest()
            finally:
                view.release()
    except (
        OSError, ValueError, KeyError, TypeError, OverflowError, AttributeError, RecursionError,
    ) as error:  # fmt: skip
        raise KronyError(
            f"{path} is no whole safetensors file ({error}); copy it again, or make the model again"
        ) from error
