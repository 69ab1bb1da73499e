"""krony report: a page on what was made and measured."""

from pathlib import Path
from typing import Annotated

import typer

from krony.cli.options import OUTPUT, out


def report_command(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="PATH...",
            help="Model directories, folders of krony compare, files of evaluate or bench --json.",
        ),
    ],
    destination: Annotated[
        Path,
        typer.Option(
            "--out", "-o", metavar="FILE", help="The page to write.", rich_help_panel=OUTPUT
        ),
    ] = Path("report.html"),
    title: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Default: from what there is.", rich_help_panel=OUTPUT),
    ] = None,
) -> None:
    """One page of figures and pictures, in a file that needs no network and no server."""
    from krony.hf.checkpoints import write_text
    from krony.report.page import report

    write_text(destination, report(paths, title))
    out.print(f"Wrote {destination}")
