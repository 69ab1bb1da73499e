"""Perplexity, with its protocol written down."""

import math
import re
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from krony.errors import KronyError
from krony.hf import families
from krony.hf.provenance import provenance
from krony.text import tokens as tokens_of
from krony.text.data import Text

# Bytes of float32 logits held at a time: on a CPU larger buffers are slower (fresh pages), on a GPU
# smaller batches are.
LOGIT_BYTES = {"cpu": 16 * 2**20, "cuda": 2 * 2**30}


@dataclass(frozen=True)
class Perplexity:
    """One measurement.

    Attributes:
        protocol: "krony-pt" for disjoint windows (stride = window; the first token of each window
            is not predicted, as in the paper's evaluation), "sliding" for overlapping ones (every
            token but the first is predicted once, with at least window - stride of context).
        perplexity: exp of the mean loss over all predicted tokens.
        chunk_mean: exp of the unweighted mean over windows of the mean loss, the figure in the
            paper's tables; only under "krony-pt".
        nats: mean loss in nats a token.
        tokens: length of the text, without BOS.
        predicted: tokens that were predicted.
        seen: "calibration" or "healing", if the model was made on this very text.
        words, bytes: of the text, words between white space as lm-eval counts them. Tokens that no
            window predicts count with the mean loss of the others.
    """

    data: str
    origin: str
    protocol: str
    window: int
    stride: int
    tokens: int
    predicted: int
    windows: int
    nats: float
    perplexity: float
    chunk_mean: float | None
    dtype: str
    seconds: float
    seen: str | None = None
    words: int | None = None
    bytes: int | None = None

    @property
    def word_perplexity(self) -> float | None:
        """exp of the nats a word: what models with unlike tokenizers can be compared by."""
        return _exp(self.nats * self.tokens / self.words) if self.words else None

    @property
    def bits_per_byte(self) -> float | None:
        """Bits of loss a byte of UTF-8."""
        return self.nats * self.tokens / self.bytes / math.log(2) if self.bytes else None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        derived = {"word_perplexity": self.word_perplexity, "bits_per_byte": self.bits_per_byte}
        return {**asdict(self), **derived}


def tokenize(tokenizer: PreTrainedTokenizerBase, text: Text, bos: str = "auto") -> Tensor:
    """The token ids of the whole text, (T,); in front BOS, where `tokens.bos_of` has one."""
    first = tokens_of.bos_of(tokenizer, bos)
    ids = tokens_of.encode_text(tokenizer, text.text)
    return torch.tensor(ids if first is None else [first, *ids], dtype=torch.long)


def context_length(model: PreTrainedModel) -> int:
    """The longest window the model was made for, 1024 where it does not say."""
    config = model.config.get_text_config()
    for name in ("max_position_embeddings", "max_seq_len", "seq_length", "context_length"):
        found = getattr(config, name, None)
        if isinstance(found, int) and found > 0:
            return found
    return 1024


def windows(
    tokens: int, window: int, stride: int, behind: int = 1
) -> Iterator[tuple[int, int, int]]:
    """(begin, first predicted token, end) of each window; every token is predicted once at most.

    The first `behind` tokens of a window have nothing to be predicted from; none behind BOS.
    """
    previous = 0
    for begin in range(0, max(tokens, 1), stride):
        end = min(begin + window, tokens)
        first = max(previous, begin + behind)
        if end > first:
            yield begin, first, end
        previous = end
        if end == tokens:
            return


