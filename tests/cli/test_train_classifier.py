"""`fastgen train mnist-classifier` on made-up digits: it learns them, writes what `DigitClassifier` loads, refuses what it must."""

import json

import pytest
import torch

from fastgen.cli.main import main
from fastgen.cli.train import classifier
from fastgen.data import load_mnist
from fastgen.models import DigitClassifier, load_state, read_metadata

from ..mnist_files import write_mnist
from .running import refused


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_mnist(tmp_path_factory.mktemp("mnist"), n=100)


def command(data, out, *arguments):
    options = ["--batch-size", "10", "--epochs", "6", "--quiet"]
    return ["train", "mnist-classifier", "--data", str(data), "--out", str(out), *options, *arguments]


def test_it_learns_and_writes_half_precision(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(classifier, "SHIFT", 0)  # the place of a made-up digit is its class
    file = tmp_path / "c.safetensors"
    assert main(command(data, file)) == 0
    assert "100.00% of 100 test images are read right" in capsys.readouterr().out
    state, _ = load_state(file)
    assert {x.dtype for x in state.values()} == {torch.float16}
    images, labels = load_mnist(data, "test")
    assert torch.equal(DigitClassifier.load(file, dtype=torch.float32).read(images), labels)
    training = json.loads(read_metadata(file)["training"])
    assert training.items() >= {"recipe": "mnist-classifier", "epochs": 6, "seed": 0, "read_right": 1.0}.items()


def test_the_seed_decides(data, tmp_path):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert main(command(data, tmp_path / name, "--seed", seed, "--epochs", "1")) == 0
    a, b, c = (load_state(tmp_path / name)[0]["linear.weight"] for name in "abc")
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_images_are_moved_with_paper_around_them(monkeypatch):
    image = torch.full((1, 1, 28, 28), -1.0)
    image[..., 10, 12] = 1
    torch.manual_seed(0)
    places = {tuple((classifier._moved(image)[0, 0] == 1).nonzero()[0].tolist()) for _ in range(200)}
    assert places == {(10 + down, 12 + right) for down in range(-2, 3) for right in range(-2, 3)}
    assert all(classifier._moved(image).sum() == image.sum() for _ in range(20))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lr", "0"], "--lr must be positive, got 0.0"),
        (["--epochs", "0"], "--epochs: must be at least 1, got 0"),
        (["--data", "/none"], "/none: no train-images-idx3-ubyte"),
        (["--lr", "1e30"], "the loss is"),
    ],
)
def test_refusals(data, tmp_path, capsys, options, message):
    assert message in refused(capsys, *command(data, tmp_path / "c.safetensors", *options))
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_not_overwritten_in_silence(data, tmp_path, capsys):
    file = tmp_path / "c.safetensors"
    file.write_text("precious")
    assert f"{file} is there already: give --overwrite" in refused(capsys, *command(data, file))
    assert file.read_text() == "precious"
    assert main(command(data, file, "--epochs", "1", "--overwrite")) == 0
    assert DigitClassifier.load(file).linear.weight.shape == (10, 576)
