"""Second moments of what flows into and back through the matrices of a model.

Memory: for each matrix (m, n) that is asked for, n² + m² numbers in float32; matrices that read the
same tensor (gate and up; q, k and v) share the first part. GPT-2 small's MLPs take 1 GB. Each sum
is over products of a few thousand tokens, themselves float32: a hundred such sums in float64
instead change no entry by more than 1e-6 of it. They are kept on the model's GPU if they leave most
of its memory free, and factors are then fitted there. `streaming` collects them block by block.
"""

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from krony.compression import together
from krony.errors import KronyError
from krony.hf.families import dense_weight, states_and_head
from krony.hf.families import rows as rows_of
from krony.hf.offload import check_present
from krony.maths import fit
from krony.measure import evaluate
from krony.text import data, docstrings, tokens

TOKENS_PER_DIMENSION, LEAST_TOKENS = 20, 2**15
WINDOW = 512  # tokens; longer ones cost more attention and say no more
SELF = "self"


GRAM_SIDE = 384  # of the blocks in which a product that is symmetric is computed
MOST_WINDOWS, MOST_TOKENS = 8, 2048  # at once: beyond, a CPU spends its time on fresh memory
LOGITS = 2**23  # most logits held at a time, 32 MB each for them, their probabilities and gradients


def add_gram(total: Tensor, x: Tensor) -> None:
    """Add xᵀ x of (T, n), products in x's own dtype, to the upper triangle of (n, n).

    What is below the triangle means nothing: `symmetric` reads the sum. Half of the products, and
    no copy of the whole in float64 on the way.
    """
    n = x.shape[1]
    for start in range(0, n, GRAM_SIDE):
        part = slice(start, start + GRAM_SIDE)
        total[part, start:] += (x[:, part].T @ x[:, start:]).to(total.device)


def symmetric(upper: Tensor) -> Tensor:
    """The symmetric matrix with this upper triangle."""
    return upper.triu() + upper.triu(1).T


def gram(x: Tensor) -> Tensor:
    """xᵀ x of (T, n) in float64: products in x's own dtype."""
    total = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
    add_gram(total, x)
    return symmetric(total)


