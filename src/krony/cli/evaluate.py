"""krony evaluate: perplexity with its protocol, and the tasks of lm-eval."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from krony import words
from krony.cli import tables
from krony.cli.options import (
    MEASURED,
    TEXT,
    Against,
    Bos,
    Device,
    JsonFile,
    RunDtype,
    Source,
    err,
    out,
    progress_bar,
)

if TYPE_CHECKING:
    import transformers
    from rich.table import Table


def evaluate_command(
    source: Source,
    against: Against = None,
    data_name: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="TEXT",
            help=f"{', '.join(words.TEXTS)}, a file, a folder, or owner/set:name:split. "
            "Default: wikitext2, unless there are tasks.",
            rich_help_panel=TEXT,
        ),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(metavar="TOKENS", help="Default: 1024, or the context.", rich_help_panel=TEXT),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(metavar="TOKENS", help="Default: the window.", rich_help_panel=TEXT),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Of lm-eval, by commas: lambada_openai,hellaswag. Needs krony\\[eval].",
            rich_help_panel=MEASURED,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(metavar="N", help="Most examples of a task.", rich_help_panel=MEASURED),
    ] = None,
    shots: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Solved examples in front of each. Default: the task's.",
            rich_help_panel=MEASURED,
        ),
    ] = None,
    dtype: RunDtype = None,
    device: Device = None,
    bos: Bos = "auto",
    json_file: JsonFile = None,
) -> None:
    """Perplexity on a text, token-weighted, with its protocol; and scores of tasks."""
    from krony.hf import checkpoints
    from krony.measure import evaluate
    from krony.measure.memory import keep_memory
    from krony.measure.perplexity import perplexity
    from krony.measure.tasks import run_tasks
    from krony.text import data

    keep_memory()
    names = [part.strip() for part in (tasks or "").split(",") if part.strip()]
    text = None if names and data_name is None else data.load_text(data_name or "wikitext2")
    results = {}
    scores: dict[str, dict[str, dict[str, Any]]] = {}
    for name in [source] if against is None else [source, against]:
        model = load_to_run(name, dtype, device)
        tokenizer = checkpoints.load_tokenizer(name)
        if text is not None:
            with progress_bar() as bar:
                task = bar.add_task(name, total=None)
                results[name] = perplexity(
                    model,
                    text,
                    tokenizer,
                    window=window,
                    stride=stride,
                    bos=bos,
                    progress=lambda i, n: bar.update(task, completed=i, total=n),  # noqa: B023
                )
        if names:
            err.print(f"krony: {name}: {', '.join(names)}", markup=False)
            scores[name] = run_tasks(model, tokenizer, names, limit=limit, shots=shots, bos=bos)
    if results:
        out.print(tables.perplexity_table(results))
    if scores:
        out.print(_scores_table(scores))
    if json_file is not None:
        record: dict[str, Any] = {"environment": evaluate.environment()}
        if results:
            record["results"] = {name: result.to_dict() for name, result in results.items()}
        if scores:
            record["tasks"] = scores
            record["limit"] = limit
        checkpoints.write_json(json_file, record)
        out.print(f"Wrote {json_file}")


def _scores_table(scores: dict[str, dict[str, dict[str, Any]]]) -> "Table":
    """A row a figure, a column a model."""
    from krony.measure.tasks import is_score

    made = tables.table("Tasks of lm-eval", "task", "figure", *scores)
    first = next(iter(scores.values()))
    for task, figures in first.items():
        for figure in figures:
            if not is_score(figure):
                continue
            values = [each[task].get(figure) for each in scores.values()]
            shown = ["-" if value is None else _figure(value) for value in values]
            made.add_row(task, figure, *shown)
        made.add_row(task, "examples", *(f"{each[task]['examples']:,}" for each in scores.values()))
    return made


def _figure(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 10 else tables.number(value)


def load_to_run(
    source: str, dtype: words.Dtype | None, device: str | None
) -> "transformers.PreTrainedModel":
    """A model on the device that was asked for, in the dtype that suits it."""
    import torch

    from krony.hf import checkpoints

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if dtype is not None:
        return checkpoints.load_model(source, checkpoints.DTYPES[dtype], device)
    # Half precision on a CPU is slow or coarse, by kernel: measure in float32 there.
    wanted = torch.float32 if device == "cpu" else None
    return checkpoints.load_model(source, wanted, device)
