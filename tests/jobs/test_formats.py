"""Shards as files: read back by other programs, and of bytes that hang on nothing but what was drawn."""

import io
import json
import os
import tarfile
import time
import zipfile

import numpy as np
import pytest
import torch

from fastgen.jobs import FORMATS, Csv, Drawn, run
from fastgen.jobs.formats import digest

from ..backends import import_peer
from .tiny_job import TinyJob

LABELS = np.array([3, 1, 4], dtype=np.int64)


def drawn(channels=1, labels=LABELS):
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 6, channels), dtype=np.uint8)
    return Drawn(images, np.array([7, 8, 9]), labels)


def written(path, name, what):
    FORMATS[name]().write(path, what)
    return path


def read_png(data):
    image = import_peer("matplotlib.image")
    return (image.imread(io.BytesIO(data)) * 255).round().astype(np.uint8)


def test_npz_is_read_by_numpy(tmp_path):
    what = drawn(channels=2)
    with np.load(written(tmp_path / "x.npz", "npz", what), allow_pickle=False) as file:
        assert list(file) == ["arr_0", "labels", "seeds"]
        for array, expected in zip(file.values(), (what.data, what.labels, what.seeds), strict=True):
            assert array.dtype == expected.dtype and np.array_equal(array, expected)
    with zipfile.ZipFile(tmp_path / "x.npz") as archive:
        for member in archive.infolist():  # a reader may map it, and finds no date
            assert member.compress_type == zipfile.ZIP_STORED and member.date_time == (1980, 1, 1, 0, 0, 0)


def test_npz_of_rows_without_classes(tmp_path):
    rows = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)
    with np.load(written(tmp_path / "x.npz", "npz", Drawn(rows, np.arange(3), None))) as file:
        assert list(file) == ["arr_0", "seeds"] and file["arr_0"].dtype == np.float32
        assert np.array_equal(file["arr_0"], rows)


@pytest.mark.parametrize("channels", [1, 3])
def test_webdataset_is_a_tar_of_pictures_and_classes(tmp_path, channels):
    what = drawn(channels)
    with tarfile.open(written(tmp_path / "x.tar", "webdataset", what)) as archive:
        names = [f"{seed:06d}.{kind}" for seed in (7, 8, 9) for kind in ("png", "cls")]
        assert archive.getnames() == names  # a picture and its class together, as WebDataset groups them
        files = {member.name: archive.extractfile(member).read() for member in archive}
        assert {(member.mtime, member.uid, member.uname) for member in archive} == {(0, 0, "")}
    for i, seed in enumerate((7, 8, 9)):
        pixels = read_png(files[f"{seed:06d}.png"])
        assert np.array_equal(pixels.reshape(4, 6, -1), what.data[i]) and files[f"{seed:06d}.cls"] == b"%d" % LABELS[i]
    with tarfile.open(written(tmp_path / "y.tar", "webdataset", drawn(labels=None))) as archive:
        assert archive.getnames() == ["000007.png", "000008.png", "000009.png"]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_png_folder_is_read_as_edm_reads_it(tmp_path, channels):
    labels = torch.arange(10) * 7 % 5
    job = TinyJob(10, shape=(channels, 4, 6), shard_size=4, batch_size=3, labels=labels)
    run(job, tmp_path, format="png", progress=False)
    # as edm/training/dataset.py: all files, those that are images in the order of their names, classes by these names
    files = {
        os.path.relpath(os.path.join(root, name), tmp_path) for root, _, names in os.walk(tmp_path) for name in names
    }
    images = sorted(name for name in files if name.endswith(".png"))
    classes = dict(json.loads((tmp_path / "dataset.json").read_text())["labels"])
    assert images[:5] == [*(f"000000/{k:06d}.png" for k in range(4)), "000004/000004.png"]
    assert [classes[name] for name in images] == labels.tolist()
    expected = np.concatenate([job.draw(job.shard(index)).data for index in range(len(job))])
    assert np.array_equal([read_png((tmp_path / name).read_bytes()).reshape(4, 6, -1) for name in images], expected)


def test_a_png_folder_without_classes_has_no_list_of_them(tmp_path):
    run(TinyJob(3), tmp_path, format="png", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000", "manifest.json"]


def test_csv(tmp_path):
    rows = np.array([[1.0, -2.0], [0.1, 1e-9]], dtype=np.float32)
    what = Drawn(rows, np.arange(2), None)
    Csv(["length", 'so-called "age"']).write(tmp_path / "x.csv", what)
    assert (tmp_path / "x.csv").read_text() == '"length","so-called ""age"""\n1,-2\n0.1,1e-09\n'
    Csv().write(tmp_path / "y.csv", what)
    assert (tmp_path / "y.csv").read_text() == '"0","1"\n1,-2\n0.1,1e-09\n'
    assert Csv(["a"]).settings == {"format": "csv", "columns": ["a"]}


@pytest.mark.parametrize("name", FORMATS)
def test_bytes_depend_on_nothing_else(tmp_path, name, monkeypatch):
    what = Drawn(np.eye(2, dtype=np.float32), np.arange(2), None) if name == "csv" else drawn()
    first = digest(written(tmp_path / "first", name, what))
    monkeypatch.setattr(time, "time", lambda: 2e9)
    old = os.umask(0o077)
    try:
        assert digest(written(tmp_path / "second", name, what)) == first
    finally:
        os.umask(old)
    other = what._replace(data=what.data[::-1])
    assert digest(written(tmp_path / "third", name, other))[0] != first[0]
    assert FORMATS[name]().settings["format"] == name


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("webdataset", (2, 4, 4), "format 'webdataset' has grey or RGB images, not 2 channels"),
        ("png", (4, 4, 4), "format 'png' has grey or RGB images, not 4 channels"),
        ("png", (5,), "format 'png' is for images, not for rows of 5 numbers"),
        ("csv", (1, 4, 4), "format 'csv' is for rows of numbers, not for images"),
    ],
)
def test_a_format_that_does_not_suit_is_refused_before_anything_is_written(tmp_path, name, shape, reason):
    with pytest.raises(ValueError, match=reason):
        run(TinyJob(3, shape=shape), tmp_path / "x", format=name)
    assert not (tmp_path / "x").exists()


def test_refused_options():
    with pytest.raises(ValueError, match="format must be one of npz, webdataset, png, csv, got 'jpg'"):
        run(TinyJob(3), "nowhere", format="jpg")
    with pytest.raises(ValueError, match="columns must have 5 entries, one for each number of a row, got 1"):
        run(TinyJob(3, shape=(5,)), "nowhere", format=Csv(["a"]))


def test_a_digest_of_a_folder_sees_names_and_bytes(tmp_path):
    def of(**files):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
        return digest(folder)

    assert of(a="1", b="2") == of(b="2", a="1")
    assert len({of(a="1", b="2")[0], of(a="2", b="1")[0], of(a="12")[0], of(a="12", b="")[0], of(ab="12")[0]}) == 5
    assert of(a="1", b="22")[1] == 3
