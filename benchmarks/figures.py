"""The picture of docs/concepts.md: a matrix as a grid of scaled copies of A, from corner to corner.

python benchmarks/figures.py [--out docs/kronecker.svg]
"""

import argparse
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

SIDE = 12  # of the matrix that is drawn
# Sides of the small factor, which says how often A is repeated, and what that corner is called.
PANELS = (
    ((1, 12), "low rank", "A is a column,\nB a row: 24 numbers"),
    ((4, 4), "balanced", "16 small copies of A:\n25 numbers"),
    ((2, 2), "the paper's 81M", "4 copies of A:\n40 numbers"),
    ((1, 1), "dense", "one copy, A is W:\n144 numbers"),
)


def draw(path: Path) -> None:
    """Write the picture; the same bytes every time."""
    matplotlib.rcParams.update({"svg.hashsalt": "krony", "font.family": "sans-serif"})
    random = np.random.default_rng(7)
    figure = Figure(figsize=(10, 3.5), layout="constrained")
    axes = figure.subplots(1, len(PANELS))
    for place, (small, name, what) in zip(axes, PANELS, strict=True):
        large = SIDE // small[0], SIDE // small[1]
        rows, columns = np.mgrid[0 : large[0], 0 : large[1]]
        a = 1.2 + np.sin(rows * 1.1 + columns * 0.5) + 0.5 * random.random(large)
        b = 0.25 + random.random(small)
        product = np.kron(b, a)
        place.imshow(product / product.max(), cmap="Blues", vmin=0, vmax=1.1)
        for row in range(small[0] + 1):
            place.axhline(row * large[0] - 0.5, color="#b3361c", linewidth=1.2)
        for column in range(small[1] + 1):
            place.axvline(column * large[1] - 0.5, color="#b3361c", linewidth=1.2)
        place.set_title(name, fontsize=12)
        place.set_xlabel(what, fontsize=10)
        place.set_xticks([])
        place.set_yticks([])
        place.spines[:].set_visible(False)
    figure.suptitle("W = B ⊗ A: a grid of copies of A, each times one number of B", fontsize=13)
    FigureCanvasSVG(figure).print_svg(path, metadata={"Date": None})


def main() -> None:
    """Draw it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/kronecker.svg"))
    draw(parser.parse_args().out)


if __name__ == "__main__":
    main()
