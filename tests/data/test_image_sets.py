"""Sets of images: the same pixels in every layout, any part of them, and one line for everything that is none."""

import io
import json
import tarfile
import threading
import tracemalloc

import numpy as np
import pytest
import torch

from fastgen.data import ImageSetError, JoinedImages, TensorImages, load_digits, open_image_set

from ..backends import import_peer
from ..mnist_files import digits, write_mnist
from .image_files import as_tensor, images, png, write_job, write_tar

Image = import_peer("PIL.Image")
FORMATS = ("npz", "webdataset", "png")


def check(opened, pixels, labels=None):
    """All of it, and parts of it in no order."""
    expected = as_tensor(pixels)
    assert len(opened) == len(pixels) and opened.shape == tuple(expected.shape[1:])
    assert torch.equal(opened.read(0, len(pixels)), expected)
    for start, stop in ((3, 8), (1, 2), (4, 4), (0, 5), (len(pixels), len(pixels)), (7, 10), (2, 9)):
        part = opened.read(start, stop)
        assert part.dtype == torch.uint8 and torch.equal(part, expected[start:stop])
    if labels is None:
        assert opened.labels is None
    else:
        assert opened.labels.dtype == torch.int64 and opened.labels.tolist() == list(labels)
    for start, stop in ((-1, 2), (5, 4), (0, len(pixels) + 1)):
        with pytest.raises(IndexError, match="must be asked for images of"):
            opened.read(start, stop)


def refused(name, **options):
    with pytest.raises(ImageSetError) as caught:
        opened = open_image_set(name, **options)
        opened.read(0, len(opened))
    message = str(caught.value)
    assert "\n" not in message
    return message


# the folders of jobs


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("labelled", [False, True])
def test_the_folder_of_a_job(tmp_path, form, channels, labelled):
    pixels, labels = images(10, (channels, 6, 5))
    folder = write_job(tmp_path / "job", form, pixels, labels if labelled else None, seed=999_995)
    check(open_image_set(folder), pixels, labels if labelled else None)


def test_shards_are_in_the_order_of_their_seeds(tmp_path):
    """Names of six digits and of seven: 999998 comes before 1000002, in the manifest and without it."""
    pixels, labels = images(10)
    folder = write_job(tmp_path / "job", "npz", pixels, labels, seed=999_998)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"].reverse()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    check(open_image_set(folder), pixels, labels)
    (folder / "manifest.json").unlink()
    (folder / "grid.png").unlink()
    check(open_image_set(folder), pixels, labels)


@pytest.mark.parametrize("form", FORMATS)
def test_a_job_that_has_not_finished_is_refused_unless_it_is_asked_for(tmp_path, form):
    pixels, _ = images(10)
    for manifest in (True, False):
        folder = write_job(tmp_path / f"job{manifest}", form, pixels, complete=False, manifest=manifest)
        assert refused(folder).startswith(f"{folder}: the job there has not finished")
    folder = tmp_path / "jobTrue"
    check(open_image_set(folder, incomplete=True), pixels)
    if form != "png":  # without a manifest the picture of all images beside is left out all the same
        check(open_image_set(tmp_path / "jobFalse", incomplete=True), pixels)


def test_a_finished_job_that_lacks_a_shard_is_refused(tmp_path):
    pixels, _ = images(10)
    folder = write_job(tmp_path / "a", "npz", pixels)
    (folder / "000004.npz").unlink()
    assert refused(folder) == f"{folder}/000004.npz: is missing, the manifest.json beside it has it"
    folder = write_job(tmp_path / "b", "png", pixels)
    (folder / "000004" / "000005.png").unlink()
    assert refused(folder) == f"{folder}: must hold the 10 images of its manifest.json, got 9"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"settings": {}, "complete": true}', '{"settings": 3}'])
def test_a_manifest_that_is_none(tmp_path, text):
    folder = write_job(tmp_path / "job", "npz", images()[0])
    (folder / "manifest.json").write_text(text)
    assert refused(folder).startswith(f"{folder}/manifest.json: not the manifest of a job")


def test_rows_are_no_images(tmp_path):
    np.savez(tmp_path / "rows.npz", arr_0=np.zeros((5, 3), np.float32))
    assert refused(tmp_path / "rows.npz").endswith("must be images [N, H, W, C] uint8, got float32 of shape [5, 3]")
    folder = write_job(tmp_path / "job", "npz", images()[0])
    (folder / "manifest.json").write_text(json.dumps({"settings": {"format": "csv"}, "complete": True, "shards": []}))
    assert refused(folder) == f"{folder}: the job there wrote csv, images of npz, webdataset, png are read"


