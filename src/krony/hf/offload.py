"""Models of which a part is elsewhere: on a disk, or nowhere yet."""

from torch import nn

from krony.errors import KronyError


def check_present(model: nn.Module, doing: str) -> None:
    """Raise `KronyError` if the model has tensors without numbers in memory.

    Hooks bring the numbers for the time of a forward; whatever reads the tensors themselves would
    find none, and compute on memory that nobody wrote.

    Args:
        doing: what is to be done, as in "fold the model".
    """
    absent = [name for name, tensor in model.named_parameters() if tensor.is_meta]
    absent += [name for name, tensor in model.named_buffers() if tensor.is_meta]
    if absent:
        offloaded = any(hasattr(module, "_hf_hook") for module in model.modules())
        where = "offloaded to a disk" if offloaded else "on the meta device, without numbers"
        raise KronyError(
            f"can't {doing}: {len(absent)} of its tensors, {absent[0]} the first, are {where}; "
            "load it without device_map, or with memory for all of it"
        )
