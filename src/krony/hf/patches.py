"""What krony changes in transformers beyond what loading needs (see the end of runtime/loader.py).

Each entry says why, and what would make it unnecessary; written for transformers 5.0 to 5.24.
"""

from typing import Any

from transformers import PreTrainedModel

from krony.errors import KronyError


def refuse_resizing(model: PreTrainedModel) -> None:
    """Tokens can't be added to a factored embedding, or taken away.

    transformers refuses that too, for a class that is no `nn.Embedding`, but gives no way out.
    Unnecessary once the error can be raised by the module.
    """
    model.resize_token_embeddings = _refuse  # type: ignore[assignment, method-assign]


def allow_resizing(model: PreTrainedModel) -> None:
    """The inverse of `refuse_resizing`: what the model's class says."""
    vars(model).pop("resize_token_embeddings", None)


def _refuse(*_: Any, **__: Any) -> None:
    raise KronyError(
        "the embedding is factored, so tokens can't be added or taken away; fold the model to "
        "dense first (krony export --to dense), resize that, and compress it again"
    )


def forget_code(model: PreTrainedModel) -> None:
    """A model of a self-contained directory that transformers' own class loaded is saved without
    the code in it, which belongs to the class there.

    `save_pretrained` would write an `auto_map` that names files it does not write. Unnecessary once
    it drops the `auto_map` of a class that is not in it.
    """
    if not model.is_remote_code() and "modeling_krony" in str(
        getattr(model.config, "auto_map", "")
    ):
        del model.config.auto_map
