"""The page: every figure that was measured is on it, and it fits a phone and a screen."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

import krony
from helpers import tiny
from krony import KronyError
from krony.measure import info
from krony.report import charts
from krony.report.charts import Point
from krony.report.models import predicted
from krony.report.page import report
from krony.report.read import directory

ENVIRONMENT = {"date": "2026-11-28", "python": "3.11", "torch": "2.13", "cpu": "1 thread"}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def row(method, budget, perplexity, **more):
    figures = {"perplexity": perplexity, "nats": 1.0, "tokens": 8192, "protocol": "krony-pt"}
    figures |= {"window": 1024, "dtype": "float32", "nats": perplexity**0.1}
    return {
        "method": method, "title": method.title(), "ours": method == "krony", "budget": budget,
        "parameters": int(1e8 * budget), "share": budget, "before": {"some-text": figures},
        "seconds": 5.0, "environment": ENVIRONMENT, **more,
    }  # fmt: skip


COMPARISON = {
    "settings": {
        "source": "models/<b>big</b>", "budgets": [0.8, 0.6], "methods": ["krony", "flap", "svd"],
        "calibration": "corpus.txt", "windows": 32, "window": None, "texts": ["some-text"],
        "evaluated": 8192, "heal_tokens": 1000, "heal_data": ["corpus.txt"], "dtype": "float32",
        "bos": "auto", "seed": 7,
    },
    "rows": [
        row("dense", 1.0, 20.0),
        row("krony", 0.8, 25.0), row("flap", 0.8, 42.125), row("svd", 0.8, 7.7e9),
        row(
            "krony", 0.6, 40.0, after=row("krony", 0.6, 30.5)["before"],
            curve=[{"tokens": 0, "held_out": 4.5}, {"tokens": 1000, "held_out": 3.25}],
        ),
        {"method": "svd", "title": "Svd", "ours": False, "budget": 0.6, "refused": "can't be met"},
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A comparison, a factored directory that was healed, and figures measured of it."""
    tmp_path = tmp_path_factory.mktemp("given")
    (tmp_path / "compared").mkdir()
    (tmp_path / "compared" / "compare.json").write_text(json.dumps(COMPARISON))
    model = tiny("llama")
    windows = krony.calibration_windows("self", model, None, 4, 16)
    found = krony.make_budget_plan(model, windows, share=0.6, target="all", objective="throughput")
    krony.compress(model, found.plan, init="data", calibration=windows, moments=found.moments)
    model.config.quantization_config.provenance["predicted_harm"] = found.harm
    krony.save_model(model, tmp_path / "small")
    settings = {"tokens": 9000, "loss": "kl", "recipe": "default", "dtype": "float32", "seed": 3}
    curve = [{"tokens": t, "held_out": 5 - t / 9000, "training": 5.0} for t in (0, 4500, 9000)]
    healed = {"settings": settings, "curve": curve, "environment": ENVIRONMENT}
    (tmp_path / "small" / "heal.json").write_text(json.dumps(healed))
    figures = {
        name: {**row("x", 1, value)["before"]["some-text"], "data": "some-text", "stride": 1024}
        for name, value in ((str(tmp_path / "small"), 33.75), ("dense", 20.0))
    }
    tasks = {name: {"piqa": {"acc": 0.625, "examples": 16, "version": 1}} for name in figures}
    record = {"results": figures, "tasks": tasks, "environment": ENVIRONMENT}
    (tmp_path / "figures.json").write_text(json.dumps(record))
    return [tmp_path / "compared", tmp_path / "small", tmp_path / "figures.json"]


class Words(HTMLParser):
    """The text of a page and the addresses that it asks for."""

    def __init__(self):
        super().__init__()
        self.words, self.addresses, self.tags = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.words.append(data)


def read_page(text):
    page = Words()
    page.feed(text)
    return page, " ".join(" ".join(page.words).split())


def test_everything_measured_is_on_the_page(given):
    page, words = read_page(report(given))
    for figure in ("42.12", "30.50", "33.75", "0.6250", "7.70e+09", "can't be met", "9,000 tokens"):
        assert figure in words, figure
    model = krony.load_model(given[1])
    assert f"{info.parameters(model) / 1e6:,.1f}M" in words
    plan = krony.Plan.from_dict(model.config.quantization_config.plan)
    for matrix in plan.matrices:
        assert matrix.name in words  # on the picture of the model
    assert "At 60% of the blocks" not in words  # one method alone is no contest
    assert "At 80% of the blocks, Krony is best on some-text: 25.00, 1.25x of dense" in words
    command = "krony compare 'models/<b>big</b>' --budget 0.8 --budget 0.6"
    assert command in words
    assert "--seed 7" in words
    assert page.tags.count("svg") == 7
    # One file: nothing is asked for elsewhere, nothing runs, names are names.
    assert page.addresses == []
    assert "script" not in page.tags
    assert "b" not in page.tags[: page.tags.index("svg")]


