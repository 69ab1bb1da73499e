"""Names that modules had in 0.1, when all stood side by side: they still import, with a warning.

To go with 0.3.
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


class _Shadowed(ModuleType):
    """`krony.heal` and `krony.quantize`, which are functions now, as the modules that they were:
    `from krony.heal import HealConfig` goes on, and `krony.heal` stays the function."""

    def __init__(self, old: str, new: str) -> None:
        super().__init__(old)
        vars(self).update(_new=new)

    def _module(self) -> ModuleType:
        warnings.warn(f"{self.__name__} is {self._new} now", DeprecationWarning, stacklevel=3)
        return importlib.import_module(self._new)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what imports and inspection ask of every module
            raise AttributeError(name)
        return getattr(self._module(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        target: Any = super() if name.startswith("__") else self._module()
        setattr(target, name, value)


def install() -> None:
    """Let the old names be imported; once is enough."""
    for old, new in (("heal", "healing.heal"), ("quantize", "export.quantize")):
        sys.modules.setdefault(f"krony.{old}", _Shadowed(f"krony.{old}", f"krony.{new}"))
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
