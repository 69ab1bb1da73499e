"""Tasks of lm-eval (EleutherAI's harness) on a loaded model, with data from a folder when offline.

The harness needs no other model class: what `krony.load_model` gives is one of transformers'. From
the harness's own command line our directories load after `import krony` (docs/evaluation.md).
"""

import logging
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from krony.errors import KronyError, first_line
from krony.text.data import data_folder
from krony.text.tokens import bos_of

SPLITS = ("train", "validation", "test")
KINDS = {"jsonl": "json", "json": "json", "parquet": "parquet"}  # of files, and who reads them
# Where a set that krony reads itself has its own place in the folder.
PLACES = {"lambada_openai": {"test": "lambada/lambada_test.jsonl"}}


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    *,
    limit: int | None = None,
    shots: int | None = None,
    batch: int = 8,
    bos: str = "auto",
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Scores by task, as the harness reports them ("acc", "perplexity", their "_stderr", ...).

    Args:
        names: of tasks, groups or tags of lm-eval, or paths of its YAML files.
        limit: most examples of a task; None: all.
        shots: solved examples in front of each; None: as the task has it.
        batch: examples at once.
        bos: what stands in front, see `tokens.bos_of`.
        seed: of the choice of shots.
    Returns:
        By task its figures, with "examples", how many there were, and "version".
    Raises:
        KronyError: lm-eval is not installed; a task that it does not know, or whose data can't be
            had.
    """
    lm_eval = _harness()
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    known = manager.task_index
    if unknown := [n for n in names if n not in known and not Path(n).is_file()]:
        raise KronyError(
            f"lm-eval has no task {unknown[0]!r}; `lm-eval ls tasks` lists those that it has"
        )
    add_bos = {"auto": None, "always": True, "never": False}[bos]
    bos_of(tokenizer, bos)  # refuses what can't be
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = [_with_local_data(name, known, Path(folder)) for name in names]
        try:
            runner = HFLM(
                pretrained=model,
                tokenizer=tokenizer,
                batch_size=batch,
                device=str(model.device),
                add_bos_token=add_bos,
            )
            found = lm_eval.simple_evaluate(
                runner,
                tasks=given,
                num_fewshot=shots,
                limit=limit,
                bootstrap_iters=0,
                log_samples=False,
                task_manager=manager,
                random_seed=seed,
                fewshot_random_seed=seed,
            )
        except Exception as error:  # the harness and its data sets raise many kinds
            raise KronyError(
                f"lm-eval could not run {', '.join(names)}: {first_line(error)}; offline, its "
                "data goes into the folder that KRONY_DATA names, as TASK/test.jsonl or "
                "TASK/validation.jsonl"
            ) from error
    return {name: _figures(found, name) for name in found["results"]}


def is_score(figure: str) -> bool:
    """Whether a figure of a task is one to compare models by."""
    return figure not in ("sample_len", "examples", "version") and not figure.endswith("_stderr")


def _harness() -> Any:
    try:
        import lm_eval
    except ImportError as error:
        raise KronyError("tasks need lm-eval; pip install krony[eval]") from error
    for name in ("lm_eval", "lm-eval", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return lm_eval


def _with_local_data(name: str, known: Any, folder: Path) -> str:
    """The task's name, or the path of a configuration that reads its rows from local files."""
    files, entry = local_files(name), known.get(name)
    if not files or entry is None or getattr(entry, "yaml_path", None) is None:
        return name
    import yaml

    kind = KINDS[Path(next(iter(files.values()))).suffix.removeprefix(".")]
    config = {
        "include": str(entry.yaml_path),
        "task": name,
        "dataset_path": kind,
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(path) for split, path in files.items()}},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return str(path)


def local_files(name: str) -> dict[str, Path]:
    """By split, a task's files in the folder that `KRONY_DATA` names, all of one kind."""
    folder = data_folder()
    if folder is None:
        return {}
    for kind in KINDS:
        places = {split: f"{name}/{split}.{kind}" for split in SPLITS}
        if kind == "jsonl":
            places |= PLACES.get(name, {})
        found = {split: folder / place for split, place in places.items()}
        found = {split: path.absolute() for split, path in found.items() if path.is_file()}
        if found:
            return found
    return {}


def _figures(found: Any, name: str) -> dict[str, Any]:
    """Without the names of filters and of fields that are no figures."""
    figures: dict[str, Any] = {}
    for key, value in found["results"][name].items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            figures[key.removesuffix(",none")] = float(value)
    count = found.get("n-samples", {}).get(name, {})
    if "effective" in count:
        figures["examples"] = int(count["effective"])
    if name in found.get("versions", {}):
        figures["version"] = found["versions"][name]
    return figures
