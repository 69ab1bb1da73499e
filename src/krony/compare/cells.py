"""Cells of a comparison: one model by one method at one size, made, measured, healed, written.

A cell that has its file is not done again, so that the same command goes on where it stopped.
"""

from __future__ import annotations

import copy
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import krony
from krony.compare.evidence import Evidence
from krony.compare.methods import METHODS, Method
from krony.compression.plain import matrices
from krony.compression.work import Work, model_digest
from krony.errors import KronyError
from krony.healing.training import Stopped
from krony.hf import checkpoints
from krony.hf.claims import write_error
from krony.hf.modeling import config_of
from krony.hf.probes import rows
from krony.hf.strict import mapping, read_json
from krony.measure import evaluate, info
from krony.text import blocks, data, sources
from krony.text.tokens import bos_of, check_ids

HELD_OUT = 64  # blocks that choose the best weights
DENSE = "dense"
SETTINGS = "settings.json"
MIXED = ("budgets", "methods")  # settings that may differ between runs into one folder
Row = dict[str, Any]
Tell = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Settings:
    """What a comparison compares, and how.

    Attributes:
        budgets: shares of the blocks' matrices. methods: names in `METHODS`.
        calibration, windows, window: text, number and length of windows to calibrate on.
        texts: to evaluate on, as `evaluate --data` takes them; evaluated: most tokens of each.
        heal_tokens: 0: no healing. heal_data: texts to heal on.
        dtype: that models are evaluated in.
    """

    source: str
    budgets: tuple[float, ...]
    methods: tuple[str, ...]
    calibration: str
    windows: int
    window: int | None
    texts: tuple[str, ...]
    evaluated: int | None
    heal_tokens: int
    heal_data: tuple[str, ...]
    dtype: str
    bos: str
    seed: int


