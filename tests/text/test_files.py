"""One reader for texts in files and folders: what it reads, and what it says of what it can't."""

import bz2
import gzip
import json
import lzma

import pyarrow
import pytest
from pyarrow import parquet

from krony import KronyError
from krony.text import data, files, sources

ROWS = ["one\r\ntwo é", "three\n\nfour", "five"]


def lines(rows, column="text"):
    return "".join(json.dumps({column: row, "id": 1}) + "\n" for row in rows)


def write_parquet(path, rows, column="text"):
    parquet.write_table(pyarrow.table({column: rows, "n": list(range(len(rows)))}), path)


def zstandard(content: bytes) -> bytes:
    """In two frames, as concatenated files are."""
    packed = []
    for part in (content[:10], content[10:]):
        sink = pyarrow.BufferOutputStream()
        with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
            stream.write(part)
        packed.append(sink.getvalue().to_pybytes())
    return b"".join(packed)


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lzma.compress, zstandard])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("named", ["x.jsonl", "x.jsonl.gz", "x.json", "x.ndjson"])
def test_rows_are_the_same_however_they_are_stored(tmp_path, pack, mark, named):
    path = tmp_path / named  # what it is compressed with is not taken from the name
    path.write_bytes(pack(mark + lines(ROWS).encode()))
    assert list(files.documents(path)) == ROWS


def test_every_kind_of_file_of_rows(tmp_path):
    write_parquet(tmp_path / "x.parquet", ROWS)
    (tmp_path / "list.json").write_text(json.dumps([{"text": row} for row in ROWS]))
    (tmp_path / "bare.json").write_text(json.dumps(ROWS))
    (tmp_path / "one.json").write_text(json.dumps({"text": ROWS[0]}))
    for name in ("x.parquet", "list.json", "bare.json"):
        assert list(files.documents(tmp_path / name)) == ROWS
    assert list(files.documents(tmp_path / "one.json")) == ROWS[:1]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_plain_text_is_kept_to_the_byte_without_a_byte_order_mark(tmp_path, encoding):
    text = "a\r\nb\n\n  c\x0b d\u2028e\n"
    (tmp_path / "x.txt").write_bytes(text.encode(encoding))
    assert list(files.documents(tmp_path / "x.txt")) == [text]


def test_documents_of_plain_text_are_between_marks(tmp_path):
    (tmp_path / "x.txt").write_text("a\nb\n<eos>\n\nc <eos> d\n<eos>\n<eos>\ne")
    assert list(files.documents(tmp_path / "x.txt", mark="<eos>")) == ["a\nb", "c <eos> d", "e"]


def test_other_columns_are_found_or_named(tmp_path):
    (tmp_path / "x.jsonl").write_text(lines(ROWS, "content"))
    assert list(files.documents(tmp_path / "x.jsonl")) == ROWS
    (tmp_path / "only.jsonl").write_text(json.dumps({"tale": "one"}))
    assert list(files.documents(tmp_path / "only.jsonl")) == ["one"]
    (tmp_path / "y.jsonl").write_text(lines(ROWS, "story"))
    with pytest.raises(KronyError, match=r'line 1 of .*y\.jsonl has no column "text", only story'):
        list(files.documents(tmp_path / "y.jsonl"))
    assert data.load_text(f"{tmp_path}/y.jsonl:story").text == "\n\n".join(ROWS)
    write_parquet(tmp_path / "z.parquet", ROWS, "story")
    assert list(sources.documents(sources.find(f"{tmp_path}/z.parquet:story"))) == ROWS
    with pytest.raises(KronyError, match='has no column "tale", only story, n'):
        list(files.documents(tmp_path / "z.parquet", "tale"))


def test_the_column_of_the_first_row_is_that_of_all(tmp_path):
    (tmp_path / "x.jsonl").write_text(lines(["one"]) + lines(["two"], "content"))
    with pytest.raises(KronyError, match=r'line 2 of .*x\.jsonl has no column "text"'):
        list(files.documents(tmp_path / "x.jsonl"))


