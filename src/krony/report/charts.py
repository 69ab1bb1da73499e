"""Charts as SVG in a page: text and lines take their colors from the page's style sheet.

Each is drawn 360 units wide, so that on a phone nothing shrinks, and titles of marks show on hover.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 360.0
RUINED = 100  # times the best perplexity: models beyond are left out of a plot
HUES = ("a", "b", "c", "d", "e")  # classes of the style sheet


@dataclass(frozen=True)
class Point:
    """A mark: where it stands, what it says, whether it is one of ours."""

    x: float
    y: float
    label: str
    ours: bool = False
    hue: str = "a"


def _frame(height: float, inner: Sequence[str], title: str) -> str:
    body = "".join(inner)
    return (
        f'<svg viewBox="0 0 {WIDTH:g} {height:g}" role="img" aria-label="{escape(title)}">{body}'
        "</svg>"
    )


def _text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    mark = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{mark}>{escape(words)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def _dot(x: float, y: float, kind: str, title: str, radius: float = 4) -> str:
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" class="{kind}">'
        f"<title>{escape(title)}</title></circle>"
    )


def ticks(low: float, high: float, log: bool) -> list[float]:
    """A few round numbers between the two."""
    if log:
        found = [
            m * 10.0**e
            for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            for m in (1, 2, 5)
        ]
        inside = [v for v in found if low <= v <= high]
        if len(inside) <= 6:
            return inside
        tens = [v for v in inside if abs(math.log10(v) - round(math.log10(v))) < 1e-9]
        return tens[:: max(1, -(-len(tens) // 6))]
    step = 10 ** math.floor(math.log10(max(high - low, 1e-12) / 4))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (m * step) <= 5)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """1,234,567 as 1.2M; 0.05 as it is."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            number = f"{value / size:.3g}"
            return f"{float(number):g}{unit}"
    return f"{value:.3g}"


def _scale(
    low: float, high: float, start: float, end: float, log: bool
) -> Callable[[float], float]:
    if log:
        low, high = math.log10(low), math.log10(high)

    def place(value: float) -> float:
        value = math.log10(value) if log else value
        return start + (value - low) / ((high - low) or 1.0) * (end - start)

    return place


def pareto(points: Sequence[Point], across: str, up: str, height: float = 300) -> str:
    """Less is better on both axes; the front is a line, and its marks are named."""
    points = [p for p in points if math.isfinite(p.y) and p.y > 0]
    if not points:
        return ""
    xs, ys = [p.x for p in points], sorted(p.y for p in points)
    most = min(ys[-1], ys[0] * RUINED)  # what is beyond would flatten all others
    points = [p for p in points if p.y <= most]
    xs = [p.x for p in points]
    left, top, bottom = 44.0, 24.0, height - 34
    pad = (max(xs) - min(xs)) * 0.08 or max(xs) * 0.05 or 1.0
    x = _scale(min(xs) - pad, max(xs) + pad, left, WIDTH - 12, False)
    y = _scale(ys[0] * 0.9, most * 1.15, bottom, top, True)
    made = []
    for value in ticks(min(xs) - pad, max(xs) + pad, False):
        made += [_line(x(value), top, x(value), bottom, "grid")]
        made += [_text(x(value), bottom + 14, short(value), "tick", "middle")]
    for value in ticks(ys[0] * 0.9, most * 1.15, True):
        made += [_line(left, y(value), WIDTH - 12, y(value), "grid")]
        made += [_text(left - 5, y(value) + 3.5, short(value), "tick", "end")]
    made.append(_text((left + WIDTH) / 2, height - 4, across, "axis", "middle"))
    made.append(_text(2, 9, up, "axis"))
    front, best = [], math.inf
    for point in sorted(points, key=lambda p: (p.x, p.y)):
        if point.y < best:
            best = point.y
            front.append(point)
    line = " ".join(f"{x(p.x):.1f},{y(p.y):.1f}" for p in front)
    made.append(f'<polyline points="{line}" class="front"/>')
    taken: list[tuple[float, float, float]] = []
    for point in sorted(points, key=lambda p: (p in front, p.ours)):
        kind = "mark ours" if point.ours else "mark"
        title = f"{point.label}: {short(point.x)}, {point.y:,.2f}"
        made.append(_dot(x(point.x), y(point.y), kind, title, 5 if point.ours else 3.5))
    for point in sorted(points, key=lambda p: (not p.ours, p not in front, p.y)):
        # Words go where there is room: to the right, or to the left of a mark near the edge.
        wide = 5.6 * len(point.label)
        right = x(point.x) + 8 + wide < WIDTH
        start = x(point.x) + 8 if right else x(point.x) - 8 - wide
        at = y(point.y)
        if any(abs(at - v) < 11 and start < e and b < start + wide for b, e, v in taken):
            continue
        taken.append((start, start + wide, at))
        edge = (start, "start") if right else (x(point.x) - 8, "end")
        kind = "name ours" if point.ours else "name"
        made.append(_text(edge[0], at + 3.5, point.label, kind, edge[1]))
    return _frame(height, made, f"{up} against {across}")


