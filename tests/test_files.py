"""Files written whole or not at all: what a failed write, a killed one and a second writer leave."""

import errno
import fcntl
import os
import signal
import stat
import subprocess
import sys

import pytest

from fastgen._files import check_writable, remove_leftovers, write_atomically

HOLD = """
import sys, time
from pathlib import Path
from fastgen._files import write_atomically

def slowly(name):
    name.write_text("half")
    print("writing", flush=True)
    time.sleep(60)

write_atomically(Path(sys.argv[1]), slowly)
"""


UMASK = os.umask(0)
os.umask(UMASK)


@pytest.fixture
def writer(tmp_path):
    """A process in the middle of writing ``tmp_path / "x"``."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "x")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "writing\n"
    yield process
    process.kill()
    process.wait()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_failed_write_leaves_the_old_file_alone(tmp_path):
    (tmp_path / "x").write_text("old")

    def fail(path):
        path.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(tmp_path / "x", fail)
    assert names(tmp_path) == ["x"] and (tmp_path / "x").read_text() == "old"


def test_it_makes_folders_and_forces_file_and_folder_to_the_disk(tmp_path, monkeypatch):
    forced = []
    real = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda handle: (forced.append(os.readlink(f"/proc/self/fd/{handle}")), real(handle))
    )
    write_atomically(tmp_path / "a" / "x", lambda path: path.write_text("new"), durable=True)
    assert (tmp_path / "a" / "x").read_text() == "new" and names(tmp_path / "a") == ["x"]
    file, folder = forced
    assert file.endswith(".tmp/x") and folder == str(tmp_path / "a")


def test_a_folder_takes_the_place_of_another(tmp_path, monkeypatch):
    forced = []
    real = os.fsync
    monkeypatch.setattr(
        os,
        "fsync",
        lambda handle: (forced.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}"))), real(handle)),
    )

    def fill(*files):
        def write(folder):
            folder.mkdir(mode=0o700)
            for name in files:
                (folder / name).write_text(name)

        return write

    write_atomically(tmp_path / "x", fill("a", "b"), durable=True)
    assert (
        names(tmp_path / "x") == ["a", "b"] and sorted(forced[:2]) == ["a", "b"] and forced[2:] == ["x", tmp_path.name]
    )
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o777 & ~UMASK
    write_atomically(tmp_path / "x", fill("c"))
    assert names(tmp_path / "x") == ["c"] and names(tmp_path) == ["x"]
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        write_atomically(tmp_path / "file", fill("c"))
    assert names(tmp_path) == ["file", "x"]


def test_file_systems_that_lock_nothing_and_sync_no_folders(tmp_path, monkeypatch):
    real = os.fsync

    def fsync(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(handle)

    def flock(handle, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(fcntl, "flock", flock)
    write_atomically(tmp_path / "x", lambda path: path.write_text("new"), durable=True)
    assert names(tmp_path) == ["x"]
    (tmp_path / ".x.abc.tmp").mkdir()  # of a living process perhaps
    remove_leftovers(tmp_path / "x")
    assert names(tmp_path) == [".x.abc.tmp", "x"]
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(OSError, match="Input/output error"):
        write_atomically(tmp_path / "x", lambda path: path.write_text("newer"), durable=True)
    assert (tmp_path / "x").read_text() == "new"


def test_leftovers_of_a_killed_process_go_and_those_of_a_living_one_stay(tmp_path, writer):
    (tmp_path / "x").write_text("old")
    (tmp_path / ".x.y").write_text("somebody else's")
    before = names(tmp_path)
    assert len(before) == 3
    remove_leftovers(tmp_path / "x")
    assert names(tmp_path) == before
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert names(tmp_path) == before
    remove_leftovers(tmp_path / "x")
    assert names(tmp_path) == [".x.y", "x"] and (tmp_path / "x").read_text() == "old"


def test_names_with_wildcards(tmp_path):
    (tmp_path / ".x1.abc.tmp").mkdir()
    (tmp_path / ".x[1].abc.tmp").mkdir()
    remove_leftovers(tmp_path / "x[1]")
    assert names(tmp_path) == [".x1.abc.tmp"]


def test_where_nothing_can_be_written(tmp_path):
    check_writable(tmp_path / "new" / "x")
    assert names(tmp_path) == ["new"] and names(tmp_path / "new") == []
    with pytest.raises(OSError, match="new: cannot be written: it is a folder"):
        check_writable(tmp_path / "new")
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file/x: cannot be written: (Not a directory|File exists)"):
        check_writable(tmp_path / "file" / "x")
    with pytest.raises(OSError, match=r"/proc/x: cannot be written"):
        check_writable("/proc/x")
    with pytest.raises(OSError, match="x: cannot be written: File name too long"):
        check_writable(tmp_path / ("x" * 300))
