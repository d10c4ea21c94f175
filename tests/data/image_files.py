"""Small sets of images on disk, in every layout that is read."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import torch

from fastgen.data import png


def images(n=10, shape=(3, 6, 5), seed=0):
    """[n, H, W, C] uint8 and labels [n]."""
    channels, height, width = shape
    drawn = np.random.default_rng(seed).integers(0, 256, (n, height, width, channels), dtype=np.uint8)
    return drawn, np.arange(n) % 4


def as_tensor(pixels):
    """[n, H, W, C] as a set of images returns it."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))


def write_tar(path, pixels, labels=None, first=0):
    with tarfile.open(path, "w") as archive:
        for k, image in enumerate(pixels):
            members = {f"{first + k:06d}.png": png(image)}
            if labels is not None:
                members[f"{first + k:06d}.cls"] = str(labels[k]).encode()
            for name, data in members.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def write_job(folder, form, pixels, labels=None, *, shard=4, seed=0, complete=True, manifest=True):
    """The folder of a job of `fastgen sample`, with the picture of all images beside its shards."""
    folder.mkdir(parents=True)
    (folder / "grid.png").write_bytes(png(np.zeros((9, 9, 3), np.uint8)))
    hidden = folder / ".000000.npz.abc.tmp"  # what a killed process has left
    hidden.mkdir()
    (hidden / "000000.npz").write_bytes(b"half")
    (hidden / "000000.png").write_bytes(b"half")
    shards, classes = [], []
    for start in range(0, len(pixels), shard):
        part = pixels[start : start + shard]
        own = None if labels is None else labels[start : start + shard]
        first = seed + start
        name = f"{first:06d}" + {"npz": ".npz", "webdataset": ".tar", "png": ""}[form]
        if form == "npz":
            arrays = {"arr_0": part, "seeds": np.arange(first, first + len(part))}
            np.savez(folder / name, **arrays | ({} if own is None else {"labels": own}))
        elif form == "webdataset":
            write_tar(folder / name, part, own, first)
        else:
            (folder / name).mkdir()
            for k, image in enumerate(part):
                (folder / name / f"{first + k:06d}.png").write_bytes(png(image))
                classes.append([f"{name}/{first + k:06d}.png", None if own is None else int(own[k])])
        shards.append({"name": name, "first_seed": first, "num": len(part), "sha256": "", "bytes": 0, "drawn_on": ""})
    if form == "png" and labels is not None:
        (folder / "dataset.json").write_text(json.dumps({"labels": classes}))
    if not complete:
        (folder / ".records").mkdir()
    if manifest:
        content = {"format_version": 1, "settings": {"format": form}, "complete": complete, "shards": shards}
        (folder / "manifest.json").write_text(json.dumps(content))
    return Path(folder)