def windows_at_once(window: int) -> int:
    """How many windows go through a model together."""
    return max(1, min(MOST_WINDOWS, MOST_TOKENS // window))


def batch_of(windows: Tensor) -> int:
    """Windows that go through a model together: as many as `windows_at_once` that divide them."""
    most = windows_at_once(windows.shape[1])
    return max(n for n in range(1, most + 1) if len(windows) % n == 0)


@dataclass
class Inputs:
    """Moments of the inputs x (n) of a matrix, summed over tokens.

    Attributes:
        total: Σ x in float64. square: Σ x xᵀ in float32, its upper triangle (`add_gram`).
    """

    total: Tensor
    square: Tensor
    tokens: int = 0

    @classmethod
    def zeros(cls, width: int, device: torch.device | str = "cpu") -> "Inputs":
        total = torch.zeros(width, dtype=torch.float64, device=device)
        return cls(total, torch.zeros(width, width, device=device))

    def add(self, x: Tensor) -> None:
        """Add a block of tokens (..., n): products in its own dtype."""
        x = x.detach().reshape(-1, x.shape[-1])
        self.total += x.sum(0, dtype=torch.float64).to(self.device)
        add_gram(self.square, x)
        self.tokens += len(x)

    def add_up(self) -> None:
        """Make the sums those of all processes."""
        together.add_up(self.total)
        together.add_up(self.square)
        self.tokens = together.total(self.tokens)

    @property
    def device(self) -> torch.device:
        """Where the sums are kept."""
        return self.total.device

    @property
    def mean(self) -> Tensor:
        """E[x], (n,)."""
        return self.total / self.tokens

    @property
    def second(self) -> Tensor:
        """E[x xᵀ], (n, n)."""
        return symmetric(self.square.double()) / self.tokens

    @property
    def covariance(self) -> Tensor:
        """Cov(x), (n, n)."""
        return self.second - torch.outer(self.mean, self.mean)

    def weighing(self, centered: bool) -> Tensor:
        """What errors are weighed by, (n, n): Cov(x) or E[x xᵀ], as far as the tokens tell."""
        second = self.second
        moments = second - torch.outer(self.mean, self.mean) if centered else second
        return fit.determined(moments, second.diagonal(), self.tokens)


@dataclass
class Moments:
    """What calibration knows of one matrix: its inputs, and the loss gradients at its outputs."""

    inputs: Inputs
    gradient_square: Tensor | None = None
    tokens: int = 0

    @property
    def gradient(self) -> Tensor | None:
        """E[g gᵀ], (m, m), or None if no gradients were collected."""
        if self.gradient_square is None:
            return None
        return symmetric(self.gradient_square.double()) / self.tokens


def calibration_windows(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    windows: int = 128,
    window: int | None = None,
    seed: int = 0,
    bos: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Token ids (windows, window) to calibrate on.

    Args:
        name: of a text, see `krony.texts`; a file, a folder or a data set of the Hub; or "self":
            text that the model samples, for which no data is needed.
        windows: how many, spread evenly over the text.
        window: tokens in each; None: 512, or the model's context if that is shorter.
        progress: called with (windows sampled, windows in all) while the model writes its own.
        bos: whether every window starts with the token that begins a text, see `tokens.bos_of`.
    Raises:
        KronyError: no windows, a text shorter than one, or no tokenizer for it.
    """
    window = window or min(WINDOW, evaluate.context_length(model))
    if windows < 1:
        raise KronyError(f"{windows} calibration windows can't be; give at least 1")
    data.check_name(name, (SELF, "python-docstrings"))
    if name == SELF:
        return sample(model, windows, window, seed, progress)
    if tokenizer is None:
        raise KronyError("the model has no tokenizer for a calibration text; use self instead")
    if name == "python-docstrings":
        documents = docstrings.python_docstrings("train", ("stdlib", "numpy"))
        text = data.Text(name, data.SEPARATOR.join(documents), name)
    else:
        text = data.load_text(name, "train")
    first = tokens.bos_of(tokenizer, bos)
    size = window - (first is not None)
    if size < 1:
        raise KronyError(f"a calibration window of {window} tokens has no room for text")
    # A long text is thinned before it is tokenized: tokens are rarely longer than ten characters.
    most = windows * size * 10
    if len(text.text) > 2 * most:
        step = len(text.text) // windows
        pieces = [text.text[i * step : i * step + size * 10] for i in range(windows)]
        encoded = [tokens.encode_text(tokenizer, piece)[:size] for piece in pieces]
        rows = [row for row in encoded if len(row) == size]
    else:
        ids = tokens.encode_text(tokenizer, text.text)
        count = min(windows, len(ids) // size)
        starts = [i * (len(ids) - size) // max(count - 1, 1) for i in range(count)]
        rows = [ids[start : start + size] for start in starts]
    if not rows:
        raise KronyError(f"the calibration text {name} is shorter than one window of {window}")
    found = torch.tensor(rows if first is None else [[first, *row] for row in rows])
    tokens.check_ids([int(found.max())], rows_of(model), tokenizer, name)
    vars(found)["text"] = text.record()  # for the provenance of what is made with it
    return found


@torch.inference_mode()
def sample(
    model: PreTrainedModel,
    windows: int,
    window: int,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Text of the model itself, (windows, window), at temperature 1, seeded.

    Drawn from the model's own distribution, the end-of-text token like any other, whatever its
    generation settings say.
    """
    torch.manual_seed(seed)
    model = full_precision(model)
    config = model.config.get_text_config()
    first = config.bos_token_id if isinstance(config.bos_token_id, int) else 0
    rows = []
    for start in range(0, windows, 16):
        begin = torch.full((min(16, windows - start), 1), first, device=model.device)
        settings = GenerationConfig(
            do_sample=True, top_k=0, max_length=window, pad_token_id=first, use_cache=True
        )
        with evaluate.plain_generation(model):
            made = model.generate(  # type: ignore[operator]
                begin, attention_mask=torch.ones_like(begin), generation_config=settings
            )
        rows.append(made.cpu())
        if progress is not None:
            progress(min(start + 16, windows), windows)
    return torch.cat(rows)


def enough(widest: int, window: int) -> int:
    """Windows that hold as many tokens as the widest matrix needs, a multiple of eight of them."""
    needed = max(LEAST_TOKENS, TOKENS_PER_DIMENSION * widest)
    return -(-needed // (8 * window)) * 8


def check_tokens(tokens: int, width: int) -> None:
    """Warn where there are fewer than 20 tokens for each input dimension."""
    if tokens < TOKENS_PER_DIMENSION * width:
        warnings.warn(
            f"{tokens} calibration tokens are few for {width} input dimensions: the factors may "
            f"fit the sample instead of the language; give at least {TOKENS_PER_DIMENSION * width}",
            stacklevel=3,
        )


def calibrate(
    model: PreTrainedModel,
    windows: Tensor,
    names: list[str],
    *,
    gradients: bool = True,
    batch: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Moments]:
    """Moments of the named linear layers over all windows, in one pass.

    The loss whose gradients are taken is that of labels sampled from the model itself, so that
    E[g gᵀ] is the Fisher information and the harm in `fit.py` estimates the KL divergence from the
    dense model; the text is used for its contexts only.

    Args:
        windows: token ids, (windows, window).
        gradients: also collect E[g gᵀ]; costs a backward pass.
        batch: windows at once.
    """
    batch = batch or windows_at_once(windows.shape[1])
    states, head = states_and_head(model)
    vocabulary = model.config.get_text_config().vocab_size
    modules = {name: model.get_submodule(name) for name in names}
    collector = Collector(modules, gradients, home_of(model, list(modules.values())))
    flags = [p.requires_grad for p in model.parameters()]
    try:
        # Only activations need gradients; the input embeddings start the graph.
        model.requires_grad_(False)
        with collector:
            for start in range(0, len(windows), batch):
                ids = windows[start : start + batch].to(model.device)
                with torch.set_grad_enabled(gradients):
                    embedded = model.get_input_embeddings()(ids).requires_grad_(gradients)
                    hidden = states(inputs_embeds=embedded.clone())  # CTRL scales it in place
                if gradients:
                    labels = labels_of(seed, start // batch)
                    backward_from_samples(hidden, head, vocabulary, labels)
                elif head in modules.values():
                    head(hidden)  # for its hook alone
                collector.settle()
                if progress is not None:
                    progress(min(start + batch, len(windows)), len(windows))
    finally:
        for parameter, flag in zip(model.parameters(), flags, strict=True):
            parameter.requires_grad_(flag)
    check_moments(collector.found, names)
    return collector.found


def check_moments(found: dict[str, Moments], names: list[str]) -> None:
    """Raise `KronyError` for a matrix that no token reached, or whose moments are no numbers."""
    for name in names:
        if name not in found or not found[name].inputs.tokens:
            raise KronyError(
                f"no token of the calibration text reached {name} (an expert that was never "
                "chosen, say); give more windows, or leave it out with --target"
            )
        moments = found[name]
        parts = (moments.inputs.total, moments.inputs.square.triu(), moments.gradient_square)
        if not all(part is None or bool(part.isfinite().all()) for part in parts):
            raise KronyError(
                f"what flows through {name} has NaN or Inf in it: the model is damaged, or "
                "overflows in its dtype; nothing can be fitted to that"
            )


class Collector:
    """Inside, every forward and backward pass adds to the moments of linear layers.

    Attributes:
        found: by name, in the order in which the layers first ran.
    """

    def __init__(self, modules: dict[str, nn.Module], gradients: bool, home: torch.device) -> None:
        self.modules, self.gradients, self.home = modules, gradients, home
        self.found: dict[str, Moments] = {}
        # By identity of the tensor, which is kept alive: ids of freed tensors are used again.
        self.shared: dict[int, tuple[Tensor, Inputs]] = {}
        self.readers: set[str] = set()  # those that add to the inputs, one of all that share them
        self.handles: list[Any] = []

    def __enter__(self) -> "Collector":
        self.handles = [
            module.register_forward_hook(partial(self._seen, name))
            for name, module in self.modules.items()
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def settle(self) -> None:
        """After the first batch it is known which layers read the same tensor."""
        self.shared.clear()

    def _seen(
        self, name: str, module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor
    ) -> None:
        (x,) = arguments
        if name not in self.found:
            if id(x) not in self.shared:
                self.shared[id(x)] = (x, Inputs.zeros(x.shape[-1], self.home))
                self.readers.add(name)
            inputs = self.shared[id(x)][1]
            width = output.shape[-1]
            square = Inputs.zeros(width, self.home).square if self.gradients else None
            self.found[name] = Moments(inputs, square)
        entry = self.found[name]
        if name in self.readers:
            entry.inputs.add(x)
        if self.gradients:
            output.register_hook(lambda g: _add_gradient(entry, g))


def home_of(model: PreTrainedModel, modules: list[nn.Module]) -> torch.device:
    """The model's GPU if the moments take less than a quarter of its free memory, else the CPU."""
    if model.device.type != "cuda":
        return torch.device("cpu")
    shapes = [dense_weight(module).shape for module in modules]
    free, _ = torch.cuda.mem_get_info(model.device)
    return (
        model.device if 16 * sum(m * m + n * n for m, n in shapes) < free else torch.device("cpu")
    )


def _add_gradient(entry: Moments, gradient: Tensor) -> None:
    flat = gradient.reshape(-1, gradient.shape[-1])
    assert entry.gradient_square is not None
    add_gram(entry.gradient_square, flat)
    entry.tokens += len(flat)


def labels_of(seed: int, batch: int) -> torch.Generator:
    """Draws the labels of one batch, whichever process has it."""
    return torch.Generator().manual_seed(seed + 1_000_003 * batch)


def backward_from_samples(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    vocabulary: int,
    generator: torch.Generator,
    read: Callable[[Tensor], None] | None = None,
) -> None:
    """The backward pass of the sum over tokens of -log p(label), labels drawn from p itself.

    Its gradient at the logits is p minus one at the label. Tokens go through the output matrix in
    pieces, so that no more than `LOGITS` logits are held.

    Args:
        hidden: last hidden states (..., D), with a graph. head: maps them to logits (..., V).
        vocabulary: V.
        read: is shown p of every piece, (tokens, V), before it is changed.
    """
    flat = hidden.detach().flatten(0, -2)
    gradient = torch.empty_like(flat)
    size = max(1, LOGITS // vocabulary)
    for start in range(0, len(flat), size):
        piece = flat[start : start + size].requires_grad_()
        with torch.enable_grad():
            logits = head(piece)
        p = logits.detach().float().softmax(-1)
        if read is not None:
            read(p)
        # By inverse distribution: one random number a token instead of one a word.
        below = p.cumsum(-1)
        point = torch.rand(len(p), 1, generator=generator).to(p.device) * below[:, -1:]
        label = torch.searchsorted(below, point, right=True).clamp(max=p.shape[-1] - 1)
        p.scatter_add_(1, label, torch.full_like(point, -1.0))
        (gradient[start : start + size],) = torch.autograd.grad(logits, piece, p.to(logits.dtype))
    hidden.backward(gradient.view_as(hidden))


def full_precision(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself in float32, or a float32 copy of one in half precision.

    Raises:
        KronyError: weights that are not in memory.
    """
    check_present(model, "calibrate on the model")
    return model if model.dtype == torch.float32 else copy.deepcopy(model).float()
