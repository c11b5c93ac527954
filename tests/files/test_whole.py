"""Small files that stand whole or not at all."""

import os
from pathlib import Path

import pytest

from d2surgery.files.whole import PARTIAL, write_whole


def test_it_is_written_in_utf8_in_the_place_of_what_stood_there(tmp_path: Path) -> None:
    path = tmp_path / "note"
    path.write_text("as it was, and longer")
    write_whole(path, "‖delta‖\n")
    assert path.read_bytes() == "‖delta‖\n".encode()
    assert list(tmp_path.iterdir()) == [path]


def test_what_fails_leaves_what_stood_there_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "note"
    path.write_text("as it was")
    seen = []

    def fails(partial: Path, target: Path) -> None:
        seen.append(partial.name)
        raise OSError("no")

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(OSError, match="no"):
        write_whole(path, "something else")
    assert path.read_text() == "as it was"
    assert list(tmp_path.iterdir()) == [path]
    assert seen[0].startswith(".note.")
    assert seen[0].endswith(PARTIAL)


def test_text_that_cannot_be_encoded_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UnicodeEncodeError):
        write_whole(tmp_path / "note", "\ud800")
    assert list(tmp_path.iterdir()) == []


def test_links_that_were_laid_in_its_way_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / f".note.{os.getpid()}{PARTIAL}").symlink_to("precious")
    (tmp_path / "note").symlink_to("precious")
    write_whole(tmp_path / "note", "text")
    assert (tmp_path / "precious").read_text() == "mine"
    assert not (tmp_path / "note").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["note", "precious"]
