"""krony report: a page on what was made and measured."""

from pathlib import Path
from typing import Annotated

import typer

from krony.cli.options import OUTPUT, out

MARK = b'<meta name="generator" content="krony '


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
            "--out",
            "-o",
            metavar="FILE",
            help="The page to write; a page of krony's that is there is replaced.",
            rich_help_panel=OUTPUT,
        ),
    ] = Path("report.html"),
    title: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Default: from what there is.", rich_help_panel=OUTPUT),
    ] = None,
) -> None:
    """One page of figures and pictures, in a file that needs no network and no server."""
    from krony.hf.checkpoints import write_text
    from krony.hf.claims import check_file
    from krony.report.page import report

    replaced = check_file(destination, lambda content: MARK in content[:1000]).exists()
    write_text(destination, report(paths, title))
    out.print(f"Wrote {destination}" + (", in the place of an earlier page" if replaced else ""))
