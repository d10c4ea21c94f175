"""`open_image_set`: a set of images by the name that a user gives it, whatever it is kept in.

A folder that `fastgen sample` has filled (shards of npz, tar or PNG with a manifest), any tree of PNG and JPEG files, of npz or of
tar files, one npz as the ADM evaluator reads it, one tar, and real digits: `mnist:FOLDER:test`, `digits:held_out`.
"""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._image_set import ImageSet, ImageSetError, JoinedImages, TensorImages
from .digits import SPLITS, load_digits
from .image_arrays import ArrayImages
from .mnist import FILES as MNIST_FILES
from .mnist import LAYOUTS, load_mnist
from .pictures import SUFFIXES, in_order, pictures_in_folder, pictures_in_tar

MANIFEST = "manifest.json"
RECORDS = ".records"  # there while a job runs, and when it was stopped
PICTURE_OF_ALL = "grid.png"  # which `fastgen sample` draws of the first images
FORMATS = {"npz": (".npz",), "webdataset": (".tar",), "png": (".png",)}

_KINDS = {".npz": "npz", ".tar": "tar", **dict.fromkeys(SUFFIXES, "pictures")}


def open_image_set(name: str | os.PathLike[str], *, incomplete: bool = False) -> ImageSet:
    """The images under ``name``: a folder, an npz or tar file, ``mnist:FOLDER:SPLIT`` or ``digits:SPLIT``.

    The order is that of the seeds in the folder of a job; elsewhere that of the paths, numbers in them by their value.

    Args:
        name: of the set. SPLIT is ``train`` or ``test`` of MNIST, ``train`` or ``held_out`` of the 8 x 8 digits.
        incomplete: take what is there of a job that has not finished.

    Raises:
        FileNotFoundError: there is nothing of that name.
        ImageSetError: it cannot be read as images, holds images of several sizes or several kinds of files, or is a job that has
            not finished.
    """
    kind, colon, rest = str(name).partition(":")
    if colon and kind in _NAMED:
        return _NAMED[kind](str(name), rest)
    path = Path(name)
    if path.is_dir():
        return _open_folder(path, incomplete)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such folder or file")
    return _open_files(path, [path])


def _open_folder(folder: Path, incomplete: bool) -> ImageSet:
    manifest = _manifest(folder)
    if manifest is None and not (folder / RECORDS).exists():
        return _open_files(folder, _files(folder, tuple(_KINDS)))
    complete = manifest is not None and manifest.get("complete") is True and not (folder / RECORDS).exists()
    if not complete and not incomplete:
        raise ImageSetError(
            f"{folder}: the job there has not finished: run it again, it does the rest, or take what is there with --incomplete"
        )
    shards = _shards(folder, manifest) if complete and manifest is not None else None
    form = manifest["settings"].get("format") if manifest is not None else None
    if form not in (*FORMATS, None):
        raise ImageSetError(f"{folder}: the job there wrote {form}, images of {', '.join(FORMATS)} are read")
    suffixes = FORMATS[form] if form else tuple(_KINDS)
    if shards is None or form == "png":
        listed = _files(folder, suffixes)
        files = [file for file in listed if file.relative_to(folder) != Path(PICTURE_OF_ALL)]
    else:
        files = [folder / shard["name"] for shard in shards]
    images = _open_files(folder, files)
    due = sum(shard["num"] for shard in shards) if shards is not None else len(images)
    if len(images) != due:
        raise ImageSetError(f"{folder}: must hold the {due} images of its {MANIFEST}, got {len(images)}")
    return images


def _open_files(name: Path, files: Sequence[Path]) -> ImageSet:
    """One set of ``files`` that are all of one kind."""
    kinds = {_KINDS.get(file.suffix.lower(), file.suffix) for file in files}
    if not kinds:
        hint = " (for the IDX files of MNIST say mnist:FOLDER:test)" if _has_mnist(name) else ""
        raise ImageSetError(f"{name}: holds no images: no {', '.join(_KINDS)}{hint}")
    if len(kinds) > 1:
        raise ImageSetError(f"{name}: must hold images of one kind, got {' and '.join(sorted(kinds))}")
    kind = kinds.pop()
    if kind == "pictures":
        return pictures_in_folder(name if name.is_dir() else name.parent, files)
    if kind not in ("npz", "tar"):
        raise ImageSetError(f"{name}: must be a folder, an npz or a tar file")
    opened: Callable[[Path], ImageSet] = ArrayImages if kind == "npz" else pictures_in_tar
    parts = [opened(file) for file in files]
    return parts[0] if name == files[0] else JoinedImages(str(name), parts)


def _files(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """The files of these suffixes below ``folder``, hidden ones and what is in hidden folders left out, in their order."""
    found = []
    for where, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            Path(where, name)
            for name in names
            if os.path.splitext(name)[1].lower() in suffixes and not name.startswith(".")
        ]
    return sorted(found, key=lambda file: in_order(file.relative_to(folder).as_posix()))


def _manifest(folder: Path) -> dict[str, Any] | None:
    path = folder / MANIFEST
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or not isinstance(found.get("settings"), dict):
            raise ValueError("no settings in it")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, RecursionError) as error:
        raise ImageSetError(f"{path}: not the manifest of a job: {error}") from error
    return found


def _shards(folder: Path, manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """What the manifest of a finished job says of its shards, by their seeds; each is there."""
    try:
        shards = sorted(manifest["shards"], key=lambda shard: shard["first_seed"])
        names = [folder / shard["name"] for shard in shards]
        _ = sum(shard["num"] for shard in shards)
    except (KeyError, TypeError) as error:
        raise ImageSetError(f"{folder / MANIFEST}: not the manifest of a job: {error}") from error
    for path in names:
        if not path.exists():
            raise ImageSetError(f"{path}: is missing, the {MANIFEST} beside it has it")
    return shards


def _has_mnist(folder: Path) -> bool:
    names = [f"{name}{packed}" for pair in MNIST_FILES.values() for name in pair for packed in ("", ".gz")]
    return any((folder / layout / name).is_file() for layout in LAYOUTS for name in names)


def _open_mnist(name: str, rest: str) -> ImageSet:
    folder, _, split = rest.rpartition(":")
    if not folder or split not in MNIST_FILES:
        raise ImageSetError(f"{name}: must be mnist:FOLDER:SPLIT, SPLIT one of {', '.join(MNIST_FILES)}")
    try:
        images, labels = load_mnist(folder, split)
    except ValueError as error:  # begins with the file
        raise ImageSetError(str(error)) from error
    return TensorImages(name, _to_bytes(images), labels)


def _open_digits(name: str, rest: str) -> ImageSet:
    if rest not in SPLITS:
        raise ImageSetError(f"{name}: must be digits:SPLIT, SPLIT one of {', '.join(SPLITS)}")
    images, labels = load_digits(rest)
    return TensorImages(name, _to_bytes(images), labels)


def _to_bytes(images: Tensor) -> Tensor:
    """[N, C, H, W] in [-1, 1] -> uint8, rounded as `fastgen sample` rounds."""
    return ((images + 1) * 127.5).round().to(torch.uint8)


_NAMED: dict[str, Callable[[str, str], ImageSet]] = {"mnist": _open_mnist, "digits": _open_digits}
