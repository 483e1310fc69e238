"""Where data is found, and what is kept of it."""

import errno
import os
import stat
import time

import numpy as np
import pytest

from research import UserError
from research.data import files


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ERGON_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "data"


def counting(folder):
    np.save(folder / "x.npy", np.arange(1000))


def test_data_is_found_as_it_stands_and_then_below_the_folder(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "root" / "here").mkdir(parents=True)
    (tmp_path / "root" / "there").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ERGON_DATA", raising=False)
    with pytest.raises(UserError, match="no data at there; ERGON_DATA may name its folder"):
        files.find("there")
    monkeypatch.setenv("ERGON_DATA", str(tmp_path / "root"))
    assert files.find("here").resolve() == tmp_path / "here"
    assert files.find("there") == tmp_path / "root" / "there"
    with pytest.raises(UserError, match="no data at nowhere, nor below ERGON_DATA = "):
        files.find("nowhere")


def test_a_folder_is_filled_once_for_each_key(cache):
    made = []

    def make(folder):
        made.append(folder)
        counting(folder)

    first, again, other = (files.cached(key, make) for key in (["a", 1], ["a", 1], ["a", 2]))
    assert first == again != other
    assert len(made) == 2
    np.testing.assert_array_equal(files.mapped(first)["x"], np.arange(1000))
    assert set(cache.iterdir()) == {first, other}
    others = stat.S_IMODE(cache.stat().st_mode)  # who may read the cache may read what is in it
    assert stat.S_IMODE(first.stat().st_mode) == others


def test_of_two_that_fill_it_at_once_the_first_stays(cache):
    def late(folder):
        np.save(folder / "x.npy", np.zeros(3))
        files.cached("key", counting)

    folder = files.cached("key", late)
    assert len(files.mapped(folder)["x"]) == 1000
    assert [*cache.iterdir()] == [folder]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), UserError("bad row")])
def test_what_is_interrupted_leaves_nothing(cache, error):
    def broken(folder):
        counting(folder)
        raise error

    with pytest.raises(type(error)):
        files.cached("key", broken)
    assert not [*cache.iterdir()]
    assert "x" in files.mapped(files.cached("key", counting))


def test_what_cannot_be_written_is_said(cache):
    def full(folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match=f"cannot keep data in {cache}: .*No space left on device"):
        files.cached("key", full)
    cache.rmdir()
    cache.write_text("a file")
    with pytest.raises(UserError, match=f"cannot keep data in {cache}: "):
        files.cached("key", counting)


def test_what_a_killed_process_left_is_removed_a_day_later(cache):
    old, young = cache / ".a.1", cache / ".a.2"
    for folder in (old, young):
        (folder / "whole").mkdir(parents=True)
    long_ago = time.time() - files.DAY - 60
    for path in (old / "whole", old):
        os.utime(path, (long_ago, long_ago))
    kept = files.cached("key", counting)
    assert set(cache.iterdir()) == {young, kept}


@pytest.mark.parametrize("kept", [0, 60, 500])
def test_a_damaged_array_is_said(kept):
    folder = files.cached("key", counting)
    path = folder / "x.npy"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match=f"{folder} is damaged .*: remove it"):
        files.mapped(folder)
