"""What a model consists of: per matrix its factors, in total its parameters and bytes."""

from typing import Any

from transformers import PreTrainedModel

from krony.hf.families import find_targets
from krony.hf.modeling import config_of, quantized_of
from krony.hf.plan import Plan
from krony.maths.kron import Shape
from krony.nn.packing import Quantized, stored_bytes


def parameters(model: PreTrainedModel) -> int:
    """Parameters of the model, tied ones counted once."""
    return sum(p.numel() for p in model.parameters())


def model_bytes(model: PreTrainedModel) -> int:
    """Bytes of the parameters as they are stored, tied ones counted once."""
    quantized = quantized_of(model)
    to = None if quantized is None else quantized.to
    return sum(stored_bytes(p, to) for p in model.parameters())


def model_info(model: PreTrainedModel) -> dict[str, Any]:
    """The figures behind `krony info`, ready for JSON.

    Returns:
        Totals, and under "matrices" one entry for each factored matrix; for a dense model, one for
        each matrix that `target="all"` would factor, or that is quantized.
    """
    config = config_of(model)
    plan = Plan(()) if config is None else Plan.from_dict(config.plan)
    quantized = quantized_of(model)
    rows = [] if config is None else _factored(plan, config.provenance)
    saved = sum(matrix.saved for matrix in plan.matrices)
    total = parameters(model)
    return {
        "architecture": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "parameters": total,
        "dense_parameters": total + saved,
        "bytes": model_bytes(model),
        "factored": bool(rows),
        "quantized": quantized and quantized.to,
        "init": config.provenance.get("init") if config else None,
        "seed": config.provenance.get("seed") if config else None,
        "matrices": rows or _dense(model, quantized),
    }


def _factored(plan: Plan, provenance: dict[str, Any]) -> list[dict[str, Any]]:
    measured, rows = provenance.get("matrices", {}), []
    for matrix in plan.matrices:
        rows.append(
            {
                "name": matrix.name,
                "shape": list(matrix.shape),
                "factors": [
                    {
                        "terms": g.terms,
                        "large": list(g.large),
                        "small": list(g.small),
                        "interpolative": g.interpolative,
                    }
                    for g in matrix.groups
                ],
                "dense_shape": list(matrix.dense_shape or matrix.shape),
                "layout": matrix.groups[0].layout if matrix.groups else None,
                "scalars": matrix.scalars,
                "parameters": matrix.parameters,
                "dense_parameters": matrix.dense_parameters,
                "multiply_adds": matrix.multiply_adds,
                **measured.get(matrix.name, {"norm_kept": None, "relative_error": None}),
            }
        )
    return rows


def _dense(model: PreTrainedModel, quantized: Quantized | None) -> list[dict[str, Any]]:
    packed = [] if quantized is None else quantized.matrices
    found: list[tuple[str, Shape, str]] = []
    found += [(t.name, t.shape, t.role) for t in find_targets(model, "all")]
    found += [(p.name, p.shape, quantized.to) for p in packed if quantized is not None]
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    return [
        {"name": name, "shape": list(shape), "role": role, "parameters": shape[0] * shape[1]}
        for name, shape, role in sorted(found, key=lambda row: order[row[0]])
    ]
