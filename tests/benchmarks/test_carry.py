"""A file in parts is the same file when it is joined, or nothing."""

import pytest

from gpu import carry


def test_parts_join_to_the_same_bytes(tmp_path):
    whole = tmp_path / "whole.bin"
    whole.write_bytes(bytes(range(256)) * 10)
    parts = carry.cut(whole, tmp_path / "parts", size=1000)
    assert [p.stat().st_size for p in parts] == [1000, 1000, 560]
    carry.join(tmp_path / "parts", tmp_path / "again" / "whole.bin")
    assert (tmp_path / "again" / "whole.bin").read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    ("harm", "message"),
    [(lambda p: p.unlink(), "lacks part-01"), (lambda p: p.write_bytes(b"x"), "once more")],
)
def test_what_did_not_arrive_is_said(harm, message, tmp_path):
    whole = tmp_path / "whole.bin"
    whole.write_bytes(bytes(range(100)))
    parts = carry.cut(whole, tmp_path / "parts", size=40)
    harm(parts[1])
    with pytest.raises(SystemExit, match=message):
        carry.join(tmp_path / "parts", tmp_path / "again")
    assert not (tmp_path / "again").exists()
