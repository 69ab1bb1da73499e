"""Healing: continued training of a compressed model, on transformers' Trainer and accelerate."""

import json
import math
import shutil
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from accelerate import PartialState
from transformers import PreTrainedModel, PrinterCallback, TrainerState, TrainingArguments

from krony.errors import KronyError
from krony.healing import curves, losses, pace
from krony.healing.objective import Objective, borrowed, returning_loss
from krony.healing.recipe import (
    RECIPES,
    Recipe,
    Stage,
    add_adapters,
    check_factored,
    check_unquantized,
    freeze_dense,
    merge_adapters,
)
from krony.healing.reconstruct import reconstruct
from krony.healing.speed import fastest_dtype, flops_per_token
from krony.healing.training import (
    BEST,
    HealTrainer,
    Stopped,
    Watch,
    last_checkpoint,
    remove_incomplete,
)
from krony.hf.offload import check_present
from krony.hf.saving import claim, write_json
from krony.measure.memory import peak_bytes
from krony.text.blocks import Blocks

SETTINGS, CURVE, FINAL = "settings.json", "curve.json", "final"
NAMES = {"loss": "loss", "eval_loss": "held-out"}  # in transformers' log and in ours
RECONSTRUCTED = 64  # blocks that MLPs are reconstructed on
MICRO_TOKENS = {"cpu": 4096, "cuda": 32_768}  # most tokens in one forward and backward pass


@dataclass(frozen=True)
class HealConfig:
    """What to train on for how long, and how. Lengths are in tokens.

    Attributes:
        tokens: of the whole run.
        recipe: a key of `RECIPES`.
        loss: see `losses.parse`; None takes the recipe's.
        temperature: of the KL divergence.
        learning_rate: in place of the recipe's; later stages keep their proportion to it.
        batch_tokens: of an optimizer step, in place of the recipe's.
        reconstruct: steps of Adam for each MLP before the training (`reconstruct.py`).
        freeze: "dense" trains the factored layers only.
        eval_every: tokens between evaluations on held-out blocks; None: see `pace.py`.
        save_minutes: between checkpoints; `keep` is how many stay.
        dtype: of autocast: "bfloat16", "float32", or None for the faster one.
        micro_tokens: most tokens in one pass of one process; None: by device.
        log_to: a tracker that Trainer knows, "tensorboard" for example.
    """

    tokens: int
    recipe: str = "default"
    loss: str | None = None
    temperature: float = 1.0
    learning_rate: float | None = None
    batch_tokens: int | None = None
    reconstruct: int = 0
    freeze: Literal["none", "dense"] = "none"
    eval_every: int | None = None
    save_minutes: float = 10.0
    keep: int = 2
    dtype: str | None = None
    micro_tokens: int | None = None
    gradient_checkpointing: bool = False
    compile: bool = False
    log_to: str = "none"
    seed: int = 0


@dataclass
class HealRecord:
    """What happened.

    Attributes:
        sharded: the model was spread over processes, and its best weights are only in the run's
            directory.
        best: held-out loss (nats) of the best weights, which the model has at the end.
        curve: by evaluation: tokens, held-out loss, mean training loss since the one before.
        reconstruction: error of every MLP before and after, if that was asked for.
        speed: tokens_per_second, step_seconds, peak_bytes, flops_per_token, flops_per_second.
    """

    best: float
    curve: list[dict[str, float]]
    speed: dict[str, float]
    settings: dict[str, Any]
    sharded: bool
    reconstruction: dict[str, tuple[float, float]]


Report = Callable[[str, int, int], None]


