"""What krony changes in transformers beyond what loading needs (see the end of runtime/loader.py).

Each entry says why, and what would make it unnecessary; written for transformers 5.0 to 5.24.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from krony.errors import KronyError
from krony.hf.ties import output_is_tied
from krony.nn.layers import KroneckerEmbedding


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


@contextmanager
def ends_together(model: PreTrainedModel) -> Iterator[None]:
    """Inside, accelerate does not find the ends of a model whose tied embedding is factored.

    Under FSDP2 it shards embedding and output matrix in one group if `a.weight is b.weight`, else
    apart, and torch refuses parameters that are in two groups. Our W is formed at each access, so
    that it never is. Not found, both are in the group of the model itself. Unnecessary once
    accelerate compares parameters.
    """
    embedding = model.get_input_embeddings()
    if not isinstance(embedding, KroneckerEmbedding) or not output_is_tied(model):
        yield
        return
    hidden = ("get_input_embeddings", "get_output_embeddings")
    for name in hidden:
        vars(model)[name] = lambda: None
    try:
        yield
    finally:
        for name in hidden:
            vars(model).pop(name, None)
