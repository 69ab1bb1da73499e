"""The "data" initialization: factors of least harm on real inputs, block after block.

Each matrix is fitted to what it is for: given the inputs x̃ that it will really get, from a model
whose earlier matrices are compressed already, come as close as possible to the outputs y of the
dense model, weighed by what the loss makes of them (fit.py). With K = Cov(y, x̃) and C = Cov(x̃) the
best unconstrained matrix is K C⁻¹, and the harm of a factored one is counted from there; the bias
then removes the mean error exactly. Where a plan takes hidden units out, they are gone before the
first fit, and a matrix without factors becomes K C⁻¹ itself.
"""

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from krony.compression import calibrate, together
from krony.compression.calibrate import Inputs
from krony.compression.width import Narrowed
from krony.compression.work import Tensors, Work
from krony.errors import KronyError
from krony.hf import replay
from krony.hf.families import blocks, dense_weight
from krony.hf.modeling import dense_layer
from krony.hf.plan import MatrixPlan, Plan
from krony.hf.replay import BlockStream
from krony.maths import fit
from krony.maths.kron import sum_to_dense
from krony.nn.layers import KroneckerLinear


@dataclass(frozen=True)
class DataOptions:
    """The ingredients; all of them on is the default, each can be switched off to measure it.

    Attributes:
        sequential: fit to the inputs of the compressed model, not of the dense one.
        bias: correct the bias for the mean error (where the layer has one).
        centered: weigh inputs by their covariance, not by their second moment about zero.
        gradients: weigh outputs by the loss gradients.
        residual: a matrix that writes to the residual stream also makes up for the error that the
            stream carries already, as far as its inputs tell; needs `sequential`.
    """

    sequential: bool = True
    bias: bool = True
    centered: bool = True
    gradients: bool = True
    residual: bool = True


@dataclass(frozen=True)
class Fitted:
    """Factors of one matrix: (outer, inner) a group, its new bias, and the harm in nats a token.

    Without a group `weight` is the matrix itself, (m, n).
    """

    pairs: list[tuple[Tensor, Tensor]]
    bias: Tensor | None
    harm: float
    weight: Tensor | None = None


