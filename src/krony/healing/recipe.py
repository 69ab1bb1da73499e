"""Recipes of healing: stages, learning rates by group, and what is trained at all."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import nn
from transformers import PreTrainedModel

from krony.errors import KronyError
from krony.healing import losses
from krony.hf.modeling import narrowed_layers
from krony.nn.layers import KroneckerEmbedding, KroneckerLinear
from krony.runtime.layers import is_quantized


@dataclass(frozen=True)
class Stage:
    """A part of a run with a batch size and a schedule of its own.

    Attributes:
        share: of the run's tokens.
        batch_tokens: in an optimizer step.
        learning_rate: after the warm-up.
        final: times the learning rate, where its cosine ends; None: a line to zero instead.
        warmup: steps, but at most a tenth of the stage.
    """

    batch_tokens: int
    learning_rate: float
    final: float | None = 0.1
    warmup: int = 500
    share: float = 1.0


@dataclass(frozen=True)
class Recipe:
    """How to heal.

    Attributes:
        taught, untaught: the loss with a teacher and without one.
        factors: learning rate of the factors over that of the other weights.
        betas, decay: of AdamW (Loshchilov and Hutter 2019); vectors have no weight decay.
        muon: Muon instead of AdamW for the matrices of blocks, in runs in bfloat16 (its iterations
            are in bfloat16 whatever the run); see `optimizers.py`.
        adapters: rank of LoRA adapters on the large factors, the only thing that is trained then.
    """

    stages: tuple[Stage, ...]
    taught: str = f"{losses.KL}+{losses.FEATURES}"
    untaught: str = losses.CE
    factors: float = 1.0
    betas: tuple[float, float] = (0.9, 0.95)
    decay: float = 0.1
    muon: bool = False
    adapters: int = 0


def krony_pt(width: int, tokens: int) -> Recipe:
    """Krony-PT, section IV-A: the learning rates and batches of the paper, whatever the model."""
    return Recipe(
        stages=(
            Stage(122_880, 6e-5, 0.1, 500, share=0.75),
            Stage(327_680, 6e-6, 1.0, 0, share=0.25),
        ),
        taught=losses.CE,
    )


def default(width: int, tokens: int) -> Recipe:
    """What did best at small budgets on the packaged model (docs/results.md), its learning rate
    lowered for real ones.

    About two thousand steps of up to 122k tokens. The learning rate falls with the width up to 256,
    where it was tuned, and from there with its square: 1.5e-3 at 256, 3e-4 at 576, where in
    proportion to the width it undid more than it healed (docs/log.md), 2e-5 at 2,048. Muon's
    iterations cost what some tokens cost, in proportion to the width, so that a step has at least
    two tokens for each of it.
    """
    batch = min(max(tokens // 2000, 512, 2 * width), 122_880)
    rate = 1.5e-3 * 256 / width * min(1.0, 256 / width)
    stage = Stage(batch, rate, None, 50)
    return Recipe((stage,), betas=(0.9, 0.99), decay=0.0, muon=True)


def lora(width: int, tokens: int) -> Recipe:
    """LoRA adapters (Hu et al. 2022) on the large factors only, merged at the end."""
    recipe = default(width, tokens)
    return replace(recipe, muon=False, adapters=16)


RECIPES: dict[str, Callable[[int, int], Recipe]] = {
    "default": default,
    "krony-pt": krony_pt,
    "lora": lora,
}


def factored_layers(model: nn.Module) -> list[nn.Module]:
    """The layers whose weight is a sum of Kronecker products, or has fewer hidden units."""
    kinds, narrow = (KroneckerLinear, KroneckerEmbedding), narrowed_layers(model)
    return [m for name, m in model.named_modules() if isinstance(m, kinds) or name in narrow]


def check_unquantized(model: nn.Module) -> None:
    """Raises `KronyError` for a model with quantized weights, which have no gradients."""
    if any(is_quantized(p) for p in model.parameters()):
        raise KronyError(
            "the model is quantized, and integers can't be trained; heal it first, then quantize"
        )


def check_factored(model: nn.Module) -> None:
    """Raises `KronyError` if nothing would be left to train beside frozen dense layers."""
    if not factored_layers(model):
        raise KronyError("nothing would be trained: the model has no factored layer")


def freeze_dense(model: nn.Module) -> None:
    """Leave only the parameters of factored layers to be trained."""
    model.requires_grad_(False)
    for module in factored_layers(model):
        module.requires_grad_(True)


def add_adapters(model: PreTrainedModel, rank: int) -> None:
    """LoRA adapters on the large factors and on `narrowed_layers`; everything else is frozen.

    Raises:
        KronyError: peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise KronyError("the lora recipe needs peft; pip install krony[lora]") from error
    head = model.get_output_embeddings()  # may share its factors with the embedding
    names = [
        f"{name}.groups.{i}.large"
        for name, m in model.named_modules()
        if isinstance(m, KroneckerLinear) and m is not head
        for i in range(len(m.groups))
    ]
    names += narrowed_layers(model)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names)
    inject_adapter_in_model(config, model)


def merge_adapters(model: nn.Module) -> None:
    """Add the adapters into the large factors and remove them."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            model.set_submodule(name, module.get_base_layer())