BAD_ROWS = {
    "null": ("null", "is null"),
    "number": ("3.5", "is a number"),
    "true": ("true", "is true or false"),
    "list": ('["a"]', "is a list"),
    "object": ('{"a": "b"}', "is an object"),
}


@pytest.mark.parametrize(("value", "said"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_row_without_a_text_is_refused_by_its_line(tmp_path, value, said):
    (tmp_path / "x.jsonl").write_text(f'{{"text": "good"}}\n\n{{"text": {value}}}\n')
    with pytest.raises(KronyError, match=rf"the text in line 3 of .*x\.jsonl {said}"):
        data.load_text(str(tmp_path / "x.jsonl"))
    (tmp_path / "y.json").write_text(f'[{{"text": "good"}}, {{"text": {value}}}]')
    with pytest.raises(KronyError, match=rf"the text in entry 2 of .*y\.json {said}"):
        data.load_text(str(tmp_path / "y.json"))


@pytest.mark.parametrize("value", ["null", "3", "[1]", '"bare"', "{", "[" * 100_000, "NaNa"])
def test_a_line_that_is_no_object_is_refused_by_its_number(tmp_path, value):
    (tmp_path / "x.jsonl").write_text('{"text": "good"}\n' + value)
    with pytest.raises(KronyError, match=r"line 2 of .*x\.jsonl is"):
        data.load_text(str(tmp_path / "x.jsonl"))


def test_rows_of_parquet_are_refused_by_their_number(tmp_path):
    write_parquet(tmp_path / "x.parquet", ["good", None])
    with pytest.raises(KronyError, match=r"the text in row 2 of .*x\.parquet is null"):
        list(files.documents(tmp_path / "x.parquet"))
    write_parquet(tmp_path / "y.parquet", [1, 2])
    with pytest.raises(KronyError, match=r"the text in row 1 of .*y\.parquet is a number"):
        list(files.documents(tmp_path / "y.parquet"))
    (tmp_path / "z.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(KronyError, match=r"can't read the text .*z\.parquet"):
        list(files.documents(tmp_path / "z.parquet"))


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "x.json", "x.txt.gz"])
def test_bytes_that_are_no_text_are_refused_by_line_and_byte(tmp_path, name):
    good = b'{"text": "good"}\n'
    (tmp_path / name).write_bytes(good + '{"text": "é"}\n'.encode("latin-1"))
    with pytest.raises(KronyError, match=rf"line 2 of .*{name} is not UTF-8 \(byte 0xe9\); conv"):
        data.load_text(str(tmp_path / name))


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "x.json", "x.txt.gz"])
@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_empty_files_are_said_to_be_empty(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(KronyError, match=rf"{name}.* is empty"):
        data.load_text(str(tmp_path / name))


def test_a_cut_archive_is_named(tmp_path):
    (tmp_path / "x.txt.gz").write_bytes(gzip.compress(b"some text" * 999)[:-9])
    (tmp_path / "x.txt.xz").write_bytes(lzma.compress(b"some text" * 999)[:-9])
    (tmp_path / "x.txt.zst").write_bytes(zstandard(b"some text" * 999)[:-9])
    for name in ("x.txt.gz", "x.txt.xz", "x.txt.zst"):
        with pytest.raises(KronyError, match=rf"can't read the text .*{name}: \w"):
            data.load_text(str(tmp_path / name))


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32", "utf-32-le"])
def test_zero_bytes_are_no_text(tmp_path, encoding):
    """Each of them is valid UTF-8, or UTF-16 after its first two bytes."""
    (tmp_path / "x.txt").write_bytes("some text\n".encode(encoding) * 9)
    with pytest.raises(KronyError, match="full of zero bytes"):
        data.load_text(str(tmp_path / "x.txt"))


@pytest.mark.parametrize("name", ["x.jsonl", "x.json"])
def test_half_a_surrogate_pair_is_no_character(tmp_path, name):
    content = '{"text": "fine"}\n{"text": "half \\ud800"}\n'
    if name == "x.json":
        content = '["fine", "half \\ud800"]'
    (tmp_path / name).write_text(content)
    with pytest.raises(KronyError, match=r"(line|entry) 2 of .* half of a surrogate pair \(.ud800"):
        list(files.documents(tmp_path / name))


def folder(tmp_path, *names):
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(lines([name]))
    return tmp_path


def found(name, split):
    return [path.name for path in sources.find(str(name), split).paths]


def test_a_folder_is_its_texts(tmp_path):
    folder(tmp_path, "b.jsonl", "a.jsonl", "inner/c.jsonl", ".hidden/d.jsonl")
    (tmp_path / "notes.pdf").write_text("no text")
    assert found(tmp_path, "train") == found(tmp_path, "test") == ["a.jsonl", "b.jsonl", "c.jsonl"]
    assert data.load_text(str(tmp_path)).text == "a.jsonl\n\nb.jsonl\n\ninner/c.jsonl"


def test_splits_of_a_folder_are_kept_apart(tmp_path):
    folder(tmp_path, "train-0.jsonl", "train-1.jsonl", "test.jsonl")
    assert found(tmp_path, "train") == ["train-0.jsonl", "train-1.jsonl"]
    assert found(tmp_path, "test") == ["test.jsonl"]
    with pytest.raises(KronyError, match="has no split 'validation'; there are: test, train"):
        sources.find(f"{tmp_path}::validation")


def test_configurations_of_a_folder(tmp_path):
    folder(tmp_path, "en.jsonl", "de/train.jsonl", "de/test.jsonl")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: en\n  data_files: en.jsonl\n- config_name: de\n"
        "  data_files:\n  - split: train\n    path: de/tr*.jsonl\n  - split: test\n"
        "    path: ['de/test.jsonl', '../*']\n- config_name: all\n  data_dir: de\n---\nA set.\n"
    )
    assert found(f"{tmp_path}:all:test", "train") == ["test.jsonl"]
    assert found(f"{tmp_path}:en", "train") == ["en.jsonl"]
    assert found(f"{tmp_path}:de", "train") == ["train.jsonl"]
    assert found(f"{tmp_path}:de:test", "train") == ["test.jsonl"]
    with pytest.raises(KronyError, match="has the configurations en, de, all; say which one"):
        sources.find(str(tmp_path))
    with pytest.raises(KronyError, match="has no configuration 'fr'; there are: en, de, all"):
        sources.find(f"{tmp_path}:fr")


