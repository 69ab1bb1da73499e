"""Names that modules had in 0.1, when all stood side by side: they still import, with a warning.

To go with 0.3. `krony.heal` and `krony.quantize` are not here: those are functions.
"""

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_ROOMS = {
    "maths": "fit kron schemes",
    "text": "blocks data docstrings",
    "nn": "activations layers mlp packing products tensor_rank watched",
    "hf": "checkpoints families modeling plan replay",
    "compression": "budget calibrate embedding factorise limits sequential width",
    "healing": "curves losses objective optimizers recipe reconstruct speed training",
    "measure": "bench evaluate footprint info memory roofline runtimes",
}
MODULES = {name: f"krony.{room}.{name}" for room, names in _ROOMS.items() for name in names.split()}
MODULES |= {
    "cpu_decode": "krony.nn.cpu.decode",
    "cpu_kernels": "krony.nn.cpu.kernels",
    "cpu_tiles": "krony.nn.cpu.tiles",
    "gpu_mlp": "krony.nn.gpu.mlp",
    "triton_kernels": "krony.nn.gpu.triton_kernels",
    "tables": "krony.cli.tables",
}

GONE = {
    "kernels": "krony.kernels is gone: krony.nn.dispatch has the table of kernels, krony.explain "
    "shows which one takes what, and the Triton operators are in krony.nn.gpu.operators"
}


def find(name: str, level: int) -> ModuleType:
    """The module that had this name, after a warning to the caller `level` frames up."""
    new = MODULES[name]
    warnings.warn(f"krony.{name} is {new} now", DeprecationWarning, stacklevel=level + 1)
    return importlib.import_module(new)


class _Finder:
    """Gives the module of the new name for the old one, the same object.

    A finder and a loader, without their base classes: `importlib.abc` takes longer than krony.
    """

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        room, _, old = name.partition(".")
        if room == "krony" and old in GONE:
            raise ModuleNotFoundError(GONE[old], name=name)
        if room != "krony" or old not in MODULES:
            return None
        loader: Any = self
        return ModuleSpec(name, loader, origin=MODULES[old], loader_state=find(old, 2))

    def create_module(self, spec: ModuleSpec) -> Any:
        module = spec.loader_state
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        # The import system has just written the old name's; the module is that of the new name.
        if (spec := module.__spec__) is not None:
            module.__spec__ = spec.loader_state


def install() -> None:
    """Let the old names be imported; once is enough."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
