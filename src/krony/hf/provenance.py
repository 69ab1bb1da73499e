"""How a model was made: beside the plan of a factored one, in `config.krony` of an ordinary one."""

from typing import Any

from transformers import PreTrainedModel

from krony.hf.families import blocks
from krony.hf.modeling import config_of


def provenance(model: PreTrainedModel) -> dict[str, Any] | None:
    """What is known of how a model was made, to read and to add to; None of one that nobody here
    made."""
    if (config := config_of(model)) is not None:
        return config.provenance
    found = getattr(model.config, "krony", None)
    return found if isinstance(found, dict) else None


def note_harm(model: PreTrainedModel, harm: float) -> None:
    """Note what a whole plan was predicted to cost, hidden units that it took out included, in nats
    a token. Only of factors that were fitted to the data that it was predicted on."""
    config = config_of(model)
    assert config is not None, "a factored model"
    config.provenance["predicted_harm"] = harm


def dense_blocks(model: PreTrainedModel, dense: PreTrainedModel) -> list[str] | None:
    """Names of the blocks of a dense model that end where those of a smaller one do.

    The last of those that a block of the smaller model stands for: itself, and the ones behind it
    that were taken out. None where the two don't belong together.
    """
    names = [name for name, _, _ in blocks(dense)]
    count, made = len(blocks(model)), provenance(model) or {}
    origin = made.get("blocks", list(range(count)))
    right = (
        isinstance(origin, list)
        and all(isinstance(i, int) for i in origin)
        and len(origin) == count
        and origin == sorted(set(origin))
    )
    if not right or not origin or not 0 <= origin[0] <= origin[-1] < len(names):
        return None
    if "blocks" not in made and count != len(names):
        return None
    return [names[end - 1] for end in [*origin[1:], len(names)]]