@dataclass
class Pairing:
    """Moments of the inputs x̃ in the compressed model with the outputs y of the dense one."""

    inputs: Inputs
    cross: Tensor
    mean_out: Tensor

    @classmethod
    def zeros(cls, m: int, inputs: Inputs) -> "Pairing":
        where: dict[str, Any] = {"dtype": torch.float64, "device": inputs.device}
        cross = torch.zeros(m, inputs.total.numel(), **where)
        return cls(inputs, cross, torch.zeros(m, **where))

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add a block of tokens; the inputs, which matrices may share, are added by the caller."""
        x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        self.cross += (y.T @ x).double().to(self.inputs.device)
        self.mean_out += y.sum(0, dtype=torch.float64).to(self.inputs.device)

    def add_up(self) -> None:
        """Make all sums, those of the inputs too, those of all processes."""
        self.inputs.add_up()
        together.add_up(self.cross)
        together.add_up(self.mean_out)


def fit_matrix(
    matrix: MatrixPlan,
    weight: Tensor,
    bias: Tensor | None,
    inputs: Inputs,
    gradient: Tensor | None,
    options: DataOptions,
    pairing: Pairing | None = None,
) -> Fitted:
    """Factors and bias of least harm for one matrix.

    Args:
        weight: (m, n), float64.
        gradient: E[g gᵀ], (m, m), or None to weigh all outputs alike.
        pairing: moments with the dense outputs; None fits to the weight itself.
    """
    correct = options.bias and bias is not None
    # Without a bias to absorb the mean, the mean error is an error like any other.
    centered = options.centered and correct
    metric = fit.Metric.of(inputs.weighing(centered), gradient, weight.shape[0])
    wanted = weight if pairing is None else _wanted(weight, bias, pairing, centered, metric.inputs)
    pairs: list[fit.Pair] = []
    harm, dense = 0.0, wanted
    if matrix.groups:
        pairs, history = fit.groups(wanted, metric, matrix.groups)
        harm, dense = history[-1], sum_to_dense(pairs)
    if bias is not None and correct:
        goal = weight @ inputs.mean + bias
        if pairing is not None:
            goal = pairing.mean_out / inputs.tokens
        bias = goal - dense @ inputs.mean
    return Fitted(pairs, bias, harm, None if matrix.groups else wanted)


def _wanted(
    weight: Tensor, bias: Tensor | None, pairing: Pairing, centered: bool, metric: Tensor
) -> Tensor:
    """The matrix (m, n) that comes closest to the outputs: K C⁻¹, from the dense weight, so that
    where the sample says nothing, nothing changes."""
    inputs = pairing.inputs
    cross = pairing.cross / inputs.tokens
    if bias is not None:  # y holds the dense bias; the weight alone explains the rest
        cross = cross - torch.outer(bias, inputs.mean)
    if centered:
        mean = pairing.mean_out / inputs.tokens
        if bias is not None:
            mean = mean - bias
        cross = cross - torch.outer(mean, inputs.mean)
    moments = inputs.covariance if centered else inputs.second
    rest = cross - weight @ moments
    return weight + torch.cholesky_solve(rest.T, torch.linalg.cholesky(metric)).T


def refit(weight: Tensor, bias: Tensor | None, pairing: Pairing) -> tuple[Tensor, Tensor | None]:
    """The matrix (m, n) and the bias that come closest to the outputs of a pairing.

    Args:
        weight, bias: where to begin, float64.
    """
    inputs, centered = pairing.inputs, bias is not None
    metric = fit.ridged(inputs.weighing(centered), fit.INPUT_RIDGE)
    made = _wanted(weight, bias, pairing, centered, metric)
    if bias is not None:
        bias = pairing.mean_out / inputs.tokens - made @ inputs.mean
    return made, bias


def fit_plan(
    model: PreTrainedModel,
    plan: Plan,
    windows: Tensor,
    narrow: Narrowed,
    install: Callable[[nn.Module, MatrixPlan, Fitted], nn.Module],
    options: DataOptions,
    progress: Callable[[str, int, int], None] | None = None,
    embedded: PreTrainedModel | None = None,
    work: Work | None = None,
) -> dict[str, tuple[nn.Module, Fitted]]:
    """Fit every matrix of the plan, in the order of the forward pass. The model is not changed.

    Args:
        windows: token ids (windows, window) that the inputs are taken from.
        narrow: the model without the hidden units that the plan takes out, which is fitted to the
            whole one, with the moments of every planned matrix (`width.narrowed`).
        install: makes the factored layer from the dense one, the plan and the fit.
        progress: called with (name, number from 1, how many).
        embedded: the model with its embedding factored already, whose hidden states to start from.
        work: where fitted blocks are kept.
    Returns:
        The factored layer and its fit, by name.
    Raises:
        KronyError: a matrix outside of the model's blocks.
    """
    done: dict[str, tuple[nn.Module, Fitted]] = {}
    planned = {matrix.name: matrix for matrix in plan.matrices}
    start, moments, rows = narrow.model, narrow.moments, narrow.rows

    def put(name: str, layer: nn.Module, fitted: Fitted) -> nn.Module:
        made = install(layer, planned[name], fitted)
        done[name] = (made, fitted)
        if progress is not None:
            progress(name, len(done), len(planned))
        return made

    def solve(name: str, layer: nn.Module, pairing: Pairing | None) -> nn.Module:
        entry, matrix = moments[name], planned[name]
        home = entry.inputs.device
        bias = None if layer.bias is None else layer.bias.detach().double().to(home)  # type: ignore[operator]
        fitted = fit_matrix(
            matrix,
            dense_weight(layer).detach().double().to(home),
            bias,
            entry.inputs if pairing is None else pairing.inputs,
            entry.gradient if options.gradients else None,
            options,
            pairing,
        )
        return put(name, layer, fitted)

    if not options.sequential:
        for name in planned:
            solve(name, start.get_submodule(name), None)
        return done

    named = blocks(model)
    inside = [n for n in planned if any(n.startswith(block + ".") for block, _, _ in named)]
    outside = sorted(set(planned) - set(inside))
    if outside:
        raise KronyError(
            f"{outside[0]} is outside of the model's blocks, where inputs can't be followed; "
            "leave it out, or use another --init"
        )
    last = max(
        i for i, (block, _, _) in enumerate(named) if any(n.startswith(block + ".") for n in inside)
    )
    work = work or Work()
    depends = plan.to_dict(), asdict(options)
    batch = calibrate.batch_of(windows)
    windows = together.share(windows, batch)
    stream = BlockStream(model, [module for _, _, module in named], windows, batch)
    dense_hidden, hidden = stream.hidden, list(stream.hidden)
    if embedded is not None:
        hidden = BlockStream(embedded, [blocks(embedded)[0][2]], windows, batch).hidden
    with torch.no_grad(), replay.fast_products(model):
        for index, (block_name, _, dense) in enumerate(named[: last + 1]):
            current = copy.deepcopy(start.get_submodule(block_name))
            prefix = block_name + "."
            mine = [n.removeprefix(prefix) for n in inside if n.startswith(prefix)]
            after: list[Tensor] = []  # outputs of the dense block: the next one's inputs
            kept = work.get("fitted", block_name, *depends) if mine else None
            for name, fitted in _unpack(kept or {}).items():
                made = put(prefix + name, start.get_submodule(prefix + name), fitted)
                current.set_submodule(name, _folded(made, planned[prefix + name]))
            for stage in _stages(stream, index, dense, dense_hidden[0], [] if kept else mine):
                lift = options.residual and writes_the_stream(
                    stream, index, current, hidden[0], stage
                )
                home = moments[prefix + stage[0]].inputs.device
                pairings = _pair(
                    stream, index, dense, current, dense_hidden, hidden, after, stage, lift, home,
                    {n: rows[prefix + n] for n in stage if prefix + n in rows},
                )  # fmt: skip
                for name, pairing in pairings.items():
                    made = solve(prefix + name, start.get_submodule(prefix + name), pairing)
                    current.set_submodule(name, _folded(made, planned[prefix + name]))
            if mine and kept is None:
                fits = {name: done[prefix + name][1] for name in mine}
                work.put(_pack(fits), "fitted", block_name, *depends)
            if index < last:
                dense_hidden = after or [stream.run(index, dense, h) for h in dense_hidden]
                hidden = [stream.run(index, current, h) for h in hidden]
    return done


def _folded(layer: nn.Module, matrix: MatrixPlan) -> nn.Module:
    """Factors as the dense matrix: for hundreds of windows many terms take longer."""
    return dense_layer(layer, matrix.conv1d) if isinstance(layer, KroneckerLinear) else layer


def _pack(fits: dict[str, Fitted]) -> Tensors:
    found: Tensors = {}
    for name, fitted in fits.items():
        found[f"{name} harm"] = torch.tensor(fitted.harm, dtype=torch.float64)
        if fitted.bias is not None:
            found[f"{name} bias"] = fitted.bias
        if fitted.weight is not None:
            found[f"{name} weight"] = fitted.weight
        for number, (outer, inner) in enumerate(fitted.pairs):
            found |= {f"{name} outer {number}": outer, f"{name} inner {number}": inner}
    return found


def _unpack(kept: Tensors) -> dict[str, Fitted]:
    found = {}
    for name in dict.fromkeys(key.split(" ")[0] for key in kept):
        count = sum(key.startswith(f"{name} outer ") for key in kept)
        pairs = [(kept[f"{name} outer {i}"], kept[f"{name} inner {i}"]) for i in range(count)]
        bias, weight = kept.get(f"{name} bias"), kept.get(f"{name} weight")
        found[name] = Fitted(pairs, bias, float(kept[f"{name} harm"]), weight)
    return found


def _stages(
    stream: BlockStream, index: int, block: nn.Module, hidden: Tensor, names: list[str]
) -> list[list[str]]:
    """Names in the order of the forward pass, those that read one tensor together."""
    with replay.captured({n: block.get_submodule(n) for n in names}, outputs=False) as seen:
        stream.run(index, block, hidden)
    stages: dict[int, list[str]] = {}
    for name, x in seen.items():
        stages.setdefault(x.data_ptr(), []).append(name)
    return list(stages.values())


def writes_the_stream(
    stream: BlockStream, index: int, block: nn.Module, hidden: Tensor, stage: list[str]
) -> bool:
    """Whether the block's output is that of the stage's one matrix plus what does not depend on it.

    Found by running the block without it: true of the last matrix of an MLP between residual
    connections, and in parallel blocks of attention's too.
    """
    if len(stage) > 1:
        return False
    module = {stage[0]: block.get_submodule(stage[0])}
    with replay.captured(module, outputs=True) as seen:
        full = stream.run(index, block, hidden)
    written = seen[stage[0]]
    if written.shape != full.shape:
        return False
    with replay.silent(module[stage[0]]):
        rest = stream.run(index, block, hidden)
    return replay.alike(full - rest, written)


def _pair(
    stream: BlockStream,
    index: int,
    dense: nn.Module,
    work: nn.Module,
    dense_hidden: list[Tensor],
    hidden: list[Tensor],
    after: list[Tensor],
    stage: list[str],
    lift: bool,
    home: torch.device,
    rows: dict[str, Tensor],
) -> dict[str, Pairing]:
    """Moments of the stage's inputs in `work` with its outputs in `dense`, over all batches.

    With `lift`, for one matrix that writes to the residual stream, not with its outputs in `dense`
    but with those that would make the block's output that of `dense`. No forward goes further than
    it must; the first one through `dense` does, and leaves the block's outputs in `after`. Of a
    matrix that writes fewer hidden units now, only the `rows` that stayed count.
    """
    originals = {name: dense.get_submodule(name) for name in stage}
    followed = {stage[0]: work.get_submodule(stage[0])}  # all of a stage read the same tensor
    found: dict[str, Pairing] = {}
    outputs: dict[str, Tensor] = {}
    first = not after
    for number, (here, there) in enumerate(zip(dense_hidden, hidden, strict=True)):
        if first or not lift:
            with replay.captured(originals, outputs=True, stop=not first) as outputs:
                after.append(stream.run(index, dense, here))
        with (
            replay.captured(followed, outputs=True) as current,
            replay.captured(followed, outputs=False, stop=not lift) as inputs,
        ):
            now = stream.run(index, work, there)
            if lift:
                outputs = {stage[0]: current[stage[0]] + (after[number] - now)}
        x = inputs[stage[0]]
        shared = next(iter(found.values())).inputs if found else Inputs.zeros(x.shape[-1], home)
        shared.add(x)
        for name, y in outputs.items():
            if name in rows:
                y = y[..., rows[name]]
            if name not in found:
                found[name] = Pairing.zeros(y.shape[-1], shared)
            found[name].add(x, y)
    if found:
        next(iter(found.values())).inputs.add_up()  # which all of them share
    for pairing in found.values():
        together.add_up(pairing.cross)
        together.add_up(pairing.mean_out)
    return found
