"""Tasks of lm-eval on local files, against figures computed without it."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

import krony
from helpers import healing_inputs
from krony import KronyError
from krony.measure import tasks

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.slow

WORDS = "the string returns list object value number function of a and"
PASSAGES = [
    f"{' '.join(WORDS.split()[i:])} {' '.join(WORDS.split()[:i])}".strip() for i in range(1, 9)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return healing_inputs(tmp_path_factory.mktemp("model")) / "small"


@pytest.fixture
def lambada(tmp_path, monkeypatch):
    """A folder with LAMBADA's own file in it, of a few passages."""
    (tmp_path / "lambada").mkdir()
    rows = "".join(json.dumps({"text": text}) + "\n" for text in PASSAGES)
    (tmp_path / "lambada" / "lambada_test.jsonl").write_text(rows)
    monkeypatch.setenv("KRONY_DATA", str(tmp_path))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path


def by_hand(model, tokenizer):
    """(accuracy, exp of the mean loss of the last word), passage by passage."""
    right, losses = [], []
    for text in PASSAGES:
        context, _, word = text.rpartition(" ")
        before, after = tokenizer(context)["input_ids"], tokenizer(" " + word)["input_ids"]
        ids = torch.tensor([before + after])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(before) - 1 : -1]
        losses.append(float(F.cross_entropy(logits, torch.tensor(after), reduction="sum")))
        right.append(logits.argmax(-1).tolist() == after)
    return sum(right) / len(right), math.exp(sum(losses) / len(losses))


def test_lambada_agrees_with_the_definition(model, lambada, run, tmp_path):
    """A factored model, from the command line; lm-eval's own task, its rows from a file."""
    code, out, err = run(
        "evaluate", model, "--tasks", "lambada_openai", "--json", tmp_path / "f.json"
    )
    assert code == 0, err
    record = json.loads((tmp_path / "f.json").read_text())
    found = record["tasks"][str(model)]["lambada_openai"]
    accuracy, perplexity = by_hand(*krony.load(model))
    assert found["acc"] == accuracy
    assert found["perplexity"] == pytest.approx(perplexity, rel=1e-4)
    assert found["examples"] == len(PASSAGES)
    assert "results" not in record  # no text was asked for
    assert "lambada_openai" in out


def test_tasks_of_choices_read_local_files_too(model, lambada):
    """One with functions of its own beside its configuration, which an include must find."""
    (lambada / "piqa").mkdir()
    row = {"goal": "count", "sol1": "the list", "sol2": "of a function", "label": 0}
    lines = [json.dumps({**row, "label": i % 2}) for i in range(4)]
    for split in ("train", "validation"):
        (lambada / "piqa" / f"{split}.jsonl").write_text("\n".join(lines))
    found = tasks.run_tasks(*krony.load(model), ["piqa"], shots=0)
    assert found["piqa"]["acc"] == 0.5  # the same choice for all, and half of the labels
    assert tasks.run_tasks(*krony.load(model), ["piqa"], limit=2)["piqa"]["examples"] == 2


def test_what_can_not_be_had_is_said(model, lambada, tmp_path):
    with pytest.raises(KronyError, match="no task 'lambadada'"):
        tasks.run_tasks(*krony.load(model), ["lambadada"])
    with pytest.raises(KronyError, match=r"could not run hellaswag: .*KRONY_DATA"):
        tasks.run_tasks(*krony.load(model), ["hellaswag"])
