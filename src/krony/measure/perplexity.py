"""`krony.perplexity`: how well a model predicts a text that is named."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from krony.hf import checkpoints
from krony.measure import evaluate
from krony.measure.evaluate import Perplexity
from krony.text import data
from krony.text.tokens import bos_of


def perplexity(
    model: PreTrainedModel,
    text: str | Path | data.Text | Tensor,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    window: int | None = None,
    stride: int | None = None,
    bos: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Token-weighted perplexity of a causal language model on one long text.

    Args:
        text: its name (see `krony.texts`), a file, a folder or a data set of the Hub, as `krony
            evaluate --data` takes them; or token ids, (T,).
        tokenizer: for a text; default: the one that lies where the model came from.
        window: tokens that the model sees at once; default 1024, or its context if that is shorter.
        stride: tokens from one window to the next; default: the window.
        bos: whether every window of a text starts with the token that begins a text: "auto", as the
            tokenizer has it, "always" or "never". Token ids are taken as they are.
        progress: called with (windows done, windows in all).
    Raises:
        KronyError: a text that can't be read, a model whose tokenizer is not known, and what
            `evaluate.perplexity` raises.
    Source: Krony-PT, section IV-B, whose code takes disjoint windows of 1,024 tokens.
    """
    if isinstance(text, Tensor):
        return evaluate.perplexity(model, text, None, window, stride, progress)
    read = text if isinstance(text, data.Text) else data.load_text(str(text))
    if tokenizer is None:
        tokenizer = checkpoints.tokenizer_of(model)
    ids = evaluate.tokenize(tokenizer, read, bos)
    first = bos_of(tokenizer, bos)
    return evaluate.perplexity(model, ids, read, window, stride, progress, first)