class Comparison:
    """The cells of one folder.

    Args:
        folder: gets cells/*.json, compare.json and, until all is done, what is shared between runs.
        tell: called with (what, number, how many).
    Raises:
        KronyError: a folder of another comparison; texts or a model that can't be had.
    """

    def __init__(self, settings: Settings, folder: Path, device: str, tell: Tell) -> None:
        self.settings, self.folder, self.tell, self.device = settings, folder, tell, device
        _check(folder, settings)
        self.base = checkpoints.load_model(settings.source, torch.float32, device)
        self.tokenizer = checkpoints.load_tokenizer(settings.source)
        self.texts: dict[str, tuple[str, data.Text, Any]] = {}
        digests = {settings.source: model_digest(self.base)}
        for name in settings.texts:
            text = data.load_text(name)
            ids = evaluate.tokenize(self.tokenizer, text, settings.bos)
            digests[name] = text.sha256
            check_ids([int(max(ids, default=0))], rows(self.base), self.tokenizer, name)
            if len(ids) < 2:
                raise KronyError(f"the text {name} has {len(ids)} tokens, too few to measure on")
            if settings.evaluated is not None and settings.evaluated < len(ids):
                ids = ids[: settings.evaluated]
                part = self.tokenizer.decode(ids, skip_special_tokens=True)
                text = replace(text, text=str(part))
            # Files of two folders may have one name.
            self.texts[name if text.name in self.texts else text.name] = (name, text, ids)
        digests |= {
            name: str(sources.digest(sources.find(name, "train")))
            for name in {settings.calibration, *settings.heal_data}
            if sources.is_local(name)
        }
        self.settings = _joined(folder, settings, digests)
        self.asked = settings

    def cells(self) -> list[tuple[Method | None, float]]:
        """(method, budget), size by size; the dense model first."""
        return _cells(self.asked)

    def others(self, done: list[Row]) -> list[Row]:
        """Rows of earlier runs into this folder, of sizes or methods that were not asked for now,
        and of this one's that it has not come to."""
        there = {(row["method"], row["budget"]) for row in done}
        found = []
        for method, budget in _cells(self.settings):
            key = (DENSE if method is None else method.name, budget)
            path = self.path(method, budget)
            if key not in there and path.exists():
                found.append(_row(path))
        return found

    def path(self, method: Method | None, budget: float) -> Path:
        """The file of a cell."""
        name = DENSE if method is None else f"{method.name}-{budget:g}"
        return self.folder / "cells" / f"{name}.json"

    def run(self) -> Iterator[tuple[Row, bool]]:
        """Every row, and whether it was there already; compare.json grows with them.

        Raises:
            Stopped: a signal came while a model was healed; the same command goes on.
        """
        found: list[Row] = []
        for method, budget in self.cells():
            path = self.path(method, budget)
            there = path.exists()
            if there:
                row = _row(path)
            else:
                row = self.measure(method, budget)
                checkpoints.write_json(path, row)
            found.append(row)
            self.write(found)
            yield row, there
        shutil.rmtree(self.folder / "work", ignore_errors=True)

    def write(self, found: list[Row]) -> None:
        """All rows in one file, those of earlier runs too."""
        record = {
            "what": "methods at equal sizes",
            "settings": asdict(self.settings),
            "seed": self.settings.seed,
            "environment": evaluate.environment(),
            "rows": found + self.others(found),
        }
        checkpoints.write_json(self.folder / "compare.json", record)

    @cached_property
    def evidence(self) -> Evidence:
        """What the methods share."""
        s = self.settings
        windows = krony.calibration_windows(
            s.calibration, self.base, self.tokenizer, s.windows, s.window, s.seed, s.bos
        )
        work = Work.of(self.base, windows, s.seed, self.folder / "work" / "shared")
        return Evidence(self.base, windows, s.seed, work, self.tell)

    def measure(self, method: Method | None, budget: float) -> Row:
        """One cell, JSON-ready: what was made, how long that took, figures before and after."""
        row: Row = {
            "method": DENSE if method is None else method.name,
            "title": "Dense" if method is None else method.title,
            "source": "" if method is None else method.source,
            "ours": method is not None and method.ours,
            "budget": budget,
            "seed": self.settings.seed,
        }
        began, used = time.perf_counter(), time.process_time()
        try:
            model = self.base if method is None else method.make(self.evidence, budget)
            row |= {
                "seconds": round(time.perf_counter() - began, 1),
                "processor_seconds": round(time.process_time() - used, 1),
                **self.size(model),
                "before": self.evaluated(model),
            }
        except Stopped:
            raise
        # An answer like any other.
        except (KronyError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
            # Without the dense model there is nothing to compare with, and what the machine could
            # not write is no method's answer.
            cause = error.__cause__
            if method is None or (cause is not None and write_error(cause) is not None):
                raise
            row["refused"] = str(error)
            return row
        finally:
            row["environment"] = evaluate.environment()
        config = config_of(model)
        if config is not None and (harm := config.provenance.get("predicted_harm")) is not None:
            row["predicted_harm"] = harm
        if method is not None and self.settings.heal_tokens:
            folder = self.folder / "work" / f"{method.name}-{budget:g}"
            healing = self.healed(model, folder)
            row |= {
                "after": self.evaluated(model),
                "curve": healing.curve,
                "healing": {**healing.settings, **healing.speed},
            }
            shutil.rmtree(folder, ignore_errors=True)
        return row

    def size(self, model: PreTrainedModel) -> Row:
        """Parameters of the whole model, and the share of the blocks' matrices that is left."""
        parameters = info.parameters(model)
        gone = info.parameters(self.base) - parameters
        return {"parameters": parameters, "share": 1 - gone / matrices(self.base)}

    def evaluated(self, model: PreTrainedModel) -> Row:
        """Perplexity on every text, and last words where it is one of passages.

        Factors are multiplied out for that: equal up to rounding, and faster on long texts.
        """
        model = copy.deepcopy(model).eval()
        if hasattr(model, "hf_quantizer"):
            model = model.dequantize()
        model = model.to(checkpoints.DTYPES[self.settings.dtype])  # type: ignore[arg-type]
        found: Row = {}
        s = self.settings
        for name, (source, text, ids) in self.texts.items():

            def progress(i: int, n: int, name: str = name) -> None:
                self.tell(f"Evaluating on {name}", i, n)

            bos = bos_of(self.tokenizer, s.bos)
            window = min(1024, evaluate.context_length(model), len(ids))
            one = evaluate.perplexity(model, ids, text, window, None, progress, bos)
            found[name] = one.to_dict()
            if source == "lambada":
                passages = data.load_passages(source)[0]
                if s.evaluated is not None:
                    passages = passages[: max(1, s.evaluated // 100)]
                word = evaluate.last_word(model, self.tokenizer, passages, name, s.bos)
                found[name]["last_word"] = asdict(word)
        return found

    def healed(self, model: PreTrainedModel, folder: Path) -> krony.HealRecord:
        """Train on towards the dense model's predictions: the same tokens, batches, loss for all.

        Not towards its hidden states: a model without some blocks has no partners for them.
        """
        s, training = self.settings, self.training
        config = krony.HealConfig(
            tokens=s.heal_tokens, loss="kl", eval_every=max(1, s.heal_tokens // 4), seed=s.seed
        )
        return krony.heal(
            model,
            training[0],
            config,
            run=folder,
            evaluation=training[1],
            teacher=copy.deepcopy(self.base),
            resume=folder.exists(),
            progress=lambda what, step, steps: self.tell(f"Healing, {what}", step, steps),
        )

    @cached_property
    def training(self) -> tuple[blocks.Blocks, blocks.Blocks]:
        """Blocks to heal on, and those that are held out."""
        s = self.settings
        window = min(1024, evaluate.context_length(self.base))
        everything = blocks.load_blocks(
            list(s.heal_data),
            self.tokenizer,
            window,
            seed=s.seed,
            bos=s.bos,
            vocabulary=rows(self.base),
        )
        training, held_out = blocks.hold_out(everything)
        return training, held_out.select(range(min(HELD_OUT, len(held_out))))


def latest(row: Row) -> Row:
    """A row's figures by text: after healing where it was healed."""
    found: Row = row["after"] if "after" in row else row["before"]
    return found


def deviation(row: Row) -> float:
    """How far a row is from its budget, of the blocks' matrices; nan for one without a model."""
    return row["share"] - row["budget"] if "share" in row else math.nan


def _cells(settings: Settings) -> list[tuple[Method | None, float]]:
    found: list[tuple[Method | None, float]] = [(None, 1.0)]
    for budget in settings.budgets:
        found += [(METHODS[name], budget) for name in settings.methods if name in METHODS]
    return found


def _row(path: Path) -> Row:
    row: Row = mapping(read_json(path), str(path))
    if not {"method", "title", "budget"} <= row.keys() or not {"before", "refused"} & row.keys():
        raise KronyError(f"{path} is no cell of a comparison; remove it, and it is made again")
    return row


def _check(folder: Path, settings: Settings) -> None:
    """Raise `KronyError` for a folder with anything but this comparison in it."""
    if not folder.exists():
        checkpoints.check_destination(folder)
        return
    if not (folder / SETTINGS).is_file():
        if not folder.is_dir() or any(folder.iterdir()):
            raise KronyError(f"{folder} exists and is no comparison; choose another folder")
        return
    before = _settings(folder)
    for field in fields(settings):
        name, value = field.name, getattr(settings, field.name)
        value = list(value) if isinstance(value, tuple) else value
        if name not in MIXED and before.get(name) != value:
            raise KronyError(
                f"{folder} has a comparison with {name} = {before.get(name)}, not {value}; give "
                "the same options, or another folder"
            )


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / SETTINGS
    return mapping(read_json(path), str(path))


def _joined(folder: Path, settings: Settings, digests: dict[str, str]) -> Settings:
    """The settings with the sizes and methods of earlier runs, written into the folder.

    Raises:
        KronyError: what is compared is no longer what it was in those runs.
    """
    before = _settings(folder) if (folder / SETTINGS).is_file() else {}
    known = before.get("digests", {})
    for name, digest in digests.items():
        if known.get(name, digest) != digest:
            raise KronyError(
                f"{name} has changed since the comparison in {folder} was begun, so that its rows "
                "can't stand beside new ones; choose another folder"
            )
    budgets = dict.fromkeys([*before.get("budgets", []), *settings.budgets])
    methods = dict.fromkeys([*before.get("methods", []), *settings.methods])
    settings = replace(settings, budgets=tuple(budgets), methods=tuple(methods))
    checkpoints.write_json(folder / SETTINGS, {**asdict(settings), "digests": digests})
    return settings