# npz


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("key", ["labels", "arr_1"])
def test_an_npz_as_adm_writes_it(tmp_path, save, key):
    pixels, labels = images(10)
    save(tmp_path / "x.npz", **{"arr_0": pixels, key: labels})
    check(open_image_set(tmp_path / "x.npz"), pixels, labels)
    save(tmp_path / "y.npz", pixels)
    check(open_image_set(tmp_path / "y.npz"), pixels)


def test_a_large_npz_is_not_read_whole(tmp_path):
    pixels = np.zeros((64, 128, 128, 3), np.uint8)  # 3 MB
    pixels[:, 0, 0, 0] = np.arange(64)
    for save, name in ((np.savez, "stored.npz"), (np.savez_compressed, "deflated.npz")):
        save(tmp_path / name, pixels)
        tracemalloc.start()
        opened = open_image_set(tmp_path / name)
        assert [int(opened.read(k, k + 1)[0, 0, 0, 0]) for k in (0, 5, 6, 3, 40)] == [0, 5, 6, 3, 40]
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        if name == "stored.npz":
            assert peak < pixels.nbytes / 4


def test_threads_share_a_deflated_npz(tmp_path):
    pixels, _ = images(200)
    np.savez_compressed(tmp_path / "x.npz", pixels)
    opened, expected, wrong = open_image_set(tmp_path / "x.npz"), as_tensor(pixels), []

    def read(first):
        for start in range(first, 190, 7):
            if not torch.equal(opened.read(start, start + 9), expected[start : start + 9]):
                wrong.append(start)

    threads = [threading.Thread(target=read, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_negative_labels_are_none(tmp_path):
    pixels, labels = images(10)
    labels[3] = -1
    np.savez(tmp_path / "x.npz", arr_0=pixels, labels=labels)
    assert open_image_set(tmp_path / "x.npz").labels is None


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.zeros((2, 3, 3, 1), np.uint8)}, "holds no images: no arr_0, but images"),
        ({"arr_0": np.zeros((0, 3, 3, 1), np.uint8)}, "must be images .*, got uint8 of shape .0, 3, 3, 1."),
        ({"arr_0": np.zeros((2, 3, 3, 1))}, "must be images .* uint8, got float64"),
        ({"arr_0": np.zeros((2, 3, 3), np.uint8)}, "must be images"),
        ({"arr_0": np.asfortranarray(np.zeros((2, 3, 3, 2), np.uint8))}, "order of Fortran"),
        ({"arr_0": np.zeros((2, 3, 3, 1), np.uint8), "labels": np.zeros(3, int)}, "labels must be a class for each of 2 images"),
        ({"arr_0": np.zeros((2, 3, 3, 1), np.uint8), "labels": np.zeros(2)}, "integers, got float64"),
        ({"arr_0": np.array([None])}, "must be images"),
    ],
)  # fmt: skip
def test_an_npz_of_something_else(tmp_path, arrays, message):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(ImageSetError, match=f"x.npz: .*{message}"):
        open_image_set(tmp_path / "x.npz")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_truncated_npz(tmp_path, save):
    save(tmp_path / "whole.npz", images(50)[0])
    whole = (tmp_path / "whole.npz").read_bytes()
    cut = tmp_path / "cut.npz"
    for n in (0, 30, 2000, len(whole) - 1):
        cut.write_bytes(whole[:n])
        assert refused(cut).startswith(f"{cut}: cannot be read, it is no npz file, damaged or cut off")


def test_a_damaged_deflated_npz_is_named_at_every_reading(tmp_path):
    np.savez_compressed(tmp_path / "x.npz", images(50)[0])
    damaged = bytearray((tmp_path / "x.npz").read_bytes())
    damaged[1000:1100] = bytes(100)
    (tmp_path / "x.npz").write_bytes(damaged)
    opened = open_image_set(tmp_path / "x.npz")
    for _ in range(2):
        with pytest.raises(ImageSetError, match=r"x\.npz: cannot be read"):
            opened.read(0, 50)


# pictures


