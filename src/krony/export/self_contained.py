"""Model directories with the code that loads them, for where krony is not installed."""

import json
import shutil
from pathlib import Path

import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from krony import runtime
from krony.errors import KronyError
from krony.hf.checkpoints import save_model
from krony.hf.modeling import config_of

# What travels, as it stands in the package.
FILES = ("products.py", "layers.py", "quantized.py", "loader.py")

MODEL = '''"""{name} with factored matrices, for trust_remote_code=True. Written by krony export.

The files beside this one are copies of krony.runtime (Apache-2.0). Importing `loader` registers
what puts the factored layers in place, as config.json says.
"""

import transformers

# By name, and all of them here: transformers 4 copies the files that are imported in this form, and
# not those that they import.
from .layers import KroneckerLinear as _layers
from .loader import KroneckerQuantizer as _loader
from .products import to_dense as _products
from .quantized import quantize_weight as _quantized


class {name}(transformers.{name}):
    """The architecture's own class; its matrices are sums of Kronecker products."""

    @classmethod
    def is_custom_code(cls) -> bool:
        """No: what transformers converts for this class, by its name, is to be converted."""
        return False
'''


def self_contained(
    model: PreTrainedModel,
    destination: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Path:
    """Write a factored model with the code that loads it where krony is not installed.

    There `AutoModelForCausalLM.from_pretrained(destination, trust_remote_code=True)` gives a
    subclass of the architecture's own class in transformers, in plain torch. Its code is a copy of
    `krony.runtime`, which needs torch and transformers only (a quantized model also torchao). With
    krony imported, the directory is one like any other, kernels included.

    Raises:
        KronyError: a dense model, or a class that is not one of transformers.
    """
    if config_of(model) is None:
        raise KronyError("the model is dense, and needs no code beyond transformers")
    bases = (c for c in type(model).__mro__ if getattr(transformers, c.__name__, None) is c)
    base = next(bases, PreTrainedModel)
    if base is PreTrainedModel:
        raise KronyError(
            f"{type(model).__name__} is no class of transformers, so its code would be missing; "
            "export it with --to dense"
        )

    def write_code(folder: Path) -> None:
        for name in FILES:
            shutil.copyfile(Path(runtime.__file__).with_name(name), folder / name)
        code = MODEL.format(name=base.__name__)
        (folder / "modeling_krony.py").write_text(code, encoding="utf-8")
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config["auto_map"] = {"AutoModelForCausalLM": f"modeling_krony.{base.__name__}"}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    return save_model(model, destination, tokenizer, also=write_code)