def dots(rows: Sequence[tuple[str, bool, Sequence[tuple[float, str]]]], across: str) -> str:
    """A row a method, best first: values against dense on a logarithmic axis, by hue."""
    values = [v for _, _, each in rows for v, _ in each]
    if not values:
        return ""
    high = min(max(values), 1e4) * 1.3
    left, height = 118.0, 40.0 + 20 * len(rows)
    x = _scale(0.9, high, left, WIDTH - 12, True)
    made = []
    for value in ticks(1, high, True):
        made += [_line(x(value), 6, x(value), height - 30, "grid")]
        made += [_text(x(value), height - 18, f"{short(value)}x", "tick", "middle")]
    for number, (title, ours, each) in enumerate(rows):
        at = 18.0 + 20 * number
        made.append(_text(left - 8, at + 3.5, title, "name ours" if ours else "name", "end"))
        made.append(_line(left, at, WIDTH - 12, at, "rule"))
        for value, hue in each:
            shown = min(value, high / 1.15)
            said = f"{title}: {value:,.2f}x" if value < 1e6 else f"{title}: {value:.1e}x"
            made.append(_dot(x(shown), at, f"mark {hue}", said))
            if value > shown:
                made.append(_text(x(shown) + 6, at + 3.5, "›", f"name {hue}"))
    made.append(_text((left + WIDTH) / 2, height - 3, across, "axis", "middle"))
    return _frame(height, made, across)


def blocks(before: Sequence[float], after: Sequence[float], what: str) -> str:
    """A bar a block: what it is now, before an outline of what it was."""
    if not before:
        return ""
    height, left, bottom = 150.0, 40.0, 122.0
    high = max([*before, *after]) * 1.05 or 1.0
    y = _scale(0, high, bottom, 14, False)
    step = (WIDTH - left - 6) / len(before)
    made = []
    for value in ticks(0, high, False):
        made += [_line(left, y(value), WIDTH - 6, y(value), "grid")]
        made += [_text(left - 5, y(value) + 3.5, short(value), "tick", "end")]
    for i, (old, new) in enumerate(zip(before, after, strict=True)):
        start, wide = left + i * step + step * 0.12, step * 0.76
        title = f"<title>block {i}: {short(new)} of {short(old)}</title>"
        for value, kind in ((old, "was"), (new, "bar")):
            made.append(
                f'<rect x="{start:.1f}" y="{y(value):.1f}" width="{wide:.1f}" '
                f'height="{bottom - y(value):.1f}" class="{kind}">{title}</rect>'
            )
    for i in range(0, len(before), max(1, len(before) // 8)):
        made.append(_text(left + (i + 0.5) * step, bottom + 13, str(i), "tick", "middle"))
    made.append(_text((left + WIDTH) / 2, height - 3, f"{what}, by block", "axis", "middle"))
    return _frame(height, made, f"{what} by block")


def grid(rows: Sequence[tuple[str, Sequence[tuple[float, str] | None]]]) -> str:
    """The model as a picture: a row a kind of matrix, a column a block, fuller where more stays."""
    if not rows:
        return ""
    left, count = 74.0, max(len(cells) for _, cells in rows)
    step = min(26.0, (WIDTH - left - 4) / count)
    tall = 18.0
    height = 8 + tall * len(rows) + 30
    made = []
    for number, (name, cells) in enumerate(rows):
        at = 6 + tall * number
        made.append(_text(left - 6, at + 12, name, "name", "end"))
        for i, cell in enumerate(cells):
            if cell is None:
                continue
            share, title = cell
            place = f'x="{left + i * step:.1f}" y="{at:.1f}" width="{max(step - 1, 1):.1f}"'
            made.append(f'<rect {place} height="{tall - 2:g}" class="empty"/>')
            full = (tall - 2) * min(max(share, 0.0), 1.0)
            made.append(
                f'<rect x="{left + i * step:.1f}" y="{at + tall - 2 - full:.1f}" '
                f'width="{max(step - 1, 1):.1f}" height="{full:.1f}" class="bar">'
                f"<title>{escape(title)}</title></rect>"
            )
    for i in range(0, count, max(1, count // 8)):
        made.append(_text(left + (i + 0.5) * step, height - 17, str(i), "tick", "middle"))
    made.append(_text((left + WIDTH) / 2, height - 3, "block", "axis", "middle"))
    return _frame(height, made, "share of each matrix that stays, by block")


def curves(
    series: Sequence[tuple[str, Sequence[tuple[float, float]]]], across: str, up: str
) -> str:
    """Lines, named in the legend below them."""
    series = [(name, line) for name, line in series if len(line) > 1]
    if not series:
        return ""
    each = [p for _, line in series for p in line]
    left, bottom = 40.0, 168.0
    height = 204.0 + 14 * len(series)
    ends = [line[-1][1] for _, line in series]
    low, high = min(v for _, v in each), min(max(v for _, v in each), max(ends) + 1.5)
    x = _scale(0, max(t for t, _ in each), left, WIDTH - 12, False)
    y = _scale(low - 0.03 * (high - low), high, bottom, 14, False)
    made = []
    for value in ticks(0, max(t for t, _ in each), False):
        made.append(_text(x(value), bottom + 14, short(value), "tick", "middle"))
    for value in ticks(low, high, False):
        made += [_line(left, y(value), WIDTH - 12, y(value), "grid")]
        made += [_text(left - 5, y(value) + 3.5, short(value), "tick", "end")]
    made.append(_text(2, 9, up, "axis"))
    made.append(_text((left + WIDTH) / 2, bottom + 28, across, "axis", "middle"))
    for number, (name, line) in enumerate(series):
        hue = HUES[number % len(HUES)]
        path = " ".join(f"{x(t):.1f},{y(min(v, high)):.1f}" for t, v in line)
        made.append(f'<polyline points="{path}" class="curve {hue}"/>')
        at = bottom + 42 + 14 * number
        made.append(_line(left, at, left + 16, at, f"curve {hue}"))
        made.append(_text(left + 22, at + 3.5, f"{name}: {line[-1][1]:.3f} at the end", "name"))
    return _frame(height, made, f"{up} over {across}")
