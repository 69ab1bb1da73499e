"""Krony: smaller transformers with Kronecker products.

Importing it registers the loader: from then on `AutoModelForCausalLM.from_pretrained` reads
factored models. The names below load what they need when they are first used, so that the import
itself takes no time.
"""

import importlib
from typing import TYPE_CHECKING, Any

from krony import moved
from krony.errors import KronyError
from krony.hf import register

if TYPE_CHECKING:
    from krony.compression.budget import BudgetPlan, make_budget_plan
    from krony.compression.calibrate import calibration_windows
    from krony.compression.entry import compress
    from krony.compression.inits import INITS, Terms
    from krony.compression.layout import choose_layouts
    from krony.compression.plain import slim
    from krony.compression.sequential import DataOptions
    from krony.export.quantize import quantize
    from krony.healing.heal import HealConfig, HealRecord, heal
    from krony.hf.checkpoints import load, load_model, load_tokenizer, save, save_model
    from krony.hf.modeling import KroneckerConfig, form
    from krony.hf.plan import MatrixPlan, Plan, make_plan
    from krony.maths.schemes import SCHEMES, Factors
    from krony.measure.perplexity import perplexity
    from krony.nn.explain import explain
    from krony.nn.layers import KroneckerEmbedding, KroneckerGroup, KroneckerLinear
    from krony.text.names import texts

__version__ = "0.2.0"

_MODULES = {  # of each public name; the imports above say the same to type checkers
    "INITS": "compression.inits",
    "SCHEMES": "maths.schemes",
    "BudgetPlan": "compression.budget",
    "DataOptions": "compression.sequential",
    "Factors": "maths.schemes",
    "HealConfig": "healing.heal",
    "HealRecord": "healing.heal",
    "KroneckerConfig": "hf.modeling",
    "KroneckerEmbedding": "nn.layers",
    "KroneckerGroup": "nn.layers",
    "KroneckerLinear": "nn.layers",
    "MatrixPlan": "hf.plan",
    "Plan": "hf.plan",
    "Terms": "compression.inits",
    "calibration_windows": "compression.calibrate",
    "choose_layouts": "compression.layout",
    "compress": "compression.entry",
    "explain": "nn.explain",
    "form": "hf.modeling",
    "heal": "healing.heal",
    "load": "hf.checkpoints",
    "load_model": "hf.checkpoints",
    "load_tokenizer": "hf.checkpoints",
    "make_budget_plan": "compression.budget",
    "make_plan": "hf.plan",
    "perplexity": "measure.perplexity",
    "quantize": "export.quantize",
    "save": "hf.checkpoints",
    "save_model": "hf.checkpoints",
    "slim": "compression.plain",
    "texts": "text.names",
}

__all__ = [
    "INITS",
    "SCHEMES",
    "BudgetPlan",
    "DataOptions",
    "Factors",
    "HealConfig",
    "HealRecord",
    "KroneckerConfig",
    "KroneckerEmbedding",
    "KroneckerGroup",
    "KroneckerLinear",
    "KronyError",
    "MatrixPlan",
    "Plan",
    "Terms",
    "calibration_windows",
    "choose_layouts",
    "compress",
    "explain",
    "form",
    "heal",
    "load",
    "load_model",
    "load_tokenizer",
    "make_budget_plan",
    "make_plan",
    "perplexity",
    "quantize",
    "save",
    "save_model",
    "slim",
    "texts",
]

register.install()
moved.install()


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        found = getattr(importlib.import_module(f"krony.{_MODULES[name]}"), name)
        globals()[name] = found
        return found
    if name in moved.MODULES:
        globals()[name] = module = moved.find(name, 2)
        return module
    if name in moved.GONE:
        raise AttributeError(moved.GONE[name])
    raise AttributeError(f"module 'krony' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
