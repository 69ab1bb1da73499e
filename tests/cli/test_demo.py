"""The demo, on the head of its text: everything it prints is measured there and then."""

import json
from pathlib import Path

import pytest

from krony import INITS, demo, load_model, load_tokenizer
from krony.compression import prices
from krony.hf import checkpoints
from krony.maths import fit
from krony.text import docstrings

# Eight windows, for speed, are few; the warning says so.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*calibration tokens are few")]


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        # Few candidates, rough fits, the docstrings of two packages: a minute less.
        few = docstrings.python_docstrings("train", ("asyncio", "email"))
        patch.setattr(docstrings, "python_docstrings", lambda *_: few)
        patch.setattr(prices, "LOW_RANK_PARTS", (0.1,))
        patch.setattr(prices, "PRICING_STEPS", 1)
        patch.setattr(fit, "STEPS", 2)
        # One thread: beside another worker two only wait for each other.
        yield folder, demo.run(folder / "out", characters=8_000, windows=8)


def test_every_initialisation_at_both_sizes(record):
    _, figures = record
    names = [row["name"] for row in figures["rows"]]
    jobs = [(size, init) for size in demo.SIZES for init in INITS] + [demo.BUDGET]
    assert names == ["dense", *(f"{size}, {init}" for size, init in jobs)]
    dense, *others = figures["rows"]
    for row in others:
        share = {"half": 0.5, "quarter": 0.25}[row["size"]]
        assert row["mlp_share"] == pytest.approx(share, abs=2e-3)
        assert row["perplexity"] > dense["perplexity"]
        assert row["bytes"] < dense["bytes"]
        assert row["reloaded_equal"]
        assert row["text"].startswith(figures["prompt"])


def test_the_paper_initialisations_beat_random(record):
    rows = {row["name"]: row["perplexity"] for row in record[1]["rows"]}
    for size in ("half", "quarter"):
        assert rows[f"{size}, van-loan-scaled"] < rows[f"{size}, random"] / 3


def test_the_budget_beats_the_paper_initialisations_at_its_size(record):
    rows = {row["name"]: row["perplexity"] for row in record[1]["rows"]}
    assert rows["quarter, data, budget"] < rows["quarter, van-loan-scaled"] / 10


def test_figures_and_picture_are_written(record):
    folder, figures = record
    assert json.loads((folder / "out" / "demo.json").read_text()) == json.loads(json.dumps(figures))
    assert (folder / "out" / "demo.png").read_bytes()[:4] == b"\x89PNG"
    assert {p.name for p in (folder / "out").iterdir()} == {"demo.json", "demo.png"}


def test_the_packaged_model_is_small_and_complete():
    folder = Path(checkpoints.resolve("demo"))
    assert sum(p.stat().st_size for p in folder.iterdir()) < 10_000_000
    model = load_model("demo")
    assert model.lm_head.weight is model.transformer.wte.weight
    assert sum(p.numel() for p in model.parameters()) == 4_273_664
    tokenizer = load_tokenizer("demo")
    text = "Return a list of the keys — naïve café, 数字.\n    indented"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
