"""What `krony plan` and `krony compress` share: the text, the plan for a budget or for shapes."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from krony.cli import tables
from krony.cli.options import err, out, progress_bar
from krony.errors import KronyError

CURVE = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2)  # shares of the targets

if TYPE_CHECKING:
    import torch
    import transformers

    from krony.compression.budget import BudgetPlan
    from krony.compression.factorise import Known
    from krony.compression.work import Work
    from krony.hf.plan import Plan


def check_any(*ways: Any) -> None:
    """Raise `KronyError` if nothing says how small."""
    if not any(ways):
        raise KronyError(
            "say how small: --size 60% of the whole model, or --budget, --flops, --scheme, "
            "--shape, --small, --plan"
        )


def check_one_way(
    plan_file: Path | None, budget: dict[str, Any], shaped: str | None, detailed: Any
) -> None:
    """Raise `KronyError` for two ways to say how small, or details that a budget finds."""
    if (plan_file is not None) + bool(budget) + bool(shaped) > 1:
        raise KronyError(
            "give a plan, a budget, or a scheme, shape or small shape, not two of them"
        )
    if budget and detailed:
        raise KronyError("a budget finds its own terms and layers; leave those options out")


def check_budget(model: "transformers.PreTrainedModel", budget: dict[str, Any]) -> None:
    """Raise `KronyError` for a budget that can't be: before a text is read, which takes minutes."""
    from krony.compression import limits
    from krony.hf.families import find_targets
    from krony.measure import info

    asked = {key: value for key, value in budget.items() if key not in ("target", "sums")}
    limits.limits(find_targets(model, budget["target"]), info.parameters(model), **asked)


def calibration_text(
    model: "transformers.PreTrainedModel",
    tokenizer: "transformers.PreTrainedTokenizerBase | None",
    calibration: str,
    windows: int,
    seed: int,
    bos: str,
    folder: Path | None = None,
) -> "torch.Tensor":
    """Calibration text; what the model takes long to write itself is kept in the work folder."""
    import torch

    from krony.compression import calibrate
    from krony.compression.work import Work

    def make() -> "torch.Tensor":
        with reporting("Writing a text") as told:
            return calibrate.calibration_windows(
                calibration,
                model,
                tokenizer,
                windows,
                seed=seed,
                bos=bos,
                progress=partial(told, "Writing a text"),
            )

    if folder is None or calibration != calibrate.SELF:
        return make()
    work = Work.of(model, torch.empty(0), seed, folder)
    return work.once(lambda: {"ids": make()}, "text", windows)["ids"]


def minutes(seconds: float) -> str:
    """Seconds as "4.2 minutes", or as "12 seconds"."""
    return f"{seconds / 60:.1f} minutes" if seconds >= 60 else f"{seconds:.0f} seconds"


def show_curve(
    model: "transformers.PreTrainedModel",
    tokens: "torch.Tensor",
    target: str,
    objective: str,
    sums: bool,
    seed: int,
    memory: str | None,
    json_file: Path | None,
    work: "Work",
) -> None:
    """Plan ten sizes from one calibration, and print them."""
    from krony.compression.budget import curve_row, make_curve
    from krony.hf import checkpoints
    from krony.measure.memory import parse_bytes

    with reporting("Planning") as told:
        found = make_curve(
            model,
            tokens,
            CURVE,
            target=target,
            objective=objective,
            sums=sums,
            seed=seed,
            progress=told,
            work=work,
            memory=parse_bytes(memory),
        )
    rows = [curve_row(model, point) for point in found]
    out.print(tables.curve_table(rows))
    if json_file is not None:
        checkpoints.write_json(json_file, rows)
        out.print(f"Wrote {json_file}")


def harm(found: "BudgetPlan") -> str:
    """What a plan is predicted to cost, in a sentence."""
    return f"Predicted harm of this plan: {found.harm:.4f} nats a token."


def shaped(
    model: "transformers.PreTrainedModel",
    scheme: str | None,
    shape: str | None,
    small: str | None,
    terms: int,
    scalars: bool,
    layers: str | None,
    target: str | None,
    layout: Any,
) -> "Plan":
    """The plan of one shape for all matrices."""
    from krony.hf.plan import make_plan, parse_layers, parse_shape

    return make_plan(
        model,
        scheme=scheme,
        shape=parse_shape(shape, "--shape"),
        small=parse_shape(small, "--small"),
        terms=terms,
        scalars=scalars,
        layers=parse_layers(layers),
        target=target or "mlp",
        layout=layout or "small-outer",
    )


