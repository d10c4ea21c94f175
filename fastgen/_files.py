"""Files that are there whole or not at all: written beside their place, then renamed into it."""

import contextlib
import errno
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

LEFTOVER = re.compile(r"\.(.+)\.[^.]+\.tmp", re.DOTALL)  # the name of a temporary folder, and in it that of the file
# What file systems say that have no locks, or whose lock server does not answer.
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


def write_atomically(path: str | os.PathLike[str], write: Callable[[Path], Any], *, durable: bool = False) -> None:
    """Call ``write`` with a temporary name, then rename what it wrote to ``path``: a crash leaves the old file or the new one.

    Args:
        path: the file, or a folder of files; the folder it is in is made where it is missing.
        write: writes a file of the name it is given, which ends as ``path`` does; or makes a folder of that name, with files in it.
        durable: wait until file and folder are on the disk, so that a power failure too leaves one of the two.

    The temporary name is in a folder of its own beside ``path``, so that what ``write`` leaves there when it is killed, temporary
    files of its own too, can be told and removed (:func:`remove_leftovers`).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    try:
        with _locked(folder, needed=False):
            temporary = folder / path.name
            write(temporary)
            is_folder = temporary.is_dir()
            # some writers make files that only their owner reads
            os.chmod(temporary, (0o777 if is_folder else 0o666) & ~_umask())
            if durable:
                for file in [*temporary.iterdir(), temporary] if is_folder else [temporary]:
                    _to_disk(file)
            if is_folder:
                _replace_folder(temporary, path)
            else:
                os.replace(temporary, path)
        if durable:
            _to_disk(path.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers(path: str | os.PathLike[str]) -> None:
    """Remove what :func:`write_atomically` left beside ``path`` where its process was killed; one still writing is left alone."""
    path = Path(path)
    remove_all_leftovers(path.parent, [path.name])


def remove_all_leftovers(folder: Path, names: Container[str]) -> None:
    """:func:`remove_leftovers` of all files of ``names`` in ``folder``, which is listed once."""
    with os.scandir(folder) as entries:
        for entry in entries:
            left = LEFTOVER.fullmatch(entry.name)
            if left and left[1] in names:
                with contextlib.suppress(OSError), _locked(Path(entry.path)):
                    shutil.rmtree(entry.path)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise OSError, naming ``path``, where a file of that name could not be written; its folder is made where it is missing."""
    path = Path(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder, the name of a file is wanted")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OSError(f"{path}: cannot be written: {error.strerror}") from error


@contextlib.contextmanager
def _locked(folder: Path, needed: bool = True) -> Any:
    """Hold ``folder`` for this process; BlockingIOError where another has it. The system lets go where a process is killed.

    Where it is not ``needed``, a file system without locks will do: then nobody removes the folder of a killed process.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if needed or error.errno not in WITHOUT_LOCKS:
                raise
        yield
    finally:
        os.close(handle)


def _replace_folder(source: Path, path: Path) -> None:
    """Rename the folder ``source`` to ``path``, which the system does only once what was there has gone."""
    while True:
        try:
            return os.replace(source, path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(path)


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():  # some network file systems sync no folders
            raise
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
