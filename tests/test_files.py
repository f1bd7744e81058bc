"""Files and directories that appear whole or not at all."""

import os

import pytest

from ig_jax.errors import UserError
from ig_jax.files import atomic_directory, atomic_file


def test_failed_write_leaves_the_old_file_and_no_debris(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), atomic_file(path) as file:
        file.write(b"half of the new")
        assert path.read_bytes() == b"old"
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.bin"]
    with atomic_file(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["a.bin"]


def test_new_file_has_the_permissions_of_any_other(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    with atomic_file(tmp_path / "atomic") as file:
        file.write(b"")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_directory_appears_whole_or_not_at_all(tmp_path):
    out = tmp_path / "deep" / "out"
    with pytest.raises(KeyboardInterrupt), atomic_directory(out) as directory:
        (directory / "below").mkdir()
        (directory / "below" / "half").write_bytes(b"half")
        assert not out.exists()
        raise KeyboardInterrupt
    assert os.listdir(tmp_path / "deep") == []
    out.mkdir()  # an empty one gives way
    with atomic_directory(out) as directory:
        (directory / "whole").write_bytes(b"whole")
    assert os.listdir(tmp_path / "deep") == ["out"] and os.listdir(out) == ["whole"]
    with pytest.raises(UserError, match="cannot write"), atomic_directory(out) as directory:
        (directory / "other").write_bytes(b"other")
    assert os.listdir(tmp_path / "deep") == ["out"] and os.listdir(out) == ["whole"]


@pytest.mark.parametrize("make", [atomic_file, atomic_directory])
def test_what_cannot_be_written_is_one_line_with_the_path_and_the_mend(tmp_path, make):
    (tmp_path / "file").write_bytes(b"not a folder")
    with pytest.raises(UserError, match="^cannot write '.*file/a': [^\n]*; name a folder[^\n]*$"):
        with make(tmp_path / "file" / "a"):
            pass
    assert os.listdir(tmp_path) == ["file"]
