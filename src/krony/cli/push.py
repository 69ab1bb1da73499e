"""krony push: a directory and its model card to the Hub."""

from pathlib import Path
from typing import Annotated

import typer

from krony.cli.options import OUTPUT, out


def push_command(
    source: Annotated[Path, typer.Argument(metavar="FOLDER", help="A directory that krony wrote.")],
    repository: Annotated[
        str, typer.Argument(metavar="OWNER/NAME", help="Of the Hub; made if it is not there.")
    ],
    base: Annotated[
        str | None,
        typer.Option(
            metavar="OWNER/NAME", help="The model it was made from.", rich_help_panel=OUTPUT
        ),
    ] = None,
    license_id: Annotated[
        str | None,
        typer.Option(
            "--license", metavar="ID", help="Of that model: apache-2.0.", rich_help_panel=OUTPUT
        ),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="For you alone.", rich_help_panel=OUTPUT)
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Show card and files only.", rich_help_panel=OUTPUT),
    ] = False,
) -> None:
    """Upload a model directory with a model card that says what was done and how to load it."""
    from krony.cli import tables
    from krony.report.card import card, push

    made = card(source, base, license_id)
    sizes = push(source, repository, made, private=private, dry=dry_run)
    if dry_run:
        out.print(str(made), markup=False, soft_wrap=True)
        for name, size in sizes.items():
            out.print(f"{name}: {tables.megabytes(size)}", markup=False)
        out.print(f"Nothing was pushed; without --dry-run this goes to {repository}.")
        return
    out.print(f"Pushed {len(sizes)} files to https://huggingface.co/{repository}", markup=False)
