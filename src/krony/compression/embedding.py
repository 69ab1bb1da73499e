"""The embedding as a target: what an error in its rows does to the loss, and factors that do least.

Rows are tokens, V of them: the output side of the metric of fit.py, V by V, is taken by its
diagonal. To second order an error Δ (V, D) costs, in nats a token,

    looked up:      ½ Σ_v f_v Δ_v G Δ_vᵀ    f_v how often the token is read, G (D, D) the second
                                            moment of the loss gradients at the embedding
    as the output:  ½ Σ_v q_v Δ_v C Δ_vᵀ    q_v = E[p_v (1 - p_v)], the diagonal of the Fisher
                                            information of the logits; C (D, D) the second moment
                                            of the last hidden states

and a tied embedding the sum of both. The frequency is the mean probability that the model gives to
a token, f_v = E[p_v]: a count over the text would be zero for what the text happens to lack.

With the same rows and one (D, D) matrix for both uses the low rank of least harm is a weighted SVD,
by way of a D by D eigenproblem, so nothing of side V is decomposed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedModel

from krony.compression.calibrate import backward_from_samples, gram, windows_at_once
from krony.compression.work import Tensors, Work
from krony.hf.families import Target, states_and_head
from krony.hf.replay import captured
from krony.maths import fit, kron
from krony.maths.schemes import Factors

SHARES = 32  # ranks that are priced, evenly spaced


@dataclass(frozen=True)
class Use:
    """One use of the matrix: weights of the tokens (V,), and the metric of the columns (D, D)."""

    rows: Tensor
    columns: Tensor


@dataclass(frozen=True)
class RowMetric:
    """The quadratic form of all uses of one matrix, float64; applied like `fit.Metric`."""

    uses: tuple[Use, ...]

    def apply(self, delta: Tensor) -> Tensor:
        """Half the gradient of twice the harm, (V, D)."""
        parts = [use.rows[:, None] * (delta @ use.columns) for use in self.uses]
        return torch.stack(parts).sum(0)

    def harm(self, delta: Tensor) -> float:
        """Nats a token."""
        return 0.5 * float((self.apply(delta) * delta).sum())

    def rest(self, delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """The harm of Δ and its gradient, as `fit.refine` asks for them; no group is projected."""
        assert rank == 0
        image = self.apply(delta)
        return 0.5 * (image * delta).sum(), image

    @property
    def powers(self) -> tuple[float, float]:
        """The powers of four that rows and columns are about as large as."""
        rows = torch.stack([use.rows.abs().max() for use in self.uses])
        columns = torch.stack([use.columns.abs().max() for use in self.uses])
        return fit.power(rows), fit.power(columns)

    def to(self, dtype: torch.dtype, rows: float = 1.0, columns: float = 1.0) -> "RowMetric":
        """The same in another precision, rows and columns times a number each."""
        made = ((rows * u.rows, columns * u.columns) for u in self.uses)
        return RowMetric(tuple(Use(r.to(dtype), c.to(dtype)) for r, c in made))

    @cached_property
    def nearest(self) -> Use:
        """One use in the place of all: mean weights of rows, columns by the shares of the uses."""
        rows = torch.stack([use.rows for use in self.uses]).mean(0)
        columns = [use.rows.sum() * use.columns for use in self.uses]
        return Use(rows, torch.stack(columns).sum(0) / rows.sum())


@dataclass(frozen=True)
class WeightedSVD:
    """W ≈ left[:, :R] right[:R], whitened by the rows' weights and the columns' metric."""

    left: Tensor
    right: Tensor

    @classmethod
    def of(cls, weight: Tensor, metric: RowMetric) -> "WeightedSVD":
        """From (V, D), float64; the signs are fixed, so equal input gives equal output."""
        use = metric.nearest
        root = fit.root(use.columns)
        whitened = weight @ root
        gram = whitened.T @ (use.rows[:, None] * whitened)
        vectors = torch.linalg.eigh(gram).eigenvectors.flip(1)
        pivot = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
        vectors = vectors * torch.where(pivot < 0, -1.0, 1.0)
        return cls(whitened @ vectors, torch.linalg.solve(root.T, vectors).T)

    def harms(self, metric: RowMetric) -> Tensor:
        """Harm of every rank from 0 to D, exact for all uses together: (D + 1,)."""
        total = torch.zeros_like(self.right)
        for use in metric.uses:
            inner = self.left.T @ (use.rows[:, None] * self.left)
            total += inner * (self.right @ use.columns @ self.right.T)
        # What rank R leaves is the sum over the terms beyond R, both of a pair.
        left = total.flip(0, 1).cumsum(0).cumsum(1).diagonal().flip(0)
        return 0.5 * torch.cat([left, left.new_zeros(1)]).clamp(min=0)

    def pair(self, rank: int) -> fit.Pair:
        """(1, V) columns and rows of rank R as low-rank terms: (R, V, 1) and (R, 1, D)."""
        return fit.balanced(self.left[:, :rank].T[:, :, None], self.right[:rank, None, :])


def calibrate(
    model: PreTrainedModel,
    windows: Tensor,
    targets: list[Target],
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, RowMetric]:
    """The metric of the embedding and of an untied output matrix, in one pass.

    Memory: D² numbers for each.

    Args:
        windows: token ids, (windows, window).
        targets: of role "embedding" or "head".
    """
    head, batch = model.get_output_embeddings(), windows_at_once(windows.shape[1])
    width, tokens = head.weight.shape[1], 0
    read = torch.zeros(head.weight.shape[0], dtype=torch.float64)
    written = torch.zeros_like(read)
    hidden = torch.zeros(width, width, dtype=torch.float64)
    gradients: Tensor | None = None
    generator = torch.Generator().manual_seed(seed)
    states, to_logits = states_and_head(model)

    def count(chances: Tensor) -> None:
        read.add_(chances.sum(0, dtype=torch.float64).cpu())
        written.add_((chances - chances.square()).sum(0, dtype=torch.float64).cpu())

    flags = [p.requires_grad for p in model.parameters()]
    try:
        model.requires_grad_(False)
        for start in range(0, len(windows), batch):
            ids = windows[start : start + batch].to(model.device)
            embedded = model.get_input_embeddings()(ids).requires_grad_()
            with captured({"head": head}, outputs=False) as seen:
                last = states(inputs_embeds=embedded.clone())  # CTRL scales it in place
            backward_from_samples(last, to_logits, head.weight.shape[0], generator, count)
            assert embedded.grad is not None
            hidden += _square(seen.get("head", last.detach()))
            square = _square(embedded.grad)
            gradients = square if gradients is None else gradients + square
            tokens += ids.numel()
            if progress is not None:
                progress(min(start + batch, len(windows)), len(windows))
    finally:
        for parameter, flag in zip(model.parameters(), flags, strict=True):
            parameter.requires_grad_(flag)
    assert gradients is not None
    # Gradients are taken behind the scale that some models give to their rows.
    scale = next((t.scale for t in targets if t.role == "embedding"), 1.0)
    gradients *= scale**2 / tokens
    lookup = Use(read / tokens, fit.ridged(gradients, fit.GRADIENT_RIDGE))
    output = Use(written / tokens, fit.ridged(hidden / tokens, fit.INPUT_RIDGE))
    uses = {"head": (output,), "embedding": (lookup,)}
    return {t.name: RowMetric((lookup, output) if t.tied else uses[t.role]) for t in targets}


def once(
    model: PreTrainedModel,
    windows: Tensor,
    targets: list[Target],
    work: Work,
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, RowMetric]:
    """`calibrate`, or what an earlier run of it left in `work`."""

    def make() -> Tensors:
        found = calibrate(model, windows, targets, seed=seed, progress=progress)
        return {
            f"{part} {number} {name}": tensor
            for name, metric in found.items()
            for number, use in enumerate(metric.uses)
            for part, tensor in (("rows", use.rows), ("columns", use.columns))
        }

    kept = work.once(make, "ends", [t.name for t in targets])
    return {
        t.name: RowMetric(
            tuple(
                Use(kept[f"rows {number} {t.name}"], kept[f"columns {number} {t.name}"])
                for number in range(2 if t.tied else 1)
            )
        )
        for t in targets
    }


def _square(x: Tensor) -> Tensor:
    return gram(x.reshape(-1, x.shape[-1]))


def factors(
    weight: Tensor, metric: RowMetric, shapes: tuple[Factors, ...]
) -> tuple[list[fit.Pair], float]:
    """(outer, inner) for each group, float64, and their harm in nats a token.

    One low-rank group has its closed form; anything else is refined from Van Loan.
    """
    if len(shapes) == 1 and fit.is_low_rank(shapes[0]):
        large, small = WeightedSVD.of(weight, metric).pair(shapes[0].terms)
        pair = kron.in_order(large, small, shapes[0].layout)
        return [pair], metric.harm(weight - kron.to_dense(*pair))
    rest, start = weight, []
    for shape in shapes:
        start.append(kron.van_loan(rest, *shape.sides, shape.terms))
        rest = rest - kron.to_dense(*start[-1])
    pairs, history = fit.refine(weight, metric, start)  # type: ignore[arg-type]
    return pairs, history[-1]


def candidates(target: Target, weight: Tensor, metric: RowMetric) -> list[tuple[Factors, float]]:
    """Low rank at many ranks, each with its harm in nats a token."""
    v, d = target.shape
    harms = WeightedSVD.of(weight, metric).harms(metric)
    # In interpolative form factors of every rank below D are smaller than the matrix.
    ranks = sorted({(d - 1) * i // SHARES for i in range(1, SHARES + 1)} - {0})
    shapes = [Factors((v, 1), (1, d), rank, interpolative=True) for rank in ranks]
    return [(shape, float(harms[shape.terms])) for shape in shapes]
