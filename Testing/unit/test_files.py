"""Files are whole or absent."""

from __future__ import annotations

import pytest

from ClinicalFMambaLib.errors import OutputError
from ClinicalFMambaLib.files import replacing, write_text


def test_text_replaces_what_was_there(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "one")
    write_text(path, "zwölf")
    assert path.read_text(encoding="utf-8") == "zwölf"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_an_error_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(ZeroDivisionError), replacing(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_missing_folder_is_one_clear_line(tmp_path):
    with pytest.raises(OutputError, match="cannot be written"):
        write_text(tmp_path / "no" / "a.txt", "x")
