"""Second moments of what flows into and back through the matrices of a model.

Memory: for each matrix (m, n) that is asked for, n² + m² numbers in float64; matrices that read the
same tensor (gate and up; q, k and v) share the first part. GPT-2 small's MLPs take 1.9 GB. They are
kept on the model's GPU if they leave most of its memory free, and factors are then fitted there.
"""

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from krony.errors import KronyError
from krony.hf.families import dense_weight, states_and_head
from krony.hf.families import rows as rows_of
from krony.maths import fit
from krony.measure import evaluate
from krony.text import data, docstrings, tokens

TOKENS_PER_DIMENSION = 20
SELF = "self"


GRAM_SIDE = 384  # of the blocks in which a product that is symmetric is computed
MOST_WINDOWS, MOST_TOKENS = 8, 2048  # at once: beyond, a CPU spends its time on fresh memory
LOGITS = 2**23  # most logits held at a time, 32 MB each for them, their probabilities and gradients


def add_gram(total: Tensor, x: Tensor) -> None:
    """Add xᵀ x of (T, n), products in x's own dtype, to the upper triangle of (n, n) in float64.

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


@dataclass
class Inputs:
    """Moments of the inputs x (n) of a matrix, summed over tokens in float64.

    Attributes:
        total: Σ x. square: Σ x xᵀ, its upper triangle (`add_gram`).
    """

    total: Tensor
    square: Tensor
    tokens: int = 0

    @classmethod
    def zeros(cls, width: int, device: torch.device | str = "cpu") -> "Inputs":
        total = torch.zeros(width, dtype=torch.float64, device=device)
        return cls(total, torch.zeros(width, width, dtype=torch.float64, device=device))

    def add(self, x: Tensor) -> None:
        """Add a block of tokens (..., n): products in its own dtype, the sum in float64."""
        x = x.detach().reshape(-1, x.shape[-1])
        self.total += x.sum(0, dtype=torch.float64).to(self.device)
        add_gram(self.square, x)
        self.tokens += len(x)

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
        return symmetric(self.square) / self.tokens

    @property
    def covariance(self) -> Tensor:
        """Cov(x), (n, n)."""
        return self.second - torch.outer(self.mean, self.mean)

    def weighing(self, centred: bool) -> Tensor:
        """What errors are weighed by, (n, n): Cov(x) or E[x xᵀ], as far as the tokens tell."""
        second = self.second
        moments = second - torch.outer(self.mean, self.mean) if centred else second
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
        return symmetric(self.gradient_square) / self.tokens


def calibration_windows(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    windows: int = 128,
    window: int | None = None,
    seed: int = 0,
    bos: str = "auto",
) -> Tensor:
    """Token ids (windows, window) to calibrate on.

    Args:
        name: any text that `evaluate --data` takes, "python-docstrings" (of the standard library
            and numpy: a part of what the packaged model was trained on), or "self": text that the
            model samples, for which no data is needed.
        windows: how many, spread evenly over the text.
        bos: whether every window starts with the token that begins a text, see `tokens.bos_of`.
    Raises:
        KronyError: no windows, a text shorter than one, or no tokenizer for it.
    """
    window = window or min(1024, evaluate.context_length(model))
    if windows < 1:
        raise KronyError(f"{windows} calibration windows can't be; give at least 1")
    if name == SELF:
        return sample(model, windows, window, seed)
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
    # A long text is thinned before it is tokenised: tokens are rarely longer than ten characters.
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
def sample(model: PreTrainedModel, windows: int, window: int, seed: int) -> Tensor:
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
    return torch.cat(rows)


def check_tokens(moments: dict[str, Moments]) -> None:
    """Warn where there are fewer than 20 tokens for each input dimension."""
    width = max(m.inputs.total.numel() for m in moments.values())
    tokens = min(m.inputs.tokens for m in moments.values())
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
    found: dict[str, Moments] = {}
    # By identity of the tensor, which is kept alive: ids of freed tensors are used again.
    shared: dict[int, tuple[Tensor, Inputs]] = {}
    readers: set[str] = set()  # those that add to the inputs, one of all that share them
    modules = {name: model.get_submodule(name) for name in names}
    home = _home(model, list(modules.values()))

    def enter(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            (x,) = arguments
            if name not in found:  # the first batch shows which matrices read the same tensor
                if id(x) not in shared:
                    shared[id(x)] = (x, Inputs.zeros(x.shape[-1], home))
                    readers.add(name)
                inputs = shared[id(x)][1]
                width = output.shape[-1]
                square = Inputs.zeros(width, home).square if gradients else None
                found[name] = Moments(inputs, square)
            entry = found[name]
            if name in readers:
                entry.inputs.add(x)
            if gradients:
                output.register_hook(lambda g: _add_gradient(entry, g))

        return hook

    handles = [module.register_forward_hook(enter(name)) for name, module in modules.items()]
    generator = torch.Generator().manual_seed(seed)
    flags = [p.requires_grad for p in model.parameters()]
    try:
        # Only activations need gradients; the input embeddings start the graph.
        model.requires_grad_(False)
        for start in range(0, len(windows), batch):
            ids = windows[start : start + batch].to(model.device)
            with torch.set_grad_enabled(gradients):
                embedded = model.get_input_embeddings()(ids).requires_grad_(gradients)
                hidden = states(inputs_embeds=embedded)
            if gradients:
                backward_from_samples(hidden, head, vocabulary, generator)
            elif head in modules.values():
                head(hidden)  # for its hook alone
            if start == 0:
                shared.clear()
            if progress is not None:
                progress(min(start + batch, len(windows)), len(windows))
    finally:
        for handle in handles:
            handle.remove()
        for parameter, flag in zip(model.parameters(), flags, strict=True):
            parameter.requires_grad_(flag)
    check_moments(found, names)
    return found


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


def _home(model: PreTrainedModel, modules: list[nn.Module]) -> torch.device:
    """The model's GPU if the moments take less than a quarter of its free memory, else the CPU."""
    if model.device.type != "cuda":
        return torch.device("cpu")
    shapes = [dense_weight(module).shape for module in modules]
    free, _ = torch.cuda.mem_get_info(model.device)
    return (
        model.device if 32 * sum(m * m + n * n for m, n in shapes) < free else torch.device("cpu")
    )


def _add_gradient(entry: Moments, gradient: Tensor) -> None:
    flat = gradient.reshape(-1, gradient.shape[-1])
    assert entry.gradient_square is not None
    add_gram(entry.gradient_square, flat)
    entry.tokens += len(flat)


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
    """The model itself in float32, or a float32 copy of one in half precision."""
    return model if model.dtype == torch.float32 else copy.deepcopy(model).float()