@dataclass
class Job:
    """A dense model and what its factors are found with, shown while they are.

    Attributes:
        tokens: of the text, (windows, window); None: the factors are found by weights, in the
            layout that the plan says.
        memory: the most to hold, as written on the command line.
    """

    model: "transformers.PreTrainedModel"
    tokens: "torch.Tensor | None"
    init: str
    seed: int
    work: "Work"
    memory: str | None

    def within_budget(self, budget: dict[str, Any]) -> "BudgetPlan":
        """The plan of least harm, after saying how long finding it will take."""
        from krony.compression.budget import make_budget_plan
        from krony.compression.forecast import forecast
        from krony.hf.families import find_targets
        from krony.measure.memory import parse_bytes, peak_bytes

        model, tokens = self.model, self.tokens
        assert tokens is not None
        most, started = parse_bytes(self.memory), time.monotonic()
        targets = find_targets(model, budget["target"])
        expected = forecast(model, tokens, targets, most)
        longer = ", several times as long where sums could win" if budget["sums"] else ""
        err.print(
            f"{tokens.numel():,} tokens of calibration: about {minutes(expected.seconds)} and "
            f"{expected.bytes / 1e9:.1f} GB in all{longer}"
        )
        with reporting("Planning") as told:
            found = make_budget_plan(
                model,
                tokens,
                **budget,
                seed=self.seed,
                progress=told,
                work=self.work,
                memory=most,
            )
        err.print(
            f"Planned in {minutes(time.monotonic() - started)}, "
            f"{peak_bytes(model) / 1e9:.1f} GB at most"
        )
        return found

    def factored(
        self, plan: "Plan", found: "BudgetPlan | None", free: bool
    ) -> "tuple[transformers.PreTrainedModel, Plan]":
        """The model with its factors, and the plan that they follow.

        Args:
            free: small factors may stand on either side; the better one is taken, and said.
        """
        from krony.compression import layout
        from krony.compression.factorise import DATA, compress
        from krony.hf.provenance import note_harm
        from krony.measure.memory import parse_bytes

        moments = None if found is None else found.moments
        if free and found is None and self.tokens is not None:
            if self.init != DATA:
                return self._in_better_layout(plan, self.tokens)
            if layout.two_sided(self.model, plan):
                plan, moments = self._by_less_harm(plan, self.tokens)
        with reporting("Factoring") as told:
            compress(
                self.model,
                plan,
                init=self.init,
                seed=self.seed,
                calibration=self.tokens,
                moments=moments,
                progress=told,
                work=self.work,
                memory=parse_bytes(self.memory),
            )
        if found is not None and self.init == DATA:
            note_harm(self.model, found.harm)
        return self.model, plan

    def _by_less_harm(
        self, plan: "Plan", tokens: "torch.Tensor"
    ) -> "tuple[Plan, Mapping[str, Known]]":
        """Matrix by matrix, by the harm of factors that are fitted to data for a while."""
        from krony.compression import layout
        from krony.compression.factorise import moments_of
        from krony.measure.memory import parse_bytes

        most = parse_bytes(self.memory)
        with reporting("Calibrating") as told:
            moments = moments_of(
                self.model,
                plan,
                tokens,
                seed=self.seed,
                work=self.work,
                memory=most,
                progress=partial(told, "Calibrating"),
            )
        with reporting("Comparing layouts") as told:
            plan = layout.choose_layouts(self.model, plan, moments, told)
        turned = [m for m in plan.matrices if layout.has_two_sides(m)]
        counts = Counter(m.groups[0].layout for m in turned)
        said = ", ".join(f"{name} in {count}" for name, count in counts.most_common())
        out.print(f"Layout of less harm: {said} matrices (--layout takes one for all)")
        return plan, moments

    def _in_better_layout(
        self, plan: "Plan", tokens: "torch.Tensor"
    ) -> "tuple[transformers.PreTrainedModel, Plan]":
        """The same for all matrices, by the loss of the model that it makes."""
        from krony.compression.layout import compress_in_better_layout

        with reporting("Factoring") as told:
            made, plan, losses = compress_in_better_layout(
                self.model, plan, tokens, init=self.init, seed=self.seed, progress=told
            )
        ordered = sorted(losses.items(), key=lambda each: each[1])
        said = ", ".join(f"{name} {loss:.3f}" for name, loss in ordered)
        out.print(f"Layout of less loss: {said} nats a token (--layout takes one unmeasured)")
        return made, plan


@contextmanager
def reporting(stage: str) -> Iterator[Callable[[str, int, int], None]]:
    """A bar for (what, steps done, steps in all)."""
    with progress_bar() as bar:
        task = bar.add_task(stage, total=None)
        yield lambda what, i, n: bar.update(task, description=what, completed=i, total=n)