def heal(
    model: PreTrainedModel,
    blocks: Blocks,
    config: HealConfig,
    *,
    run: Path,
    evaluation: Blocks,
    teacher: PreTrainedModel | None = None,
    resume: bool = False,
    progress: Report | None = None,
) -> HealRecord:
    """Train a compressed model in place; at the end it has its best weights by held-out loss.

    Under `accelerate launch` or `torchrun` it trains on all processes, as their configuration says.

    Args:
        blocks: rows of "input_ids", all of one length; see `blocks.load_blocks`.
        run: directory for checkpoints; must not exist unless `resume`.
        evaluation: held-out blocks; without `eval_every` so many of them that all evaluations take
            about a tenth of the run (`pace.py`).
        teacher: the dense model, for "kl" and "features".
        progress: called with (what, step, steps) after every step, and once more with the same
            step after an evaluation.
    Raises:
        KronyError: settings that can't be, or differ from those of the run to resume; a loss that
            became NaN; another process at work on the same run. `Stopped`: a signal came; the run
            can be resumed.
    """
    with claim(run) if PartialState().is_main_process else nullcontext():
        return _healed(model, blocks, config, run, evaluation, teacher, resume, progress)


def _healed(
    model: PreTrainedModel,
    blocks: Blocks,
    config: HealConfig,
    run: Path,
    evaluation: Blocks,
    teacher: PreTrainedModel | None,
    resume: bool,
    progress: Report | None,
) -> HealRecord:
    recipe = _recipe(model, config)
    check_unquantized(model)
    parts = losses.parse(config.loss or (recipe.taught if teacher else recipe.untaught))
    window = len(next(iter(blocks))["input_ids"])
    dtype = config.dtype or fastest_dtype(model.device)
    settings = {
        **{k: v for k, v in asdict(config).items() if k not in ("log_to", "save_minutes", "keep")},
        "loss": "+".join(parts),
        "dtype": dtype,
        "window": window,
    }
    # Whatever can't be is found before anything is written:
    for needed in filter(None, (model, teacher)):
        check_present(needed, "heal with the model")
    settings = _settled(run, settings, resume)
    dtype = settings["dtype"]
    if config.eval_every is None:
        evaluation, every = pace.evaluations(config.tokens, evaluation, window)
        config = replace(config, eval_every=every)
    objective = Objective(model, parts, teacher, config.temperature)
    stages = [s for s in recipe.stages if _steps(s, config, window) > 0] or [recipe.stages[0]]
    for stage in stages:
        _whole_batches(blocks, _batch(stage, config, window))
    if recipe.adapters or config.freeze == "dense":
        check_factored(model)
    if config.reconstruct and teacher is None:
        raise KronyError("reconstruction needs a teacher, the dense model; give one")
    _begin(run, settings)
    errors = {}
    if config.reconstruct and teacher is not None and last_checkpoint(run / "stage-0") is None:
        head = [row["input_ids"] for row in islice(blocks, RECONSTRUCTED)]
        errors = reconstruct(
            model, teacher, torch.tensor(head), config.reconstruct, progress=progress
        )
    if recipe.adapters:
        add_adapters(model, recipe.adapters)
    elif config.freeze == "dense":
        freeze_dense(model)
    curve: list[dict[str, float]] = []
    seconds, trained, done = 0.0, 0, 0
    with ExitStack() as stack:
        if objective.teacher is not None:
            precision = torch.bfloat16 if dtype == "bfloat16" else torch.float32
            stack.enter_context(borrowed(objective.teacher, model.device, precision))
        flops = flops_per_token(model, objective, window)
        stack.enter_context(returning_loss(model, objective))
        for number, stage in enumerate(stages):
            folder = run / f"stage-{number}"
            size = _batch(stage, config, window)
            steps = max(1, _steps(stage, config, window))
            trainer = _trainer(
                model,
                blocks,
                evaluation,
                replace(config, loss="+".join(parts), dtype=dtype),
                recipe,
                stage,
                folder,
                steps,
                size,
                window,
            )
            if (folder / FINAL).exists():  # this stage was over when the run was stopped
                trainer._load_from_checkpoint(str(folder / FINAL))
                curve += json.loads((folder / CURVE).read_text())
                done += steps * size * window
                continue
            watch = Watch(config.save_minutes * 60, _reporter(progress, size * window))
            trainer.add_callback(watch)
            _train(trainer, watch, folder)
            points = curves.points(trainer.state.log_history, done, size * window)
            curve += points
            done += steps * size * window
            seconds, trained = seconds + watch.seconds, trained + watch.steps * size * window
            if len(stages) > 1:
                trainer.save_model(str(folder / FINAL), _internal_call=True)
                if trainer.args.should_save:
                    write_json(folder / CURVE, points)
        best = json.loads((run / f"{BEST}.json").read_text())["loss"]
        sharded = bool(trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)
        if not sharded:
            trainer._load_from_checkpoint(str(run / BEST))
    if recipe.adapters:
        merge_adapters(model)
    model.requires_grad_(True)
    speed = {
        "tokens_per_second": round(trained / max(seconds, 1e-9), 1),
        "step_seconds": round(seconds / max(trained / (size * window), 1), 4),
        "peak_bytes": peak_bytes(model),
        "flops_per_token": flops,
        "flops_per_second": round(flops * trained / max(seconds, 1e-9)),
    }
    return HealRecord(best, curve, speed, settings, sharded, errors)


