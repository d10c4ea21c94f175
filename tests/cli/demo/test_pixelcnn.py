"""`fastgen demo pixelcnn` with few digits and a tiny model of 28 x 28 pixels: what it writes and says, and that it can fail."""

import pytest
import torch

from fastgen.cli.demo import pixelcnn
from fastgen.cli.demo.pixel_by_pixel import Agreement
from fastgen.cli.demo.pixelcnn import bits, load
from fastgen.cli.demo.plain_network import PlainGatedPixelCNN
from fastgen.cli.main import main
from fastgen.models import GatedPixelCNN, find_weights

from ...backends import import_peer
from ...mnist_files import write_mnist
from ...models.small_autoregressive import build
from ...modules import max_difference, randomize
from ..running import refused

import_peer("matplotlib")
import_peer("rich")
import_peer("sklearn")


@pytest.fixture
def weights(tmp_path):
    model = randomize(GatedPixelCNN(1, 4, dilations=[1], levels=256, num_classes=10)).half()
    model.save(tmp_path / "w.safetensors", {"training": '{"bits_per_dim": 1.25, "evaluated_on": "test"}'})
    return tmp_path / "w.safetensors"


@pytest.fixture
def few(monkeypatch):
    """One digit of each class, and one completion of each half."""
    monkeypatch.setattr(pixelcnn, "PER_CLASS", 1)
    monkeypatch.setattr(pixelcnn, "COMPLETIONS", 1)


def demo(weights, out, *options):
    return ["demo", "pixelcnn", "--quiet", "--weights", str(weights), "--out", str(out), *options]


def test_demo(weights, tmp_path, capsys, few):
    out, data = tmp_path / "out", write_mnist(tmp_path / "data")
    assert main(demo(weights, out, "--data", str(data))) == 0
    assert sorted(p.name for p in out.iterdir()) == ["completed.png", "pixelcnn.md", "pixelcnn.png"]
    printed, report = " ".join(capsys.readouterr().out.split()), (out / "pixelcnn.md").read_text()
    for text in (
        "10 digits of 8 x 8: 640 of 640 pixels are equal both ways",
        "1 digit of 28 x 28: 784 of 784 pixels are equal both ways",
        "w.safetensors: 1.250 bits a dimension of the test images",
        "8 x 8: ",
        "are read as the class asked for",
    ):
        assert text in printed and text in report
    assert "| 1 digit of 28 x 28 | plain torch |" in report and "x |" in report


def test_demo_fails_where_the_two_ways_differ(weights, tmp_path, capsys, few, monkeypatch):
    naive = pixelcnn.naive
    monkeypatch.setattr(pixelcnn, "naive", lambda *args: naive(*args[:3], [seed + 1 for seed in args[3]], args[4]))
    assert main(demo(weights, tmp_path)) == 1
    assert "FAILED: 1 digit of 28 x 28: " in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "5"], "--steps is for `fastgen demo mnist` and `digits`"),
        (["--weights", "mnist-ddpm"], "the file holds a UNet, not a GatedPixelCNN"),
        (["--weights", "none"], "none: no such checkpoint file"),
        (["--data", "/none"], "/none: no train-images-idx3-ubyte"),
        (["--out", "/proc/x"], "/proc/x/pixelcnn.png: cannot be written"),
    ],
)
def test_refusals_are_one_line(weights, tmp_path, capsys, options, message):
    assert message in refused(capsys, *demo(weights, tmp_path / "o"), *options)
    assert not (tmp_path / "o" / "pixelcnn.png").exists()


def test_models_of_something_else(tmp_path, capsys):
    build("gated").save(tmp_path / "w.safetensors")
    assert "not a model of digits with 10 classes" in refused(capsys, *demo(tmp_path / "w.safetensors", tmp_path / "o"))
    build("gated_factorized", num_classes=10).save(tmp_path / "w.safetensors")
    assert "must be a GatedPixelCNN that is not factorized" in refused(
        capsys, *demo(tmp_path / "w.safetensors", tmp_path / "o")
    )


def test_agreement_is_counted():
    ours = torch.zeros(3, 1, 2, 2)
    theirs = ours.clone()
    assert str(Agreement.of("digits", ours, theirs)) == "digits: 12 of 12 pixels are equal both ways"
    theirs[1, 0, 1] = 1
    found = Agreement.of("digits", ours, theirs)
    assert (found.equal, found.equal_images) == (10, 2)
    assert str(found).startswith("digits: 10 of 12 pixels are equal both ways, in 2 of 3 images all")


@pytest.mark.parametrize("options", [{}, {"input_kernel_size": 5, "kernel_size": 5, "dilations": [1, 3]}])
def test_the_plain_network_is_the_model(options):
    model = build("gated", num_classes=3, **options)
    x, labels = torch.rand(3, 1, 9, 8).double() * 2 - 1, torch.tensor([2, 0, 1])
    with torch.no_grad():
        assert max_difference(PlainGatedPixelCNN(model)(x, labels), model(x, labels)) <= 1e-13


def test_shipped_weights_say_how_likely_digits_are():
    assert load(find_weights("digits-pixelcnn")).levels == 17
    (line,) = bits("digits-pixelcnn", find_weights("digits-pixelcnn"))
    assert "bits a dimension of the held-out images" in line
    assert bits("mnist-ddpm", find_weights("mnist-ddpm")) == []
