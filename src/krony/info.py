"""What a model consists of: per matrix its factors, in total its parameters and bytes."""

from typing import Any

from transformers import PreTrainedModel

from krony.families import find_targets
from krony.modeling import Factored, config_of
from krony.plan import Plan


def parameters(model: PreTrainedModel) -> int:
    """Parameters of the model, tied ones counted once."""
    return sum(p.numel() for p in model.parameters())


def model_bytes(model: PreTrainedModel) -> int:
    """Bytes of the parameters, tied ones counted once."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def model_info(model: PreTrainedModel) -> dict[str, Any]:
    """The figures behind `krony info`, ready for JSON.

    Returns:
        Totals, and under "matrices" one entry for each factored matrix; for a dense model, one for
        each matrix that `target="all"` would factor.
    """
    config = config_of(model)
    rows = (
        [] if config is None else _factored(model, Plan.from_dict(config.plan), config.provenance)
    )
    saved = sum(r["dense_parameters"] - r["parameters"] for r in rows)
    total = parameters(model)
    return {
        "architecture": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "parameters": total,
        "dense_parameters": total + saved,
        "bytes": model_bytes(model),
        "factored": config is not None,
        "init": config.provenance.get("init") if config else None,
        "seed": config.provenance.get("seed") if config else None,
        "matrices": rows if config is not None else _dense(model),
    }


def _factored(model: PreTrainedModel, plan: Plan, provenance: dict) -> list[dict[str, Any]]:
    measured, rows = provenance.get("matrices", {}), []
    for matrix in plan.matrices:
        layer = model.get_submodule(matrix.name)
        assert isinstance(layer, Factored)
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
                "layout": matrix.groups[0].layout,
                "scalars": matrix.scalars,
                "parameters": matrix.parameters,
                "dense_parameters": matrix.dense_parameters,
                "multiply_adds": matrix.multiply_adds,
                **measured.get(matrix.name, {"norm_kept": None, "relative_error": None}),
            }
        )
    return rows


def _dense(model: PreTrainedModel) -> list[dict[str, Any]]:
    return [
        {
            "name": t.name,
            "shape": list(t.shape),
            "role": t.role,
            "parameters": t.shape[0] * t.shape[1],
        }
        for t in find_targets(model, "all")
    ]
