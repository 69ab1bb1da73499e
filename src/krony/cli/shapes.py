"""The options of `krony plan` and `krony compress`: which matrix gets which factors."""

from typing import Annotated

import typer

from krony import words
from krony.cli.options import MACHINE

SMALL = "How small"
FOUND = "How it is found"
CALIBRATION = "Text to calibrate on"

# How small.
Params = Annotated[
    str | None,
    typer.Option(
        "--size",
        "--params",
        metavar="SIZE",
        help="Find the shapes: of the whole model, 60% of its parameters, or their number, 81M.",
        rich_help_panel=SMALL,
    ),
]
Share = Annotated[
    float | None,
    typer.Option(
        "--budget",
        metavar="SHARE",
        help="Find the shapes: share of the targets to keep, 0 to 1.",
        rich_help_panel=SMALL,
    ),
]
Flops = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE",
        help="Find the shapes: share of the targets' multiply-adds.",
        rich_help_panel=SMALL,
    ),
]
Scheme = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="A named model of the paper: 67M to 96M.", rich_help_panel=SMALL
    ),
]
ShapeText = Annotated[
    str | None,
    typer.Option(
        metavar="ROWSxCOLUMNS",
        help="Large factor, hidden x model: 1536x384 (else outputs x inputs).",
        rich_help_panel=SMALL,
    ),
]
SmallText = Annotated[
    str | None,
    typer.Option(
        metavar="ROWSxCOLUMNS",
        help="Small factor instead: 2x2 halves both axes of any matrix.",
        rich_help_panel=SMALL,
    ),
]
Terms = Annotated[
    int,
    typer.Option(metavar="N", help="Kronecker products that are summed.", rich_help_panel=SMALL),
]
Layers = Annotated[
    str | None,
    typer.Option(
        metavar="BLOCKS", help="Blocks to change: 0,2-5. Default: all.", rich_help_panel=SMALL
    ),
]
TargetText = Annotated[
    str | None,
    typer.Option(
        metavar="NAMES",
        help=f"Of {', '.join(words.TARGETS)}, or patterns of module names, by commas. "
        "Default: mlp; with --size everything.",
        rich_help_panel=SMALL,
    ),
]

# How it is found.
InitOption = Annotated[
    words.Init,
    typer.Option(
        help="How the factors are found: data fits them to a text; the others are the paper's, "
        "by weights alone.",
        rich_help_panel=FOUND,
    ),
]
Objective = Annotated[
    words.Objective | None,
    typer.Option(
        help="What gets that share too: decode (time a token), throughput (flops).",
        rich_help_panel=FOUND,
    ),
]
Sums = Annotated[
    bool,
    typer.Option(
        "--sums",
        help="With a budget: look for sums of Kronecker products as well. Takes several times as "
        "long, and they have more arithmetic.",
        rich_help_panel=FOUND,
    ),
]
LayoutOption = Annotated[
    words.Layout | None,
    typer.Option(
        help="small-outer is fast, large-outer the paper's order. Default: compress takes for "
        "each matrix what harms less, plan small-outer.",
        rich_help_panel=FOUND,
    ),
]
Scalars = Annotated[
    bool,
    typer.Option("--scalars", help="A learnable scalar per term.", rich_help_panel=FOUND),
]
Seed = Annotated[
    int,
    typer.Option(metavar="N", min=0, help="For whatever is random.", rich_help_panel=FOUND),
]

# Text to calibrate on.
Calibration = Annotated[
    str,
    typer.Option(
        metavar="TEXT",
        help="Text for data and budgets, as --data of evaluate; or self: its own samples.",
        rich_help_panel=CALIBRATION,
    ),
]
Windows = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Windows of calibration text. Default: what the matrices need.",
        rich_help_panel=CALIBRATION,
    ),
]
CalibrationBos = Annotated[
    words.Bos,
    typer.Option(
        "--bos",
        help="The token that begins a text, in front of every window.",
        rich_help_panel=CALIBRATION,
    ),
]

Memory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="The most to hold, 8GB say. Default: 60 % of what is free.",
        rich_help_panel=MACHINE,
    ),
]
