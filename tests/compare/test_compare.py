"""krony compare from the command line: cells, what is kept, the table and the picture."""

import json
import shutil

import datasets
import pytest

import krony
from helpers import healing_inputs
from krony.compare import cells
from krony.compare.picture import draw
from krony.measure import evaluate, info

METHODS = "svd,flap,every-other,slicegpt"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return healing_inputs(tmp_path_factory.mktemp("inputs"))


def arguments(inputs, out, *more, methods=METHODS):
    text = inputs / "text.txt"
    return [
        "compare", inputs / "dense", "-o", out, "--budget", 0.5, "--methods", methods,
        "--calibration", text, "--windows", 4, "--data", text, "--evaluated", 300, *more,
    ]  # fmt: skip


def test_a_comparison_goes_on_where_it_stopped(inputs, run, tmp_path, monkeypatch):
    """Stopped in the middle, by whatever: what is done is not done again, the rest is."""
    out, made = tmp_path / "c", []
    real = cells.Comparison.measure

    def stops(self, method, budget):
        if method is not None and method.name == "every-other":
            raise KeyboardInterrupt
        return real(self, method, budget)

    with monkeypatch.context() as patch:
        patch.setattr(cells.Comparison, "measure", stops)
        assert run(*arguments(inputs, out))[0] != 0
    assert {p.stem for p in (out / "cells").iterdir()} == {"dense", "flap-0.5"}

    def noted(self, method, budget):
        made.append(method.name)
        return real(self, method, budget)

    monkeypatch.setattr(cells.Comparison, "measure", noted)
    code, text, err = run(*arguments(inputs, out))
    assert code == 0, err
    assert made == ["every-other", "svd", "slicegpt"]
    assert "SliceGPT at 0.5: SliceGPT is not built here" in " ".join(text.split())
    record = json.loads((out / "compare.json").read_text())
    rows = {row["method"]: row for row in record["rows"]}
    assert list(rows) == ["dense", "flap", "every-other", "svd", "slicegpt"]
    model = krony.load_model(inputs / "dense")
    assert rows["dense"]["parameters"] == info.parameters(model)
    assert rows["dense"]["share"] == 1.0
    # Perplexity is that of krony evaluate, on as many tokens.
    ids = evaluate.tokenize(krony.load_tokenizer(inputs / "dense"), _text(inputs))[:300]
    assert rows["dense"]["before"]["text.txt"]["nats"] == evaluate.perplexity(model, ids).nats
    assert rows["flap"]["share"] == pytest.approx(0.5, abs=0.02)
    # Its norms and biases go with a block, in so small a model a share of their own.
    assert rows["every-other"]["share"] == pytest.approx(0.5, abs=0.05)
    assert not (out / "work").exists()
    assert (out / "compare.png").stat().st_size > 5000
    assert all(row["environment"]["torch"] for row in rows.values())
    made.clear()
    run(*arguments(inputs, out))
    assert made == []


def _text(inputs):
    from krony.text.data import load_text

    return load_text(str(inputs / "text.txt"))