def _recipe(model: PreTrainedModel, config: HealConfig) -> Recipe:
    if config.recipe not in RECIPES:
        raise KronyError(f"no recipe {config.recipe!r}; there are {', '.join(RECIPES)}")
    if config.tokens < 1:
        raise KronyError(f"{config.tokens} tokens of training can't be; give at least one batch")
    if config.dtype not in (None, "bfloat16", "float32"):
        raise KronyError(f"no autocast to {config.dtype!r}; give bfloat16 or float32")
    for name in ("batch_tokens", "eval_every", "micro_tokens", "keep"):
        if (value := getattr(config, name)) is not None and value < 1:
            raise KronyError(f"{name} of {value} can't be; give at least 1, or leave it out")
    for name in ("learning_rate", "temperature", "save_minutes"):
        value, least = getattr(config, name), 0 if name == "save_minutes" else 1e-30
        if value is not None and not least <= value < math.inf:
            raise KronyError(f"{name} of {value} can't be; give a positive number")
    width = model.config.get_text_config().hidden_size
    recipe = RECIPES[config.recipe](width, config.tokens)
    if config.learning_rate is None:
        return recipe
    factor = config.learning_rate / recipe.stages[0].learning_rate
    stages = tuple(replace(s, learning_rate=s.learning_rate * factor) for s in recipe.stages)
    return replace(recipe, stages=stages)


