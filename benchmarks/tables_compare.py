"""The table of docs/results.md about every method at equal sizes (`krony compare`)."""

from typing import Any

from tabular import markdown, number, read, table, times


@table
def compared(name: str) -> str:
    """A row a method: perplexity against dense at every size and on every text, the best first."""
    rows = read(name)["rows"]
    dense = next(row for row in rows if row["method"] == "dense")
    texts = list(dense["before"])
    made = [row for row in rows if row is not dense and "before" in row]
    budgets = sorted({row["budget"] for row in made}, reverse=True)
    found = {(row["title"], row["budget"]): row for row in made}
    titles = sorted(
        dict.fromkeys(row["title"] for row in made),
        key=lambda title: _nats(found.get((title, budgets[0])), texts[0]),
    )
    head = ["method", *(f"{text}, {budget:.0%}" for budget in budgets for text in texts)]
    lines = [
        ["dense", *(number(dense["before"][text]["perplexity"]) for _ in budgets for text in texts)]
    ]
    for title in titles:
        cells = []
        for budget in budgets:
            row = found.get((title, budget))
            for text in texts:
                base = dense["before"][text]["perplexity"]
                cells.append(_cell(row, text, base))
        lines.append([title, *cells])
    return markdown(head, lines)


def _nats(row: dict[str, Any] | None, text: str) -> float:
    return float("inf") if row is None else float(row["before"][text]["nats"])


def _cell(row: dict[str, Any] | None, text: str, base: float) -> str:
    if row is None:
        return "-"
    value = row["before"][text]["perplexity"]
    return f"{number(value)} ({times(value / base)})" if value < 1e5 else f"{value:.1e}"


@table
def sums() -> str:
    """What sums leave of the harm of low rank with as many parameters, by matrix."""
    rows = read("sums")["rows"]
    shares = sorted({row["share"] for row in rows}, reverse=True)
    parts = {"0": "a sum alone", "0.1": "a tenth low rank", "0.45": "45 % low rank"}
    lines = []
    for name in dict.fromkeys(row["matrix"] for row in rows):
        of = {row["share"]: row for row in rows if row["matrix"] == name}
        m, n = next(iter(of.values()))["shape"]
        for key, said in parts.items():
            lines.append([f"{name} ({m} x {n})", said, *(f"{of[s][key]:.2f}" for s in shares)])
    return markdown(["matrix", "", *(f"{s:.0%}" for s in shares)], lines)