def test_predicted_harm_stands_beside_what_was_measured(given):
    _, words = read_page(report(given))
    part = words[words.index("Harm, predicted and measured") :]
    nats = 33.75**0.1 - 20**0.1
    assert f"{nats:.3f} healed" in part
    small = directory(given[1])
    assert small.provenance["predicted_harm"] == predicted(small)
    del small.provenance["predicted_harm"]  # then it is known only where all units are there
    assert (predicted(small) is None) == any(m.narrowed for m in small.plan.matrices)


def test_a_directory_is_read_without_loading_it(given):
    found, model = directory(given[1]), krony.load_model(given[1])
    assert found.parameters == info.parameters(model)
    assert found.dense_parameters == info.parameters(tiny("llama"))
    assert sum(found.by_block.values()) < found.parameters
    files = given[1].glob("*.safetensors")
    assert found.bytes < sum(path.stat().st_size for path in files)


def test_what_is_no_figure_of_ours_is_refused(tmp_path, run):
    (tmp_path / "a.json").write_text("[1]")
    (tmp_path / "b.json").write_text('{"x": 1}')
    (tmp_path / "folder").mkdir()
    for name, said in (("a", "no figures"), ("b", "no figures")):
        with pytest.raises(KronyError, match=said):
            report([tmp_path / f"{name}.json"])
    wrongs = ({"rows": 3}, {"rows": [{"method": "dense", "before": {"a": "b"}}]}, {"rows": [1]})
    for wrong in wrongs:
        (tmp_path / "c.json").write_text(json.dumps({"settings": {"source": "x"}, **wrong}))
        with pytest.raises(KronyError, match=r"c\.json: figures that krony did not write so"):
            report([tmp_path / "c.json"])
    code, _, err = run("report", tmp_path / "folder", "-o", tmp_path / "page.html")
    assert code == 2
    assert "nothing to report on" in err
    assert not (tmp_path / "page.html").exists()


def test_the_front_is_what_nothing_beats():
    points = [Point(1, 9, "a"), Point(2, 9.5, "b"), Point(3, 5, "c"), Point(4, 5000, "ruined")]
    drawn = charts.pareto(points, "size", "perplexity")
    front = re.search(r'<polyline points="([^"]+)"', drawn)[1].split()
    centers = dict(re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', drawn))
    assert len(centers) == 3  # not the ruined one
    assert front == [f"{x},{centers[x]}" for x in sorted(centers, key=float)][::2]


@pytest.mark.parametrize(("low", "high", "log"), [(0, 1e7, False), (0.9, 1e4, True), (3, 4, False)])
def test_ticks_are_few_and_round(low, high, log):
    found = charts.ticks(low, high, log)
    assert 2 <= len(found) <= 7
    assert all(low <= value <= high for value in found)
    digits = [f"{value:.9e}".partition("e")[0].rstrip("0") for value in found]
    assert all(len(each) <= 3 for each in digits)  # 2. or 2.5


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 1400])
def test_it_fits(given, tmp_path, width):
    """In a browser nothing is wider than the page but what scrolls in its own frame."""
    measure = (
        "<script>addEventListener('load', () => {"
        "const out = [...document.querySelectorAll('main *')].filter(e =>"
        " !e.closest('.wide') && e.getBoundingClientRect().right > innerWidth + 1);"
        "document.title = [innerWidth, document.documentElement.scrollWidth, out.length].join()})"
        "</script></body>"
    )
    page = tmp_path / "page.html"
    page.write_text(report(given).replace("</body>", measure), encoding="utf-8")
    done = subprocess.run(
        [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
         f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900", "--dump-dom",
         "--virtual-time-budget=2000", page.as_uri()],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    inner, scroll, out = map(int, re.search(r"<title>([\d,]+)</title>", done.stdout)[1].split(","))
    assert scroll <= inner
    assert out == 0
    assert "CONSOLE" not in done.stderr
