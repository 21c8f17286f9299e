"""Files and folders appear whole or not at all."""

import errno
import os
import re
import subprocess
import sys

import pytest

from mlx_kvret.core.files import require_free, whole_file, whole_folder
from mlx_kvret.errors import ConfigError

FULL = OSError(errno.ENOSPC, "No space left on device")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("there", [False, True])
def test_folder_appears_at_the_end(tmp_path, there):
    target = tmp_path / "deep" / "er" / "out" if not there else tmp_path / "out"
    if there:
        target.mkdir()
    with whole_folder(target) as scratch:
        (scratch / "a").write_text("content")
        assert scratch.parent == target.parent and (not target.exists() or not names(target))
    assert names(target) == ["a"] and names(target.parent) == ["out"]


@pytest.mark.parametrize("there", [False, True])
def test_file_is_replaced_at_the_end(tmp_path, there):
    target = tmp_path / "out.json"
    if there:
        target.write_text("old")
    with whole_file(target) as scratch:
        scratch.write_text("new")
        assert scratch.suffix == ".json"
        assert target.read_text() == "old" if there else not target.exists()
    assert target.read_text() == "new" and names(tmp_path) == ["out.json"]


@pytest.mark.parametrize(
    ("error", "expected"),
    [(FULL, ConfigError), (KeyboardInterrupt(), KeyboardInterrupt), (ValueError("bug"), ValueError)],
)
def test_failure_leaves_what_was_there(tmp_path, error, expected):
    (tmp_path / "old").write_text("old")
    with pytest.raises(expected) as caught, whole_file(tmp_path / "old") as scratch:
        scratch.write_text("half")
        raise error
    with pytest.raises(expected), whole_folder(tmp_path / "new") as scratch:
        (scratch / "half").write_text("half")
        raise error
    assert (tmp_path / "old").read_text() == "old" and names(tmp_path) == ["old"]
    if error is FULL:
        assert "old: No space left on device; it is as it was before" in str(caught.value)
        assert caught.value.__cause__ is FULL


def test_modes_are_those_of_any_new_file(tmp_path):
    (tmp_path / "plain").touch()
    (tmp_path / "folder").mkdir()
    with whole_file(tmp_path / "file") as scratch:
        scratch.write_text("x")
    with whole_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "folder").stat().st_mode


@pytest.mark.parametrize("kind", ["file", "full folder", "dangling link"])
def test_place_that_is_taken(tmp_path, kind):
    target = tmp_path / "out"
    if kind == "file":
        target.touch()
    elif kind == "full folder":
        (target / "a").mkdir(parents=True)
    else:
        target.symlink_to(tmp_path / "absent")
    for writer in (require_free, lambda t: whole_folder(t).__enter__()):
        with pytest.raises(ConfigError, match="exists already; choose another destination"):
            writer(target)
    assert names(tmp_path) == ["out"]


def test_place_that_fills_up_meanwhile(tmp_path):
    with pytest.raises(ConfigError, match="cannot write"), whole_folder(tmp_path / "out"):
        (tmp_path / "out" / "a").mkdir(parents=True)
    assert names(tmp_path / "out") == ["a"] and names(tmp_path) == ["out"]


@pytest.mark.parametrize("writer", [whole_file, whole_folder])
def test_place_that_cannot_be_written(tmp_path, writer):
    (tmp_path / "file").touch()
    for target in (tmp_path / "file" / "out", tmp_path / ("x" * 300), "/proc/nothing/out"):
        with pytest.raises(ConfigError, match=r"cannot write .* mend the cause"), writer(target):
            pass
    assert names(tmp_path) == ["file"]


def test_a_long_name_is_no_obstacle(tmp_path):
    name = "x" * 250 + ".json"
    with whole_file(tmp_path / name) as scratch:
        scratch.write_text("x")
    assert names(tmp_path) == [name]


def test_home_and_relative_places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert require_free("~/out") == require_free("out") == tmp_path / "out"


@pytest.fixture
def gone():
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def left_behind(folder, name, process):
    """What a writer of ``name`` leaves if it is killed as this process."""
    with whole_file(folder / name) as scratch:
        own = scratch.name
    (folder / name).unlink()
    return folder / own.replace(f"-{os.getpid()}-", f"-{process}-")


@pytest.mark.parametrize("writer", [whole_file, whole_folder])
def test_what_a_killed_writer_left_goes_with_the_next_one(tmp_path, gone, writer):
    dead = [left_behind(tmp_path, name, gone) for name in ("a.json", "b")]
    dead[0].write_text("half")
    (dead[1] / "deep").mkdir(parents=True)
    alive = left_behind(tmp_path, "a.json", os.getpid())
    elsewhere = dead[0].with_name(re.sub(r"kvret-[0-9a-f]{12}", "kvret-0123456789ab", dead[0].name))
    link = left_behind(tmp_path, "c", gone)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").touch()
    link.symlink_to(tmp_path / "precious")
    others = [alive, elsewhere, *(tmp_path / name for name in (".git", ".env", ".a.kvret-x.json", "a.kvret"))]
    for other in others:
        other.touch()
    with writer(tmp_path / "new"):
        pass
    assert names(tmp_path) == sorted([*(path.name for path in others), "new", "precious"])
    assert names(tmp_path / "precious") == ["file"]


def test_modes_are_kept_and_private_files_private(tmp_path):
    for mode in (0o600, 0o640, 0o444, 0o755):
        (tmp_path / "old").touch()
        (tmp_path / "old").chmod(mode)
        with whole_file(tmp_path / "old") as scratch:
            assert scratch.stat().st_mode & 0o077 == 0
            scratch.write_text("new")
        assert (tmp_path / "old").stat().st_mode & 0o777 == mode
    with whole_file(tmp_path / "new", private=True) as scratch:
        assert scratch.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("there", [False, True])
def test_links_are_followed(tmp_path, there):
    (tmp_path / "far").mkdir()
    if there:
        (tmp_path / "far" / "file").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "middle")
    (tmp_path / "middle").symlink_to("far/file")
    with whole_file(tmp_path / "link") as scratch:
        assert scratch.parent == tmp_path / "far"
        scratch.write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "middle").is_symlink()
    assert (tmp_path / "far" / "file").read_text() == "new" and names(tmp_path / "far") == ["file"]


def test_an_empty_folder_behind_a_link_is_filled(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "far")
    with whole_folder(tmp_path / "link") as scratch:
        (scratch / "a").touch()
    assert (tmp_path / "link").is_symlink() and names(tmp_path / "far") == ["a"]


@pytest.mark.parametrize("name", ["/dev/null", "folder", "pipe", "loop"])
def test_what_is_no_file_is_not_replaced(tmp_path, name):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ConfigError, match="cannot write"), whole_file(tmp_path / name):
        pass
    assert names(tmp_path) == ["folder", "loop", "pipe"]


def test_long_names_in_other_scripts(tmp_path):
    name = "語" * 80 + ".json"
    with whole_file(tmp_path / name) as scratch:
        scratch.write_text("x")
    assert names(tmp_path) == [name]