@torch.inference_mode()
def perplexity(
    model: PreTrainedModel,
    ids: Tensor,
    text: Text | None = None,
    window: int | None = None,
    stride: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    bos: int | None = None,
) -> Perplexity:
    """Token-weighted perplexity of a causal language model on one long text.

    Args:
        ids: token ids of the text, (T,).
        text: for the record, to say whether the model was made or healed on it, and for the
            figures by word and byte.
        window: tokens the model sees at once; default 1024, or its context if that is shorter.
        stride: tokens from one window to the next; default: the window.
        progress: called with (windows done, windows in all).
        bos: the token that every window starts with, within its length; None: no such token. One in
            front of `ids` is taken for it.
    Raises:
        KronyError: an encoder, a token beyond the embedding, a window below 2 or beyond the
            model's context, a stride outside 1 to window, a text shorter than one window, or a loss
            that is not finite.
    Source: Krony-PT, section IV-B, whose code takes disjoint windows of 1,024 tokens.
    """
    longest = context_length(model)
    window = min(1024, longest) if window is None else window
    stride = window if stride is None else stride
    if not 2 <= window <= longest:
        raise KronyError(f"a window of {window} tokens can't be: the model takes 2 to {longest}")
    if not 1 <= stride <= window:
        raise KronyError(
            f"a stride of {stride} tokens can't be: it goes from 1 to the window, {window}"
        )
    if bos is not None:
        ids = ids[1:] if len(ids) and int(ids[0]) == bos else ids
        window, stride = window - 1, max(1, stride - (stride == window))
    if len(ids) < window:
        raise KronyError(
            f"the text has {len(ids)} tokens, fewer than one window of {window}; give a longer "
            "text or a smaller --window"
        )
    name = text.name if text else "the text"
    tokens_of.check_ids([int(ids.max())], families.rows(model), None, name)
    families.check_causal(model)
    behind = int(bos is None)
    spans = list(windows(len(ids), window, stride, behind))
    batch = max(1, _tokens_at_once(model) // window)
    started, sums, counts = time.perf_counter(), [], []
    for start in range(0, len(spans), batch):
        part = spans[start : start + batch]
        for length in sorted({end - begin for begin, _, end in part}, reverse=True):
            same = [span for span in part if span[2] - span[0] == length]
            for loss, span in zip(_losses(model, ids, same, bos), same, strict=True):
                kept = loss[span[1] - span[0] - behind :]
                sums.append(float(kept.double().sum()))
                counts.append(len(kept))
        if progress is not None:
            progress(start + len(part), len(spans))
    total, predicted = math.fsum(sums), sum(counts)
    nats = total / predicted
    if not math.isfinite(nats):
        raise KronyError(
            f"the loss is {nats}: the model overflows in {model.dtype}, or its weights are "
            "damaged; try --dtype float32"
        )
    disjoint = stride == window
    seen = _seen(model, text)
    means = [s / c for s, c in zip(sums, counts, strict=True)]
    return Perplexity(
        data=text.name if text else "tokens",
        origin=text.origin if text else "",
        protocol=("krony-pt" if disjoint else "sliding") + ("" if bos is None else " with BOS"),
        window=window + (bos is not None),
        stride=stride,
        tokens=len(ids),
        predicted=predicted,
        windows=len(spans),
        nats=nats,
        perplexity=_exp(nats),
        chunk_mean=_exp(math.fsum(means) / len(means)) if disjoint else None,
        dtype=str(model.dtype).removeprefix("torch."),
        seconds=time.perf_counter() - started,
        seen=seen,
        words=len(re.split(r"\s+", text.text)) if text else None,
        bytes=len(text.text.encode()) if text else None,
    )


def _seen(model: PreTrainedModel, text: Text | None) -> str | None:
    """What the model was made on, if it was this text; also said in a warning."""
    if text is None:
        return None
    for record in (provenance(model) or {}).get("texts", []):
        same = bool(text.sha256) and record.get("sha256") == text.sha256
        if same or record.get("origin") == text.origin:
            use = str(record.get("use"))
            warnings.warn(
                f"{text.name} is the text of the {use} of this model: what is measured on it says "
                "little about other texts",
                stacklevel=3,
            )
            return use
    return None


def _tokens_at_once(model: PreTrainedModel) -> int:
    room = LOGIT_BYTES.get(model.device.type, LOGIT_BYTES["cpu"])
    return room // (4 * int(model.config.get_text_config().vocab_size))


def _exp(nats: float) -> float:
    # A ruined model can lose more nats a token than a float's exponent holds.
    return math.exp(nats) if nats < 700 else math.inf


def _losses(
    model: PreTrainedModel, ids: Tensor, spans: list[tuple[int, int, int]], bos: int | None
) -> Tensor:
    """Loss of every token after the first in windows of one length: (windows, length - 1), or
    (windows, length) behind BOS."""
    rows = torch.stack([ids[begin:end] for begin, _, end in spans])
    if bos is not None:
        rows = F.pad(rows, (1, 0), value=bos)
    rows = rows.to(model.device)
    logits = model(input_ids=rows, use_cache=False).logits.float()
    # The last position has no label; a slice of the logits would copy all of them.
    labels = F.pad(rows[:, 1:], (0, 1), value=-100)
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return losses.view(rows.shape)[:, :-1]


@dataclass(frozen=True)
class LastWord:
    """How well the last word of passages is predicted from the rest, as LAMBADA asks it.

    Attributes:
        accuracy: share of passages of whose last word every token was the likeliest.
        perplexity: exp of the mean over passages of the summed loss of that word's tokens.
        nats: that mean.
    """

    data: str
    passages: int
    accuracy: float
    perplexity: float
    nats: float


@torch.inference_mode()
def last_word(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    passages: Sequence[str],
    name: str,
    bos: str = "auto",
) -> LastWord:
    """Accuracy and perplexity of the last word of every passage, given the rest of the passage.

    A passage is cut at its last space; what does not fit into the context is cut off in front.

    Args:
        name: of the passages, for the record only.
        bos: what stands in front, see `tokens.bos_of`.
    Raises:
        KronyError: no passages, or one of a single word.
    Source: Paperno et al. 2016; the cut is that of OpenAI's version of the test set.
    """
    pairs = [passage.strip().rpartition(" ") for passage in passages]
    if not pairs or not all(context for context, _, _ in pairs):
        raise KronyError(f"{name} has no passages, or one of a single word; give whole passages")
    families.check_causal(model)
    contexts, words = (
        tokens_of.encode(tokenizer, part)
        for part in ([c for c, _, _ in pairs], [f" {w}" for _, _, w in pairs])
    )
    first = tokens_of.bos_of(tokenizer, bos)
    front = [] if first is None else [first]
    longest = context_length(model) - len(front)
    rows = [front + (c + w)[-longest:] for c, w in zip(contexts, words, strict=True)]
    tokens_of.check_ids((max(row) for row in rows), families.rows(model), tokenizer, name)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    room, sums, right, start = _tokens_at_once(model), list[float](), 0, 0
    while start < len(order):
        stop = start + 1  # sorted by length, so that the next one would be the longest
        while stop < len(order) and len(rows[order[stop]]) * (stop + 1 - start) <= room:
            stop += 1
        batch = order[start:stop]
        width = max(len(rows[i]) for i in batch)
        # Padded behind: what comes later changes nothing in a causal model.
        ids = torch.tensor([rows[i] + [0] * (width - len(rows[i])) for i in batch])
        logits = model(input_ids=ids.to(model.device), use_cache=False).logits
        for row, i in enumerate(batch):
            end, count = len(rows[i]), len(words[i])
            wanted = ids[row, end - count : end].to(logits.device)
            made = logits[row, end - count - 1 : end - 1].float()
            sums.append(float(F.cross_entropy(made, wanted, reduction="sum")))
            right += bool((made.argmax(-1) == wanted).all())
        start = stop
    nats = math.fsum(sums) / len(sums)
    return LastWord(name, len(sums), right / len(sums), _exp(nats), nats)


@contextmanager
def plain_generation(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model's generation settings, valid or not, play no part."""
    before = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = before


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int = 40,
    temperature: float = 0.0,
    seed: int = 0,
) -> str:
    """The prompt and what the model makes of it; the likeliest tokens at temperature 0.

    Raises:
        KronyError: a prompt without a token, a length below 1 or beyond the context, a negative
            temperature.
    """
    ids = tokenizer(prompt, return_tensors="pt", verbose=False)["input_ids"].to(model.device)
    room = context_length(model) - ids.shape[1]
    if ids.shape[1] == 0:
        raise KronyError("the prompt is empty; give at least one word")
    tokens_of.check_ids(ids[0].tolist(), families.rows(model), tokenizer, "the prompt")
    if not 1 <= max_new_tokens <= room:
        raise KronyError(
            f"{max_new_tokens} new tokens can't be: after a prompt of {ids.shape[1]} tokens the "
            f"model's context leaves 1 to {room}"
        )
    if not 0 <= temperature < math.inf:
        raise KronyError(f"a temperature of {temperature} can't be; 0 takes the likeliest token")
    sampling: dict[str, Any] = (
        {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    )
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=model.generation_config.eos_token_id,
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
        **sampling,
    )
    torch.manual_seed(seed)
    with plain_generation(model):
        made = model.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), generation_config=settings
        )
    return str(tokenizer.decode(made[0], skip_special_tokens=True))


def environment() -> dict[str, str]:
    """Versions and hardware, to stand beside every figure."""
    import platform
    from datetime import date

    import transformers

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpu": f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        "gpu": gpu,
    }
