"""What is tied to what: the one account that loading, plans, compressing, saving and healing ask.

transformers keeps three: the configuration (`tie_word_embeddings`), names in the model
(`all_tied_weights_keys`), and the parameters themselves. Where they disagree, the parameters are
right: a file may bring an output matrix of its own under a configuration that says tied.
"""

from typing import Any

from torch import nn
from transformers import PreTrainedModel


def share(first: nn.Module | None, second: nn.Module | None) -> bool:
    """Whether two modules hold parameters in common: a weight, or factors."""
    if first is None or second is None:
        return False
    mine = {id(parameter) for parameter in first.parameters()}
    return any(id(parameter) in mine for parameter in second.parameters())


def output_is_tied(model: PreTrainedModel) -> bool:
    """Whether the output matrix is the input embedding."""
    return share(model.get_input_embeddings(), model.get_output_embeddings())


def is_output(model: PreTrainedModel, name: str) -> bool:
    """Whether the module of that name is the output matrix too."""
    return share(dict(model.named_modules()).get(name), model.get_output_embeddings())


def settle(model: PreTrainedModel) -> bool:
    """Let the model's names and its configuration say of the output matrix what its parameters are,
    so that it is saved and loaded as it is.

    Returns:
        Whether they said something else.
    """
    if model.get_output_embeddings() is None:
        return False
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    if any(p.is_meta for end in ends if end is not None for p in end.parameters()):
        return False  # offloaded: what is one in the file is not one in memory
    tied = output_is_tied(model)
    names: dict[str, str] = model.all_tied_weights_keys
    true = {target: source for target, source in names.items() if _is_one(model, target, source)}
    configs = [model.config, model.config.get_text_config()]
    wrong = [c for c in configs if getattr(c, "tie_word_embeddings", tied) is not tied]
    for config in wrong:
        config.tie_word_embeddings = tied
    if tied and not true:  # tied by hand
        true = model.get_expanded_tied_weights_keys(all_submodels=True)
    changed = bool(wrong) or true != names
    model.all_tied_weights_keys = true
    return changed


def _is_one(model: PreTrainedModel, target: str, source: str) -> bool:
    try:
        first: Any = model.get_parameter(target)
        return first is model.get_parameter(source)
    except AttributeError:
        return False
