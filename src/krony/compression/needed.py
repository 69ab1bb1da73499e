"""How many windows of text the matrices of a model need, each 20 tokens for each of its inputs."""

from collections.abc import Iterable

from transformers import PreTrainedModel

from krony.compression.calibrate import WINDOW, enough
from krony.hf.families import find_targets
from krony.hf.plan import Plan
from krony.hf.ties import is_output
from krony.measure.evaluate import context_length


def of_target(model: PreTrainedModel, target: str) -> int:
    """Windows for the matrices that a target selects; see `families.find_targets`."""
    return _windows(model, (t.shape for t in find_targets(model, target) if t.layer is not None))


def of_plan(model: PreTrainedModel, plan: Plan) -> int:
    """Windows for the matrices that a plan names."""
    inner = (m for m in plan.matrices if not m.embedding and not is_output(model, m.name))
    return _windows(model, (m.dense_shape or m.shape for m in inner))


def _windows(model: PreTrainedModel, shapes: Iterable[tuple[int, int]]) -> int:
    widest = max((max(shape) for shape in shapes), default=0)
    return enough(widest, min(WINDOW, context_length(model)))