def test_a_folder_without_texts(tmp_path):
    with pytest.raises(KronyError, match="has no texts in it"):
        data.load_text(str(tmp_path))


def test_names_of_data_sets_on_the_hub():
    found = sources.find("allenai/c4:en:validation")
    assert (found.name, found.configuration, found.split) == ("allenai/c4", "en", "validation")
    assert sources.find("owner/name", "test").origin == "owner/name test"


class Rows(list):
    """As much of a data set as is asked for."""

    column_names = ("content", "url")

    def select_columns(self, names):
        assert names == ["content"]
        return self

    def rename_column(self, old, new):
        return {new: [row[old] for row in self]}


def test_a_set_of_the_hub_by_configuration_and_split(monkeypatch):
    import datasets

    def load(name, configuration, split, streaming):
        assert (name, configuration, split) == ("owner/set", "en", "validation")
        return Rows([{"content": "one"}, {"content": None}, {"content": "two"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert data.load_text("owner/set:en:validation").text == "one\n\ntwo"


def test_what_the_hub_has_is_said_instead_of_blaming_the_network(monkeypatch):
    import datasets

    def load(*_, **__):
        raise ValueError("BuilderConfig 'fr' not found. Available: ['en', 'de']")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(KronyError, match=r"owner/set:fr \(test\) is not there: .*'en', 'de'"):
        data.load_text("owner/set:fr")
