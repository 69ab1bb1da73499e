"""krony compare: every method on one model at equal sizes."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from krony import words
from krony.cli import kept, tables
from krony.cli.options import (
    MEASURED,
    OUTPUT,
    TEXT,
    Bos,
    Device,
    RunDtype,
    Source,
    err,
    out,
    progress_bar,
)
from krony.cli.shapes import Seed
from krony.errors import KronyError
from krony.words import parse_count

if TYPE_CHECKING:
    from rich.table import Table

    from krony.compare.cells import Row


def compare_command(
    source: Source,
    destination: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            metavar="FOLDER",
            help="For a file a cell, the table and the picture; one that is there goes on.",
            rich_help_panel=OUTPUT,
        ),
    ],
    budgets: Annotated[
        list[float],
        typer.Option(
            "--budget",
            metavar="SHARE",
            help="Of the blocks' matrices that stay. May be repeated.",
            rich_help_panel=MEASURED,
        ),
    ],
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--methods",
            metavar="NAMES",
            help="Of the registry, by commas. Default: all.",
            rich_help_panel=MEASURED,
        ),
    ] = None,
    calibration: Annotated[
        str,
        typer.Option(
            metavar="TEXT",
            help="The same windows for all methods; or self.",
            rich_help_panel=TEXT,
        ),
    ] = words.SELF,
    windows: Annotated[
        int, typer.Option(metavar="N", help="Of calibration text.", rich_help_panel=TEXT)
    ] = 128,
    window: Annotated[
        int | None,
        typer.Option(
            metavar="TOKENS",
            help="In a calibration window. Default: 512, or the context.",
            rich_help_panel=TEXT,
        ),
    ] = None,
    texts: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            metavar="TEXT",
            help="To measure on. May be repeated. Default: wikitext2-raw.",
            rich_help_panel=TEXT,
        ),
    ] = None,
    evaluated: Annotated[
        str | None,
        typer.Option(
            metavar="COUNT",
            help="Most tokens of each text, a passage for every 100. Default: all.",
            rich_help_panel=TEXT,
        ),
    ] = None,
    heal_tokens: Annotated[
        str | None,
        typer.Option(
            metavar="COUNT",
            help="Train every model on for so many tokens: 1M.",
            rich_help_panel=MEASURED,
        ),
    ] = None,
    heal_data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="To train on. May be repeated. Default: the calibration text.",
            rich_help_panel=TEXT,
        ),
    ] = None,
    dtype: RunDtype = None,
    device: Device = None,
    bos: Bos = "auto",
    seed: Seed = 0,
) -> None:
    """Make one model smaller by every method, at equal sizes, and measure all of them alike.

    A cell is one method at one size; it is written when it is done, and not done again.
    """
    import torch

    from krony.compare import picture
    from krony.compare.cells import Comparison, Settings
    from krony.compare.methods import chosen
    from krony.hf.claims import claim
    from krony.measure.memory import keep_memory

    keep_memory()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    bad = next((budget for budget in budgets if not 0 < budget < 1), None)
    if bad is not None:
        raise KronyError(f"--budget {bad} can't be: it is a share between 0 and 1")
    tokens = parse_count(heal_tokens, "--heal-tokens") or 0
    if tokens and not heal_data and calibration == words.SELF:
        raise KronyError("--heal-tokens needs a text to train on; give one with --heal-data")
    settings = Settings(
        source=source,
        budgets=tuple(dict.fromkeys(budgets)),
        methods=tuple(method.name for method in chosen(methods or ["all"])),
        calibration=calibration,
        windows=windows,
        window=window,
        texts=tuple(dict.fromkeys(texts or ["wikitext2-raw"])),
        evaluated=parse_count(evaluated, "--evaluated"),
        heal_tokens=tokens,
        heal_data=tuple(heal_data or [calibration]) if tokens else (),
        dtype=dtype or ("float32" if device == "cpu" else "bfloat16"),
        bos=bos,
        seed=seed,
    )
    kept.keeps(lambda: f"finished cells are kept in {destination}: the same command goes on there")
    with claim(destination), progress_bar() as bar:
        task, cell = bar.add_task("Loading", total=None), ""

        def tell(what: str, number: int, count: int) -> None:
            bar.update(task, description=f"{cell}: {what}", completed=number, total=count)

        comparison = Comparison(settings, destination, device, tell)
        cells = comparison.cells()
        cell, rows = f"1 of {len(cells)}", list["Row"]()
        for row, there in comparison.run():
            rows.append(row)
            cell = f"{len(rows) + 1} of {len(cells)}"
            if not there:
                err.print(f"krony: {_line(row)}", markup=False, soft_wrap=True)
        rows += comparison.others(rows)
    out.print(_table(rows))
    for row in rows:
        if "refused" in row:
            out.print(f"{row['title']} at {row['budget']:g}: {row['refused']}", markup=False)
    drawn = picture.draw(rows, destination / "compare.png")
    out.print(f"Wrote {destination / 'compare.json'}" + (" and compare.png" if drawn else ""))


def _line(row: "Row") -> str:
    from krony.compare.cells import latest

    if "refused" in row:
        return f"{row['title']} at {row['budget']:g} refused: {row['refused']}"
    last = latest(row)
    texts = ", ".join(
        f"{name} {tables.number(found['perplexity'])}" for name, found in last.items()
    )
    return f"{row['title']} at {row['budget']:g}: {row['parameters']:,} parameters, {texts}"


def _table(rows: list["Row"]) -> "Table":
    """A row a cell, the best of every size first."""
    from krony.compare.cells import DENSE, deviation, latest

    dense = next(row for row in rows if row["method"] == DENSE)
    texts = list(dense.get("before", {}))
    healed = any("after" in row for row in rows)
    words_of = [text for text in texts if "last_word" in dense["before"][text]]
    head = ["method", "budget", "parameters"]
    for text in texts:
        head += [text, "against dense", *(["healed", "against dense"] if healed else [])]
    made = tables.table(
        "Perplexity; *: more than 0.5 % off the budget",
        *head,
        *(f"{text}, last word" for text in words_of),
        "seconds",
    )
    measured = [row for row in rows if "before" in row]
    measured.sort(
        key=lambda row: (
            -row["budget"],
            latest(row)[texts[0]]["nats"],
        )
    )
    for row in measured:
        off = "*" if abs(deviation(row)) > 0.005 else ""
        entries = [row["title"], f"{row['budget']:g}{off}", f"{row['parameters']:,}"]
        for text in texts:
            base = dense["before"][text]["perplexity"]
            for stage in ("before", "after") if healed else ("before",):
                value = row[stage][text]["perplexity"] if stage in row else None
                entries += ["-", "-"] if value is None else _pair(value, base)
        last = latest(row)
        entries += [f"{last[text]['last_word']['accuracy']:.1%}" for text in words_of]
        made.add_row(*entries, f"{row['seconds']:.0f}")
    return made


def _pair(value: float, base: float) -> list[str]:
    return [tables.number(value), f"{value / base:,.2f}x" if value / base < 1e4 else "> 10,000x"]
