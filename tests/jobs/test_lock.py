"""One job at a time in a folder, whatever becomes of the one before."""

import errno
import fcntl
import os
import socket
import subprocess
import sys
import threading

import pytest

from fastgen.jobs import JobError, lock
from fastgen.jobs.lock import only_job

HOLD = """
import sys, time
from pathlib import Path
from fastgen.jobs.lock import only_job
with only_job(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE", 0.2)


def test_a_second_job_hears_who_has_it_and_the_next_one_finds_no_trace(tmp_path):
    with only_job(tmp_path):
        message = f"another job is at work there: process {os.getpid()} on {socket.gethostname()}"
        with pytest.raises(JobError, match=message), only_job(tmp_path):
            raise AssertionError("two jobs at once")
    assert list(tmp_path.iterdir()) == []
    with only_job(tmp_path):
        pass


def test_a_killed_job_holds_nothing(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(JobError, match=f"process {holder.pid} on"), only_job(tmp_path):
            raise AssertionError("two jobs at once")
    finally:
        holder.kill()
        holder.communicate()
    assert (tmp_path / ".lock").exists()
    with only_job(tmp_path):
        pass


def test_one_that_ends_soon_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE", 30)
    ended = threading.Event()
    handle = os.open(tmp_path / ".lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(handle, fcntl.LOCK_EX)

    def end():
        ended.set()
        os.close(handle)

    threading.Timer(0.3, end).start()
    with only_job(tmp_path):
        assert ended.is_set()


def test_a_lock_file_that_was_removed_locks_nobody_out_and_nobody_in(tmp_path, monkeypatch):
    """Its holder leaves between this job's open and its lock: the lock that it gets is of a file that is no more."""
    real, opened = os.open, []

    def open_then_remove(path, *args):
        handle = real(path, *args)
        if not opened:
            os.unlink(path)
        opened.append(path)
        return handle

    monkeypatch.setattr(os, "open", open_then_remove)
    with only_job(tmp_path):
        assert len(opened) == 2 and (tmp_path / ".lock").exists()
        with pytest.raises(JobError, match="another job"), only_job(tmp_path):
            raise AssertionError("two jobs at once")


def test_a_file_system_without_locks_is_said_so(tmp_path, monkeypatch):
    def flock(handle, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.warns(UserWarning, match="this file system has no locks"), only_job(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_another_error_of_locking_is_raised(tmp_path, monkeypatch):
    def flock(handle, operation):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="Input/output error"), only_job(tmp_path):
        pass