@pytest.mark.slow
def test_all_are_healed_alike(inputs, run, tmp_path, monkeypatch):
    """A factored model, one with unlike widths, one without a block: the same tokens and loss."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    code, text, err = run(
        *arguments(inputs, tmp_path / "c", "--heal-tokens", 2048, methods="svd,flap,shortgpt")
    )
    assert code == 0, err
    rows = json.loads((tmp_path / "c" / "compare.json").read_text())["rows"]
    healed = [row for row in rows if "after" in row]
    assert [row["method"] for row in healed] == ["flap", "shortgpt", "svd"]
    assert {(r["healing"]["tokens"], r["healing"]["loss"]) for r in healed} == {(2048, "kl")}
    assert {row["curve"][-1]["tokens"] for row in healed} == {2048}
    for row in healed:
        assert row["after"]["text.txt"]["nats"] != row["before"]["text.txt"]["nats"]
    assert "healed" in text


def test_settings_are_those_of_the_folder(inputs, run, tmp_path):
    out = tmp_path / "c"
    assert run(*arguments(inputs, out, methods="svd"))[0] == 0
    code, _, err = run(*arguments(inputs, out, "--windows", 5))
    assert code == 2
    assert "windows = 4, not 5" in " ".join(err.split())
    code, _, err = run(*arguments(inputs, out, "--budget", 0.7, methods="svd"))
    assert code == 0, err  # other sizes and methods may join
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    code, _, err = run(*arguments(inputs, tmp_path / "other"))
    assert code == 2
    assert "is no comparison" in " ".join(err.split())


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--budget", 1.2], "--budget 1.2 can't be"),
        (["--methods", "svdd"], "no method 'svdd'"),
        (["--heal-tokens", "1M", "--calibration", "self"], "--heal-data"),
    ],
)
def test_bad_input_is_refused(inputs, run, tmp_path, more, said):
    code, _, err = run(*arguments(inputs, tmp_path / "c"), *more)
    assert code == 2
    assert said in " ".join(err.split())
    assert not (tmp_path / "c").exists()


def test_a_picture_needs_models(tmp_path):
    assert not draw([{"method": "dense", "title": "Dense", "before": {}}], tmp_path / "p.png")
    assert not (tmp_path / "p.png").exists()


def test_another_size_joins_what_is_there(inputs, run, tmp_path):
    out = tmp_path / "c"
    assert run(*arguments(inputs, out, methods="svd"))[0] == 0
    code, text, err = run(*arguments(inputs, out, "--budget", 0.8, methods="flap"))
    assert code == 0, err
    record = json.loads((out / "compare.json").read_text())
    found = {(row["method"], row["budget"]) for row in record["rows"]}
    assert found == {("dense", 1.0), ("svd", 0.5), ("flap", 0.5), ("flap", 0.8)}
    assert (record["settings"]["budgets"], len(record["settings"]["methods"])) == ([0.5, 0.8], 2)
    assert "SVD" in text, "the table is of all of them"
    (out / "cells" / "svd-0.5.json").write_text("{}")
    code, _, err = run(*arguments(inputs, out, methods="svd"))
    assert (code, "is no cell of a comparison" in " ".join(err.split())) == (2, True)


@pytest.mark.parametrize("what", ["model", "text"])
def test_what_is_compared_must_not_change_between_runs(inputs, run, tmp_path, what):
    shutil.copytree(inputs, tmp_path / "in")
    command = arguments(tmp_path / "in", tmp_path / "c", methods="svd")
    assert run(*command)[0] == 0
    if what == "text":
        with (tmp_path / "in" / "text.txt").open("a") as file:
            file.write("And more.")
    else:
        model, tokenizer = krony.load(inputs / "dense")
        model.transformer.ln_f.weight.data *= 2
        shutil.rmtree(tmp_path / "in" / "dense")
        krony.save(model, tmp_path / "in" / "dense", tokenizer)
    code, _, err = run(*command)
    assert (code, "has changed since" in " ".join(err.split())) == (2, True), err


def test_texts_of_one_name_are_two(inputs, run, tmp_path):
    other = tmp_path / "other" / "text.txt"
    other.parent.mkdir()
    other.write_text((inputs / "text.txt").read_text()[2000:])
    out = tmp_path / "c"
    code, _, err = run(*arguments(inputs, out, "--data", other, methods="svd"))
    assert code == 0, err
    row = json.loads((out / "compare.json").read_text())["rows"][0]
    assert list(row["before"]) == ["text.txt", str(other)]
    one, two = row["before"].values()
    assert one["nats"] != two["nats"]


def test_without_a_dense_figure_there_is_no_comparison(inputs, run, tmp_path):
    (tmp_path / "one.txt").write_text("a")
    code, _, err = run(*arguments(inputs, tmp_path / "c", "--data", tmp_path / "one.txt"))
    assert (code, "too few to measure on" in " ".join(err.split())) == (2, True)
    assert not (tmp_path / "c").exists()
