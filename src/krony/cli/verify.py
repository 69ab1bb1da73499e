"""krony verify: whether a model directory is still what krony wrote."""

from pathlib import Path
from typing import Annotated

import typer

from krony.cli.options import out


def verify_command(
    source: Annotated[str, typer.Argument(metavar="FOLDER", help="A directory that krony wrote.")],
) -> None:
    """Compare every tensor and file of a factored model with its checksum: finds one flipped bit.

    The checksums are in config.json, beside the plan. They find accidents, not people who change a
    model on purpose.
    """
    from krony.hf.integrity import verify
    from krony.hf.loading import resolve

    folder = Path(resolve(source))
    found = verify(folder)
    out.print(
        f"{folder} is what krony wrote: {found.tensors} tensors, {found.bytes / 1e6:,.2f} MB, and "
        f"{found.files} files.",
        markup=False,
    )