def _batch(stage: Stage, config: HealConfig, window: int) -> int:
    """Blocks in an optimizer step, a multiple of the number of processes."""
    world = int(PartialState().num_processes)
    blocks = (config.batch_tokens or stage.batch_tokens) // window
    return max(1, blocks // world) * world


def _steps(stage: Stage, config: HealConfig, window: int) -> int:
    return int(config.tokens * stage.share) // (_batch(stage, config, window) * window)


def _settled(run: Path, settings: dict[str, Any], resume: bool) -> dict[str, Any]:
    """The settings, if the run is new or the one to resume had the same. Raises `KronyError`."""
    path = run / SETTINGS
    if run.exists() and not resume:
        raise KronyError(
            f"{run} has an unfinished run; continue it with --resume, or remove the directory"
        )
    if path.exists():
        before = json.loads(path.read_text())
        # The faster dtype was found by timing when the run began: it stays what it was.
        settings = {**settings, "dtype": before["dtype"]} if "dtype" in before else settings
        for key, value in settings.items():
            if before.get(key) != value:
                raise KronyError(
                    f"the run to resume had {key} = {before.get(key)}, not {value}; give the same "
                    "options, or another destination"
                )
    return settings


def _begin(run: Path, settings: dict[str, Any]) -> None:
    """Make the run's directory, and mend what a kill left in it."""
    state = PartialState()
    state.wait_for_everyone()
    if state.is_main_process:
        run.mkdir(parents=True, exist_ok=True)
        write_json(run / SETTINGS, settings)
        shutil.rmtree(run / "best.new", ignore_errors=True)
        if not (run / BEST).exists() and (run / "best.old").exists():
            (run / "best.old").rename(run / BEST)
    state.wait_for_everyone()


def _trainer(
    model: PreTrainedModel,
    blocks: Blocks,
    evaluation: Blocks,
    config: HealConfig,
    recipe: Recipe,
    stage: Stage,
    folder: Path,
    steps: int,
    size: int,
    window: int,
) -> HealTrainer:
    state = PartialState()
    device = state.device.type
    most = max(1, (config.micro_tokens or MICRO_TOKENS.get(device, 8192)) // window)
    share = size // state.num_processes
    micro = max(n for n in range(1, min(most, share) + 1) if share % n == 0)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=micro,
        per_device_eval_batch_size=most,
        gradient_accumulation_steps=share // micro,
        learning_rate=stage.learning_rate,
        lr_scheduler_type="linear" if stage.final is None else "cosine_with_min_lr",
        lr_scheduler_kwargs={} if stage.final is None else {"min_lr_rate": stage.final},
        warmup_steps=min(stage.warmup, steps // 10),
        max_grad_norm=1.0,
        bf16=config.dtype == "bfloat16",
        use_cpu=device == "cpu",
        activation_checkpointing=config.gradient_checkpointing,
        torch_compile=config.compile,
        eval_strategy="steps",
        eval_steps=max(1, (config.eval_every or config.tokens) // (size * window)),
        eval_on_start=folder.name == "stage-0",
        save_strategy="no",  # by the clock instead, see Watch
        save_total_limit=max(2, config.keep),
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=config.log_to,
        log_level="error",
        log_level_replica="error",
        # Features alone leave the head out of the loss.
        ddp_find_unused_parameters=config.loss == losses.FEATURES,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=device == "cuda",
        seed=config.seed,
        data_seed=config.seed + int(folder.name[-1]),
    )
    trainer = HealTrainer(
        model=model,
        args=arguments,
        train_dataset=_whole_batches(blocks, size),
        eval_dataset=evaluation,
        recipe=recipe,
        best=folder.parent / BEST,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _whole_batches(blocks: Blocks, size: int) -> Blocks:
    """The blocks without those that would make a smaller last batch of every epoch."""
    if not isinstance(blocks, datasets.Dataset):
        return blocks
    if len(blocks) < size:
        raise KronyError(
            f"the training text makes {len(blocks)} blocks, fewer than the {size} of one step; "
            "give more text, a smaller window or a smaller batch"
        )
    return blocks.select(range(len(blocks) // size * size))


def _train(trainer: HealTrainer, watch: Watch, folder: Path) -> None:
    if PartialState().is_main_process:
        remove_incomplete(folder)
    PartialState().wait_for_everyone()
    found = last_checkpoint(folder)
    if found is not None:
        trainer.args.eval_on_start = _owes_evaluation(found, int(trainer.args.eval_steps or 1))
    with watch.catching_signals():
        trainer.train(resume_from_checkpoint=str(found) if found else None)
    if watch.signal is not None:
        raise Stopped(
            f"stopped by signal {watch.signal} after step {trainer.state.global_step} of "
            f"{trainer.state.max_steps}; everything is in {folder.parent}, go on with --resume",
            watch.signal,
        )


def _owes_evaluation(checkpoint: Path, every: int) -> bool:
    """Whether the evaluation at this checkpoint was left out, to stop at once on a signal."""
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    due = state.global_step % every == 0 or state.global_step >= state.max_steps
    return due and not any(
        "eval_loss" in entry and entry["step"] == state.global_step for entry in state.log_history
    )


def _reporter(progress: Report | None, batch_tokens: int) -> Callable[..., None] | None:
    if progress is None:
        return None

    last: dict[str, float] = {}
    read = 0

    def report(state: TrainerState, step_seconds: float) -> None:
        nonlocal read
        # Only what is new: the history has an entry for every step.
        for entry in state.log_history[read:]:
            last.update({k: v for k, v in entry.items() if k in NAMES})
        read = len(state.log_history)
        texts = [f"{name} {last[k]:.3f}" for k, name in NAMES.items() if k in last]
        speed = f"{batch_tokens / step_seconds:,.0f} tokens/s"
        progress(", ".join([*texts, speed]), state.global_step, state.max_steps)

    return report
