"""The page: parts with figures, pictures and tables, in one HTML file that needs no other."""

from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

import krony
from krony.errors import KronyError, first_line
from krony.report.comparison import comparison
from krony.report.models import evaluation, model, prediction, sizes, speed
from krony.report.parts import Part, million
from krony.report.read import Found, read


def report(paths: list[Path], title: str | None = None) -> str:
    """A page on model directories, comparisons and files of figures, as HTML.

    Args:
        paths: what `read.read` takes.
        title: default: from what there is.
    Raises:
        KronyError: nothing given, or what can't be read.
    """
    if not paths:
        raise KronyError("nothing to report on was given; name a directory that krony wrote")
    found = read(paths)
    try:
        return _page(found, title)
    except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        named = ", ".join(map(str, paths))
        raise KronyError(
            f"{named}: figures that krony did not write so ({type(error).__name__}: "
            f"{first_line(error)}); make them again"
        ) from error


def _page(found: Found, title: str | None) -> str:
    made: list[Part | None] = [comparison(record) for record in found.comparisons]
    made.append(evaluation(found.evaluations))
    if (drawn := sizes(found)) is not None and made[-1] is not None:
        made[-1].figures.append(drawn)
    made.append(prediction(found))
    made += [model(each) for each in found.directories]
    made.append(speed(found.benches))
    environment = Environment(
        loader=PackageLoader("krony.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    return environment.get_template("page.html.j2").render(
        title=title or _title(found),
        lead=_lead(found),
        parts=[part for part in made if part is not None],
        version=krony.__version__,
    )


def _title(found: Found) -> str:
    if found.comparisons:
        return f"{found.comparisons[0]['settings']['source']} made smaller by every method"
    if found.directories:
        return ", ".join(each.name for each in found.directories[:3])
    return "What krony measured"


def _lead(found: Found) -> list[str]:
    lines = []
    for each in found.directories:
        dense = each.dense_parameters
        if dense != each.parameters:
            lines.append(
                f"{each.name} has {million(each.parameters)} of the {million(dense)} parameters of "
                "the model that it was made from."
            )
    return lines
