"""What a compression has finished, kept so that the same command goes on where it stopped.

Every result is a file of tensors named by its stage and by a hash of all that it depends on: the
model's weights, the calibration's tokens and seed, and what the stage adds. Another budget finds
the moments and the prices there, another model or text finds nothing. Without a folder the results
are held in memory, for as long as the object lives.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from krony.compression import together
from krony.errors import KronyError

FORMAT = 2  # of what is kept: a newer one does not read what an older one wrote
Tensors = dict[str, Tensor]


class Work:
    """Finished stages of the compression of one model on one calibration text.

    Attributes:
        folder: where they are kept; None: in memory.
    """

    def __init__(self, folder: Path | None = None, base: str = "") -> None:
        self.folder, self._base = folder, base
        self._held: dict[str, Tensors] = {}

    @classmethod
    def of(cls, model: PreTrainedModel, windows: Tensor, seed: int, folder: Path) -> "Work":
        """In a folder, for this model, these calibration tokens and this seed alone."""
        return cls(folder, _digest(model, windows, seed))

    def about(self, model: PreTrainedModel, windows: Tensor, seed: int) -> "Work":
        """In the same place, for what is found of another model."""
        return Work() if self.folder is None else Work.of(model, windows, seed, self.folder)

    def get(self, stage: str, *depends: Any) -> Tensors | None:
        """What was put there, or None; a file that does not read counts as none."""
        name = self._name(stage, depends)
        if self.folder is None:
            return self._held.get(name)
        try:
            return load_file(self.folder / name)
        except (OSError, SafetensorError):
            return None

    def put(self, tensors: Tensors, stage: str, *depends: Any) -> None:
        """Keep tensors: whole, or after a kill or on a full disk not at all.

        Raises:
            KronyError: the folder can't be written.
        """
        name = self._name(stage, depends)
        if self.folder is None:
            self._held[name] = tensors
            return
        if together.place()[0] == 0:
            self._write(self.folder, name, tensors)
        together.meet()

    def _write(self, folder: Path, name: str, tensors: Tensors) -> None:
        path = folder / name
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, temporary)
            os.replace(temporary, path)
        except (OSError, SafetensorError) as error:
            raise KronyError(
                f"can't keep unfinished work in {folder}: "
                f"{getattr(error, 'strerror', None) or error}; free some space, then give the same "
                "command again: it goes on from here"
            ) from error
        finally:
            with suppress(OSError):
                temporary.unlink()

    def once(self, make: Callable[[], Tensors], stage: str, *depends: Any) -> Tensors:
        """What was put there, or what `make` makes, which is put there."""
        found = self.get(stage, *depends)
        if found is None:
            found = make()
            self.put(found, stage, *depends)
        return found

    def drop(self, stage: str, *depends: Any) -> None:
        """Forget one result."""
        name = self._name(stage, depends)
        self._held.pop(name, None)
        if self.folder is not None:
            (self.folder / name).unlink(missing_ok=True)

    def remove(self) -> None:
        """Forget everything."""
        self._held.clear()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _name(self, stage: str, depends: tuple[Any, ...]) -> str:
        text = json.dumps([FORMAT, self._base, stage, depends], default=str)
        return f"{stage}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.safetensors"


def beside(destination: str | Path) -> Path:
    """The work folder of a destination."""
    path = Path(destination)
    return path.with_name(f".{path.name}.work")


def model_digest(model: PreTrainedModel) -> str:
    """SHA-256 of a model's class and tensors, by which it is known again."""
    return _digest(model, torch.empty(0), 0)


def _digest(model: PreTrainedModel, windows: Tensor, seed: int) -> str:
    made = hashlib.sha256(f"{type(model).__name__} {seed} {tuple(windows.shape)}".encode())
    for name, tensor in [*model.state_dict().items(), ("windows", windows)]:
        made.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        made.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy())
    return made.hexdigest()