def test_a_tree_of_pictures(tmp_path):
    pixels, labels = images(12)
    names = [f"{k // 5}/image{k}.png" for k in range(12)]  # image9 before image10
    for name, image in zip(names, pixels, strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(png(image))
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / ".hidden.png").write_bytes(b"")
    check(open_image_set(tmp_path), pixels)
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": list(zip(names, labels.tolist(), strict=True))}))
    check(open_image_set(tmp_path), pixels, labels)
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": [[names[0], 3]]}))
    assert open_image_set(tmp_path).labels is None  # not of all
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": None}))
    assert open_image_set(tmp_path).labels is None


@pytest.mark.parametrize("text", ["{}", "[", '{"labels": [[1]]}', '{"labels": [["a.png", "b"]]}', '{"labels": 3}'])
def test_a_dataset_json_that_is_none(tmp_path, text):
    (tmp_path / "a.png").write_bytes(png(images(1)[0][0]))
    (tmp_path / "dataset.json").write_text(text)
    assert refused(tmp_path).startswith(f"{tmp_path}/dataset.json: ")


def test_modes_that_are_pictures(tmp_path):
    """What Pillow opens as another mode is read as the grey or colour that it shows."""
    colour, _ = images(1)
    grey = images(1, (1, 6, 5))[0]
    bits = (grey[0, ..., 0] > 127).astype(np.uint8) * 255
    opaque = np.concatenate([colour[0], np.full((6, 5, 1), 255, np.uint8)], axis=-1)
    palette = Image.fromarray(colour[0]).quantize(256)
    for name, picture, expected in (
        ("rgb", Image.fromarray(colour[0]), colour),
        ("grey", Image.fromarray(grey[0, ..., 0]), grey),
        ("bits", Image.fromarray(bits).convert("1"), bits[None, ..., None]),
        ("alpha", Image.fromarray(opaque), colour),
        ("palette", palette, np.array(palette.convert("RGB"))[None]),
    ):
        (tmp_path / name).mkdir()
        picture.save(tmp_path / name / "x.png")
        opened = open_image_set(tmp_path / name)
        assert torch.equal(opened.read(0, 1), as_tensor(expected)), name


def test_a_jpeg(tmp_path):
    pixels = np.full((8, 8, 3), 77, np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.JPG", quality=95)
    assert (open_image_set(tmp_path).read(0, 1).int() - 77).abs().max() <= 2


def test_modes_that_are_not(tmp_path):
    pixels, _ = images(1)
    clear = np.concatenate([pixels[0], np.full((6, 5, 1), 254, np.uint8)], axis=-1)
    Image.fromarray(clear).save(tmp_path / "x.png")
    assert refused(tmp_path).startswith(f"{tmp_path}/x.png: a picture with transparent parts")
    Image.fromarray(np.arange(30, dtype=np.uint16).reshape(6, 5)).save(tmp_path / "x.png")
    assert "pictures of 8 bits a channel are read, this one is of mode I;16" in refused(tmp_path)


def test_sizes_and_channels_may_not_mix(tmp_path):
    for k, image in enumerate(images(6)[0]):
        (tmp_path / f"{k}.png").write_bytes(png(image))
    for shape in ((3, 5, 6), (1, 6, 5)):
        (tmp_path / "4.png").write_bytes(png(images(1, shape)[0][0]))
        expected = f"{tmp_path}/4.png: pictures of one size are wanted, 3x6x5 as {tmp_path}/0.png, got {'x'.join(map(str, shape))}"
        assert refused(tmp_path) == expected
    for k, shape in enumerate([(3, 6, 5), (3, 6, 5), (3, 5, 6)]):
        (tmp_path / "npz").mkdir(exist_ok=True)
        np.savez(tmp_path / "npz" / f"{k}.npz", images(2, shape)[0])
    assert refused(tmp_path / "npz").startswith(f"{tmp_path}/npz/2.npz: images of one size are wanted, 3x6x5 as in")


@pytest.mark.parametrize("keep", [0, 20, 60, -10])
def test_a_truncated_picture_is_named(tmp_path, keep):
    pixels, _ = images(6, (3, 40, 40))
    for k, image in enumerate(pixels):
        (tmp_path / f"{k}.png").write_bytes(png(image))
    (tmp_path / "3.png").write_bytes(png(pixels[3])[: keep or None] if keep else b"")
    if keep == -10:
        (tmp_path / "3.png").write_bytes(png(pixels[3])[:-1000])
    assert refused(tmp_path).startswith(f"{tmp_path}/3.png: not a readable picture")


# tar


def test_a_tar_alone_and_many(tmp_path):
    pixels, labels = images(10)
    write_tar(tmp_path / "a.tar", pixels[:6], labels[:6])
    write_tar(tmp_path / "b.tar", pixels[6:], labels[6:])
    check(open_image_set(tmp_path), pixels, labels)
    opened = open_image_set(tmp_path / "a.tar")
    assert torch.equal(opened.read(0, 6), as_tensor(pixels[:6])) and opened.labels.tolist() == list(labels[:6])


def test_a_tar_of_something_else(tmp_path):
    path = tmp_path / "x.tar"
    write_tar(path, images(4)[0], ["one", "2", "3", "4"])
    assert refused(path).startswith(f"{path}: cannot be read")
    write_tar(path, [])
    assert refused(path) == f"{path}: holds no pictures"
    write_tar(path, images(4)[0])
    whole = path.read_bytes()
    for n in (300, 700):
        path.write_bytes(whole[:n])
        assert refused(path).startswith(f"{path}: ")
    with tarfile.open(path, "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.png"), io.BytesIO())
    assert "packed ones are not read" in refused(path)


