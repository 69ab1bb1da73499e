"""Tests of the docstring corpus: order, splits, duplicates and the held-out text."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from krony.text import docstrings
from krony.text.docstrings import documents, held_out_topics, python_docstrings, word_runs

MODULE = '''"""Module prose that is long enough to be kept as a document of its own, by itself.

A paragraph that both the module and the class below it repeat, word for word.
"""
raise RuntimeError("the corpus must never import what it reads")


def function():
    """Function prose, with enough words in it to be worth a paragraph in the corpus."""


class Thing:
    """Class prose that is long enough to be kept as a document of its own, by itself.

    A paragraph that both the module and the class   below it repeat, word for word.
    """

    def method(self):
        """Method prose, with enough words in it to be worth a paragraph in the corpus."""


add_docstr(function, r"""
Attached prose, given to a function by a call, as extension modules have it done for them.
It runs over a second line, so that it is long enough to be kept as a document by itself.
""")
'''


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package on the path that fails when it is imported."""
    folder = tmp_path / "krony_fixture_package"
    (folder / "tests").mkdir(parents=True)
    (folder / "__init__.py").write_text(MODULE)
    (folder / "broken.py").write_text("def (:\n")
    (folder / "tests" / "test_it.py").write_text(f'"""{"Test prose. " * 30}"""\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    documents.cache_clear()
    return folder.name


def test_documents_of_a_package(package: str) -> None:
    found = documents((package,))
    assert package not in sys.modules
    assert [item.name.rpartition(":")[2] for item in found] == ["", "Thing", "1"]
    module, thing, attached = (item.text for item in found)
    assert "Function prose" in module
    assert "repeat, word for word" in module
    assert "Method prose" in thing
    assert "repeat, word for word" not in thing
    assert attached.startswith("Attached prose")
    assert not any("Test prose" in item.text for item in found)


def test_held_out_paragraphs_are_dropped(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    held_out = "function prose with enough words in it to be worth a paragraph in the corpus"
    monkeypatch.setattr(docstrings, "held_out_topics", lambda: held_out)
    assert "Function prose" not in documents((package,))[0].text


def test_order_is_deterministic(package: str) -> None:
    first = documents((package,))
    documents.cache_clear()
    assert documents((package,)) == first


def test_unknown_names() -> None:
    assert python_docstrings("train", ("krony_no_such_package",)) == []
    with pytest.raises(ValueError, match="split"):
        python_docstrings("test", ())


def test_held_out_topics() -> None:
    text = held_out_topics()
    assert len(text) > 100_000
    assert "assert" in text


@pytest.mark.slow
def test_standard_library_does_not_leak() -> None:
    runs = word_runs(held_out_topics())
    for split in ("train", "validation"):
        texts = python_docstrings(split, ("stdlib",))
        assert texts
        for text in texts:
            for paragraph in text.split("\n\n"):
                assert runs.isdisjoint(word_runs(paragraph))


@pytest.mark.slow
def test_splits_are_disjoint() -> None:
    found = documents(("stdlib",))
    paragraphs: dict[str, set[str]] = {"train": set(), "validation": set()}
    for item in found:
        long_ones = (" ".join(part.split()) for part in item.text.split("\n\n"))
        # Headings are short and recur; anything longer belongs to one document alone.
        paragraphs[item.split] |= {part for part in long_ones if len(part) >= 32}
    assert paragraphs["train"]
    assert paragraphs["validation"]
    assert paragraphs["train"].isdisjoint(paragraphs["validation"])
    validation = sum(item.split == "validation" for item in found)
    assert 0 < validation < 0.06 * len(found)
