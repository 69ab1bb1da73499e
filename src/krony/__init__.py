"""Krony: smaller transformers with Kronecker products.

Importing it registers the loader: from then on `AutoModelForCausalLM.from_pretrained` reads
factored models.
"""

import logging

# Where torchao is installed, transformers imports it, and it tells everyone of GPU libraries that
# do not fit and of torch's deprecations: noise before every command.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)

from krony.compression.budget import BudgetPlan, make_budget_plan
from krony.compression.calibrate import calibration_windows
from krony.compression.factorise import INITS, compress
from krony.compression.sequential import DataOptions
from krony.errors import KronyError
from krony.export.quantize import quantize
from krony.healing.heal import HealConfig, HealRecord, heal
from krony.hf.checkpoints import load_model, load_tokenizer, save_model
from krony.hf.modeling import KroneckerConfig, form
from krony.hf.plan import MatrixPlan, Plan, make_plan
from krony.maths.schemes import SCHEMES, Factors
from krony.measure.evaluate import perplexity
from krony.nn.explain import explain
from krony.nn.layers import KroneckerEmbedding, KroneckerGroup, KroneckerLinear

__version__ = "0.1.0"

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
    "calibration_windows",
    "compress",
    "explain",
    "form",
    "heal",
    "load_model",
    "load_tokenizer",
    "make_budget_plan",
    "make_plan",
    "perplexity",
    "quantize",
    "save_model",
]
