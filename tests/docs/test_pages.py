"""What the documents say of files, words and figures, against what there is."""

import json
import re
from pathlib import Path

import pytest

import figures
import tables
from tabular import RESULTS

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
LOG = (ROOT / "docs" / "log.md").read_text(encoding="utf-8")


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def test_results_are_what_the_files_say():
    made = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert made == tables.page(), "docs/results.md is stale; run make docs"


def test_readme_is_short_and_its_table_is_what_the_files_say():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text == tables.readme(), "README.md is stale; run make docs"
    words = [word for word in text.split() if re.search(r"\w", word)]
    assert len(words) <= 700


def test_results_say_where_they_come_from():
    for path in RESULTS.rglob("*.json"):
        environment = json.loads(path.read_text(encoding="utf-8")).get("environment")
        assert environment, f"{path.name} has no environment"
        assert {"date", "python", "torch", "transformers", "cpu", "gpu"} <= set(environment), path


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_that_are_named_exist(page):
    text = page.read_text(encoding="utf-8")
    for path in re.findall(r"(?<![\w/.])(?:tests|benchmarks|recipes|docs|src)/[\w/.+-]*\w", text):
        found = (ROOT / path).exists() or list(ROOT.glob(path + "*"))
        assert found, f"{name(page)} names {path}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#\s]+)", text):
        assert (page.parent / target).exists(), f"{name(page)} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_words_are_spelled_as_in_the_code(page):
    # File names, options and names of code stay as they are.
    code = r"```.*?```|`[^`\n]*`|\]\([^)]*\)|\{\{.*?\}\}"
    text = re.sub(code, "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    british = re.findall(
        r"\b\w*(?:quantis|optimis|initialis|tokenis|normalis|serialis|factoris)(?:e|ing|ation)\w*",
        text,
        re.IGNORECASE,
    )
    assert not british, f"{name(page)}: {british}"


def test_code_is_spelled_in_one_way():
    british = re.compile(
        r"(?:quantis|optimis|initialis|tokenis|normalis|serialis)(?:e|ing|ation)|centred", re.I
    )
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in sorted((ROOT / "src").rglob("*.py"))
        for line in path.read_text(encoding="utf-8").splitlines()
        if british.search(line) and '"quantised"' not in line  # a key that files of 0.1 have
    ]
    assert not found


def test_an_entry_of_the_log_is_a_date_a_question_and_a_verdict():
    entries = re.split(r"^## ", LOG, flags=re.MULTILINE)[1:]
    assert len(entries) >= 69
    dates = []
    for entry in entries:
        heading, _, rest = entry.partition("\n")
        found = re.fullmatch(r"(\d{4}-\d\d-\d\d): .{10,}", heading)
        assert found, f"no date and question: {heading}"
        dates.append(found[1])
        verdict, _, what = rest.strip().partition("\n\n")
        assert verdict.startswith("**Verdict.** "), heading
        assert len(what.split()) >= 8, f"{heading}: nothing was measured?"
    assert dates == sorted(dates), "the oldest entry comes first"


def test_the_picture_is_what_its_script_draws(tmp_path):
    out = tmp_path / "kronecker.svg"
    figures.draw(out)
    drawn, kept = (path.read_text(encoding="utf-8") for path in (out, ROOT / "docs/kronecker.svg"))
    # Another matplotlib may draw another way; the words of the picture stay.
    assert set(re.findall(r"<!-- (.+?) -->", drawn)) == set(re.findall(r"<!-- (.+?) -->", kept))
