"""Tells transformers of the loader of factored models, without importing either of the two.

transformers keeps its loaders by the method that `config.json` names, in two tables of
`transformers.quantizers.auto`. The entries made here are stand-ins: the loader itself, and torch
with it, is imported when the first factored model is. Where transformers is not imported yet, they
are made as soon as it has imported that module.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

METHOD = "kronecker"
TABLES = "transformers.quantizers.auto"
LOADER = "krony.hf.modeling"


class _Later:
    """A class of the loader, imported when it is called or asked for an attribute."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.__module__ = LOADER  # what a copy in a self-contained directory gives way to

    def _class(self) -> Any:
        return getattr(importlib.import_module(LOADER), self._name)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self._class()(*arguments, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._class(), name)


def _register(tables: Any) -> None:
    tables.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = _Later("KroneckerConfig")
    tables.AUTO_QUANTIZER_MAPPING[METHOD] = _Later("KroneckerQuantizer")


class _Watch:
    """Sees the import of the tables, has the others find them, and registers when they are made."""

    finding = False

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != TABLES or self.finding:
            return None
        self.finding = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.finding = False
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            loader.exec_module = _then_register(loader.exec_module)
        return spec


def _then_register(execute: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
    def run(module: ModuleType) -> None:
        import logging

        # Where torchao is installed, transformers imports it here, and it tells everyone of GPU
        # libraries that do not fit and of torch's deprecations: noise before every command.
        for name in ("torchao", "torch.utils._pytree"):
            logging.getLogger(name).setLevel(logging.ERROR)
        execute(module)
        _register(module)

    return run


def install() -> None:
    """Register the loader now, or when transformers is imported."""
    if (tables := sys.modules.get(TABLES)) is not None:
        _register(tables)
    elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())
