"""Files and directories that appear whole or not at all."""

import errno
import os

import pytest
from refusal import refused

from ig_jax.base.files import atomic_directory, atomic_file, is_dir, is_file, local_path, lock, user_path
from ig_jax.training import workdir
from ig_jax.training.workdir import Lease


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
    with refused("path", str(out)), atomic_directory(out) as directory:
        (directory / "other").write_bytes(b"other")
    assert os.listdir(tmp_path / "deep") == ["out"] and os.listdir(out) == ["whole"]


@pytest.mark.parametrize("make", [atomic_file, atomic_directory])
def test_what_cannot_be_written_is_one_line_with_the_path_and_the_mend(tmp_path, make):
    (tmp_path / "file").write_bytes(b"not a folder")
    with refused("path", str(tmp_path / "file" / "a"), fix="name a folder", says="cannot write"):
        with make(tmp_path / "file" / "a"):
            pass
    assert os.listdir(tmp_path) == ["file"]


def test_a_path_of_a_user_is_absolute_with_its_home_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert user_path("~/runs") == user_path("runs") == tmp_path / "runs"


@pytest.mark.parametrize(
    "text", ["gs://bucket/run", "s3://bucket/a b", "https://x.org/w.pt", "file://host/run", "gs:///"]
)
def test_a_url_is_no_place_on_a_file_system(text):
    with refused("--out", text, expected="not a URL", fix="mount its bucket"):
        local_path(text, "--out")


@pytest.mark.parametrize("text", ["x" * 5000, "x" * 300, "a\0b", "~a_user_that_nobody_is/x", "loop/x"])
def test_a_path_that_the_system_cannot_look_for_is_refused(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.symlink("loop", "loop")
    with refused("workdir", text, expected="a path that can be used ("):
        local_path(text, "workdir")
    assert not is_file(text) and not is_dir(text)


@pytest.mark.parametrize("text", ["with space é", "lr=1e-3,bs=16", "a:b", "link", "file", "deep/er", "file/x", "☃"])
def test_other_names_are_taken_as_they_are(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    os.symlink(tmp_path, "link")
    assert local_path(text, "out") == user_path(text) == tmp_path / text
    assert local_path(f"file://{tmp_path}/{text}", "out") == tmp_path / text
    assert is_dir(text) == (text == "link") and is_file(text) == (text == "file")


def test_a_home_is_found_without_the_variable(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    assert str(local_path("~/x", "out")) == "/somewhere/x"
    monkeypatch.delenv("HOME")
    assert local_path("~/x", "out").is_absolute()


def test_a_lock_is_held_by_one_and_freed_by_closing(tmp_path, capsys):
    with open(tmp_path / "lock", "w") as first, open(tmp_path / "lock", "w") as second:
        assert lock(first, tmp_path) and not lock(second, tmp_path)
        first.close()
        assert lock(second, tmp_path)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_warned_of_and_used(number, tmp_path, monkeypatch, capsys):
    def flock(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    with Lease(workdir.prepare(str(tmp_path / "run"))):
        pass
    err = capsys.readouterr().err
    assert err.startswith("ig_jax: warning: ") and "cannot be locked" in err and err.count("\n") == 1
