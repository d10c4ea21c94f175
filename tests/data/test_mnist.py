"""The reader of MNIST's files, on made-up ones: what it returns, where it looks, and what it says of files that are damaged."""

import gzip

import pytest
import torch

from fastgen.data import load_mnist

from ..mnist_files import NAMES, digits, idx, write_mnist

IMAGES, LABELS = NAMES["train"]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("layout", ["", "raw", "MNIST/raw"])
def test_images_and_labels_are_those_of_the_files(tmp_path, layout, packed):
    write_mnist(tmp_path / layout, packed=packed)
    for split in ("train", "test"):
        images, labels = load_mnist(tmp_path, split)
        bytes_, classes = digits(split)
        assert images.shape == (20, 1, 28, 28) and images.dtype == torch.float32 and labels.dtype == torch.int64
        assert torch.equal(labels, classes.long())
        torch.testing.assert_close((images[:, 0] + 1) * 127.5, bytes_.float(), rtol=0, atol=1e-4)
    assert not torch.equal(load_mnist(tmp_path, "train").images, images)


def test_paper_is_minus_one_and_ink_is_one(tmp_path):
    write_mnist(tmp_path)
    pixels = torch.zeros(20, 28, 28, dtype=torch.uint8)
    pixels[:, 3, 5] = 255
    (tmp_path / IMAGES).write_bytes(idx(pixels))
    images = load_mnist(str(tmp_path)).images
    assert images.min() == -1 and images.max() == 1 and (images[:, 0, 3, 5] == 1).all()


def test_a_missing_file_is_named_with_the_places(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / LABELS).unlink()
    with pytest.raises(
        FileNotFoundError, match=f"{tmp_path}: no {LABELS}, gzipped or not, here or in raw or MNIST/raw"
    ):
        load_mnist(tmp_path)
    assert len(load_mnist(tmp_path, "test").images) == 20
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/none: no {IMAGES}"):
        load_mnist(tmp_path / "none")


def test_an_unknown_split(tmp_path):
    with pytest.raises(ValueError, match=r"split must be one of \('train', 'test'\), got 'held_out'"):
        load_mnist(tmp_path, "held_out")


PIXELS, CLASSES = digits("train")
WRONG = {
    "labels for images": (IMAGES, idx(CLASSES), "not an IDX file of bytes in 3 dimensions: it begins with 00000801, not 00000803"),
    "no IDX file": (IMAGES, b"\x89PNG" + bytes(100), "it begins with 89504e47, not 00000803"),
    "other numbers": (IMAGES, b"\0\0\x0d\x03" + bytes(100), "it begins with 00000d03, not 00000803"),
    "empty": (LABELS, b"", "it begins with , not 00000801"),
    "cut in its header": (IMAGES, idx(PIXELS)[:10], "cut off in its header of 16 bytes, after 10"),
    "cut off": (IMAGES, idx(PIXELS)[:-1], r"must hold 15680 elements, \(20, 28, 28\), got 15679"),
    "too long": (LABELS, idx(CLASSES) + b"\0", r"must hold 20 elements, \(20,\), got 21"),
    "another size": (IMAGES, idx(PIXELS[:, :27]), r"must hold images of 28 x 28 pixels, got shape \(20, 27, 28\)"),
    "no images": (IMAGES, idx(PIXELS[:0]), r"must hold images of 28 x 28 pixels, got shape \(0, 28, 28\)"),
    "fewer labels": (LABELS, idx(CLASSES[:19]), "must hold a label for each of 20 images, got 19"),
    "an eleventh class": (LABELS, idx(CLASSES + 1), r"labels must be in \[0, 10\), got 10"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("packed", [False, True])
def test_files_that_are_something_else(tmp_path, kind, packed):
    name, content, message = WRONG[kind]
    write_mnist(tmp_path, packed=packed)
    file = tmp_path / (f"{name}.gz" if packed else name)
    file.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(ValueError, match=f"{file}: .*{message}"):
        load_mnist(tmp_path)


@pytest.mark.parametrize("damage", [lambda b: b[:50], lambda b: b"no gzip" + b, lambda b: b[:40] + bytes(20) + b[60:]])
def test_packed_files_that_are_damaged(tmp_path, damage):
    write_mnist(tmp_path, packed=True)
    file = tmp_path / f"{IMAGES}.gz"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=f"{file}: cannot be unpacked, it is damaged or cut off"):
        load_mnist(tmp_path)