# named sets, and none


def test_mnist_by_its_name(tmp_path):
    write_mnist(tmp_path / "a:b")
    for split in ("train", "test"):
        opened = open_image_set(f"mnist:{tmp_path}/a:b:{split}")
        pixels, labels = digits(split)
        assert opened.shape == (1, 28, 28) and opened.labels.tolist() == labels.tolist()
        assert torch.equal(opened.read(0, 20)[:, 0], pixels)
    for name in (f"mnist:{tmp_path}", "mnist:train", f"mnist:{tmp_path}:held_out"):
        assert refused(name) == f"{name}: must be mnist:FOLDER:SPLIT, SPLIT one of train, test"
    with pytest.raises(FileNotFoundError, match="no t10k-images"):
        open_image_set(f"mnist:{tmp_path}/none:test")
    assert refused(tmp_path / "a:b").endswith("(for the IDX files of MNIST say mnist:FOLDER:test)")
    (tmp_path / "a:b" / "t10k-labels-idx1-ubyte").write_bytes(b"")
    assert "not an IDX file" in refused(f"mnist:{tmp_path}/a:b:test")


def test_digits_by_their_name():
    import_peer("sklearn")
    opened = open_image_set("digits:held_out")
    real = load_digits("held_out")
    assert opened.shape == (1, 8, 8) and torch.equal(opened.labels, real.labels)
    back = opened.read(0, 300).float() / 127.5 - 1
    assert (back - real.images).abs().max() <= 0.5 / 127.5 + 1e-6
    assert refused("digits:test") == "digits:test: must be digits:SPLIT, SPLIT one of train, held_out"


def test_nothing_and_too_much(tmp_path):
    with pytest.raises(FileNotFoundError, match="none: no such folder or file"):
        open_image_set(tmp_path / "none")
    assert refused(tmp_path) == f"{tmp_path}: holds no images: no .npz, .tar, .png, .jpg, .jpeg"
    (tmp_path / "x.png").write_bytes(png(images(1)[0][0]))
    np.savez(tmp_path / "x.npz", images(2)[0])
    assert refused(tmp_path) == f"{tmp_path}: must hold images of one kind, got npz and pictures"
    (tmp_path / "x.csv").write_text("1,2")
    assert refused(tmp_path / "x.csv") == f"{tmp_path}/x.csv: must be a folder, an npz or a tar file"


def test_sets_in_memory_are_joined():
    pixels, labels = images(10)
    tensor = as_tensor(pixels)
    parts = [TensorImages(f"{a}", tensor[a:b], torch.from_numpy(labels[a:b])) for a, b in ((0, 3), (3, 4), (4, 10))]
    check(JoinedImages("all", parts), pixels, labels)
    parts[1] = TensorImages("1", tensor[3:4])
    check(JoinedImages("all", parts), pixels)
    with pytest.raises(ImageSetError, match="all: holds no images"):
        JoinedImages("all", [])
    with pytest.raises(ImageSetError, match=r"must be images .* uint8, got torch\.float32"):
        TensorImages("x", tensor.float())
