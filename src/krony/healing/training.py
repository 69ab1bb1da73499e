"""The Trainer of healing: what transformers' Trainer leaves open, and nothing that it has.

Checkpoints by time that count only when they are complete, a stop on signals that can be resumed,
an end on NaN before it reaches the weights, and the best weights kept apart.
"""

import json
import math
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from krony.errors import KronyError
from krony.healing.optimizers import make_optimizer
from krony.healing.recipe import Recipe
from krony.healing.states import load_state, random_state, save_state, set_random_state
from krony.hf.claims import write_error
from krony.hf.modeling import KroneckerQuantizer
from krony.hf.patches import ends_together
from krony.hf.saving import save_weights, write_json

COMPLETE = "complete"  # the file whose presence says that a checkpoint was written to its end
BEST = "best"
OPTIMIZER, SCHEDULER, RANDOM = "optimizer", "scheduler", "random-"
CHANGED = ("use_cache",)  # of the model's configuration, by transformers' Trainer for itself
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(KronyError):  # noqa: N818  not an error: it can be resumed
    """Training was stopped by a signal, and can be resumed."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number  # as a shell reports a process that a signal ended


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Blocks of token ids as one batch (blocks, window)."""
    return {"input_ids": torch.tensor([row["input_ids"] for row in rows])}


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Inside, what the system refuses to write ends in one sentence. Raises `KronyError`."""
    try:
        yield
    except KronyError:
        raise
    except Exception as error:
        if (reason := write_error(error)) is None:
            raise
        raise KronyError(
            f"can't write into {folder}: {reason}; what was written before is still there: free "
            "some space and go on with --resume"
        ) from error


class Watch(TrainerCallback):
    """Asks for checkpoints by the clock, a last evaluation, and a stop when a signal came."""

    def __init__(self, save_seconds: float, report: Callable[..., None] | None) -> None:
        self.save_seconds, self.report = save_seconds, report
        self.signal: int | None = None
        self.saved = self.started = time.perf_counter()
        self.seconds, self.steps = 0.0, 0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        now = time.perf_counter()
        self.seconds, self.steps = self.seconds + now - self.started, self.steps + 1
        last = state.global_step >= state.max_steps
        due, number = agreed(now - self.saved >= self.save_seconds, self.signal or 0)
        if due or number:
            control.should_save, self.saved = True, now
        if number:
            self.signal, control.should_training_stop = number, True
        control.should_evaluate = (control.should_evaluate or last) and not number
        if self.report is not None and state.is_world_process_zero:
            self.report(state, self.seconds / self.steps)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        if self.report is not None and state.is_world_process_zero and self.steps:
            self.report(state, self.seconds / self.steps)

    @contextmanager
    def catching_signals(self) -> Iterator[None]:
        """The first SIGTERM or SIGINT is noted and acted on after the step; a second one kills."""

        def note(number: int, frame: FrameType | None) -> None:
            self.signal = number
            signal.signal(number, before[signal.Signals(number)])

        try:
            before = {number: signal.signal(number, note) for number in SIGNALS}
        except ValueError:  # not in the main thread: signals go elsewhere
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def agreed(due: bool, number: int) -> tuple[bool, int]:
    """The same answer on every process: true if any says so, the highest signal number."""
    if not (dist.is_available() and dist.is_initialized()):
        return due, number
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    flags = torch.tensor([int(due), number], device=device)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags[0]), int(flags[1])


class HealTrainer(Trainer):
    """transformers' Trainer for a model whose forward returns the loss (`objective.py`).

    Args:
        recipe: learning rates and weight decay by group.
        best: directory for the best weights by held-out loss; a sibling JSON file holds the loss.
    """

    # Trainer declares these optional; while training they are there.
    model: Any
    lr_scheduler: Any

    def __init__(self, *, recipe: Recipe, best: Path, **options: Any) -> None:
        config = options["model"].config
        before = {name: getattr(config, name) for name in CHANGED if hasattr(config, name)}
        super().__init__(data_collator=collate, **options)
        for name, value in before.items():  # else every model that is written would have them
            setattr(config, name, value)
        # The loss is a mean over the batch; Trainer divides it by the accumulation steps.
        self.model_accepts_loss_kwargs = False
        self.recipe, self.best = recipe, best

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            trained: Any = model or self.model
            # torch's Muon iterates in bfloat16; DeepSpeed cuts parameters to pieces without axes.
            usable = self.args.bf16 and not self.is_deepspeed_enabled
            recipe = replace(self.recipe, muon=self.recipe.muon and usable)
            self.optimizer = make_optimizer(trained, recipe, self.args.learning_rate)
        return self.optimizer

    def _prepare_for_training(self, *arguments: Any, **options: Any) -> Any:
        trainer: Any = super()
        with ends_together(self.model) if self.is_fsdp_enabled else nullcontext():
            return trainer._prepare_for_training(*arguments, **options)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *_: Any, **__: Any
    ) -> tuple[Tensor, None, None]:
        with torch.no_grad():
            return model(**self._prepare_inputs(inputs))["loss"].detach(), None, None

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        # Gradients are averaged over processes by now, so that all of them stop, or none.
        trainer: Any = super()
        norm = trainer._get_grad_norm(model, grad_norm)
        value = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        if not math.isfinite(value):
            good = last_checkpoint(Path(str(self.args.output_dir)))
            where = f"the last good checkpoint is {good}" if good else "no checkpoint was due yet"
            raise KronyError(
                f"the loss became {value} at step {self.state.global_step + 1}, before the weights "
                f"took it up; {where}; heal that one, or start again, with a lower --lr"
            )
        return norm

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with writing(Path(str(self.args.output_dir))):
            super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
            (folder / COMPLETE).touch()

    # One form of checkpoint, whole weights and states by name, however many processes wrote it:
    # a run may go on with another number of them, or with another way to share the work.

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.is_fsdp_enabled:
            self._save(output_dir, get_model_state_dict(self.model, options=WHOLE))
        else:
            super().save_model(output_dir, _internal_call)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        weights: dict[str, Any] = {}
        for path in sorted(Path(resume_from_checkpoint).glob("*.safetensors")):
            weights |= load_file(path)
        known = self.model.state_dict().keys()
        own = {name: value for name, value in weights.items() if name in known}
        set_model_state_dict(
            self.model, own, options=StateDictOptions(full_state_dict=True, strict=False)
        )

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled:  # it has files of its own
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = get_optimizer_state_dict(self.model, self._plain_optimizer(), options=WHOLE)
        if self.args.should_save:
            save_state(state, Path(output_dir) / OPTIMIZER)
            save_state(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        state = load_state(Path(checkpoint) / OPTIMIZER)
        whole = StateDictOptions(full_state_dict=True)
        set_optimizer_state_dict(self.model, self._plain_optimizer(), state, options=whole)
        self.lr_scheduler.load_state_dict(load_state(Path(checkpoint) / SCHEDULER))

    def _save_rng_state(self, output_dir: str) -> None:
        Path(output_dir).mkdir(parents=True, exist_ok=True)  # of another process than the writer
        save_state(random_state(), Path(output_dir) / f"{RANDOM}{self.args.process_index}")

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        stem = Path(checkpoint) / f"{RANDOM}{self.args.process_index}"
        if stem.with_suffix(".json").exists():  # else more processes than before
            set_random_state(load_state(stem))

    def _plain_optimizer(self) -> Any:
        return getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate wraps it

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # The model alone. Trainer would add its arguments as a pickle.
        if not self.args.should_save:
            return
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        # With a quantizer attached, transformers asks it for the weights and forgets these.
        quantizer = getattr(model, "hf_quantizer", None)
        if isinstance(quantizer, KroneckerQuantizer):
            quantizer.gathered = state_dict
        folder = Path(output_dir or str(self.args.output_dir))
        try:
            save_weights(model, folder, state_dict=state_dict)
        finally:
            if isinstance(quantizer, KroneckerQuantizer):
                quantizer.gathered = None

    def _evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        metrics = super()._evaluate(*arguments, **options)
        note = self.best.with_suffix(".json")
        before = json.loads(note.read_text())["loss"] if note.exists() else math.inf
        self.accelerator.wait_for_everyone()
        if metrics["eval_loss"] < before:
            self._save_best(note, metrics["eval_loss"])
        return metrics

    def _save_best(self, note: Path, loss: float) -> None:
        fresh, old = self.best.with_name("best.new"), self.best.with_name("best.old")
        with writing(self.best.parent):
            self.save_model(str(fresh), _internal_call=True)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            shutil.rmtree(old, ignore_errors=True)
            if self.best.exists():
                self.best.rename(old)
            fresh.rename(self.best)
            write_json(note, {"loss": loss, "step": self.state.global_step})
            shutil.rmtree(old, ignore_errors=True)
        self.accelerator.wait_for_everyone()


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint, if there is any."""
    found = [path.parent for path in folder.glob(f"checkpoint-*/{COMPLETE}")]
    return max(found, key=lambda path: int(path.name.partition("-")[2]), default=None)


def remove_incomplete(folder: Path) -> None:
    """Delete checkpoints that a kill left half-written."""
    for path in folder.glob("checkpoint-*"):
        if not (path / COMPLETE).exists():
            shutil.rmtree(path)
