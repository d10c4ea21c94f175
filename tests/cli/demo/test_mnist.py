"""`fastgen demo mnist`: what it writes and says with a tiny model, and what its judge is worth, without MNIST at hand."""

import json

import pytest
import torch

from fastgen.cli import demo as cli_demo
from fastgen.cli.demo import demonstration
from fastgen.cli.demo.mnist_scores import MnistJudge
from fastgen.cli.main import build_parser, main
from fastgen.data import load_mnist
from fastgen.models import UNet

from ...backends import import_peer
from ...mnist_files import write_mnist
from ...modules import randomize
from ..running import refused

import_peer("matplotlib")
import_peer("rich")

TINY = {"model_channels": 8, "channel_mult": (1, 1), "num_res_blocks": 1, "attention_resolutions": (), "num_groups": 4}
TRAINING = {"prediction_type": "v_prediction", "schedule": "squared_cosine", "timesteps": 1000}


@pytest.fixture
def weights(tmp_path):
    """A small model of 28 x 28 digits that draws something, in half precision."""
    model = randomize(UNet(1, **TINY, num_classes=10, null_class=True)).half()
    training = {"training": json.dumps({**TRAINING, "image_shape": [1, 28, 28]})}
    model.save(tmp_path / "w.safetensors", training)
    return tmp_path / "w.safetensors"


def demo(weights, out, *options):
    return ["demo", "mnist", "--quiet", "--steps", "5", "--weights", str(weights), "--out", str(out), *options]


def test_demo(weights, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demonstration, "PER_CLASS", 2)
    monkeypatch.setattr(demonstration, "WANTED", 0.0)
    out = tmp_path / "out"
    assert main(demo(weights, out)) == 0
    assert sorted(p.name for p in out.iterdir()) == ["digits.png", "report.md", "trajectory.png"]
    printed, report = capsys.readouterr().out, (out / "report.md").read_text()
    for text in (
        "largest difference between the two ways",
        "are read as the class asked for",
        "real test digits: 99.0% were",
    ):
        assert text in printed and text in report
    assert "copies" not in printed and "| DDIM | whole |" in report


def test_demo_beside_the_real_images_and_where_digits_are_not_recognised(weights, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demonstration, "PER_CLASS", 2)
    assert main(demo(weights, tmp_path / "out", "--data", str(write_mnist(tmp_path / "data")))) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "FAILED: DDIM: only" in printed and "% are read as what they are, by the same classifier" in printed
    assert "copies: distance to the nearest training image" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--weights", "digits-ddpm"], "draws images of shape (1, 8, 8), not (1, 28, 28)"),
        (["--weights", "mnist-classifier"], "the file holds a DigitClassifier, not a UNet"),
        (["--data", "/none"], "/none: no train-images-idx3-ubyte"),
    ],
)
def test_refusals_are_one_line(weights, tmp_path, capsys, options, message):
    assert message in refused(capsys, *demo(weights, tmp_path / "o"), *options)
    assert not (tmp_path / "o" / "digits.png").exists()


def test_it_is_the_demo_without_a_name_and_an_unknown_one_is_named(capsys):
    assert build_parser("demo", cli_demo).parse_args(["demo"]).name == "mnist"
    assert "invalid choice: 'letters'" in refused(capsys, "demo", "letters")


def test_the_judge_finds_copies(tmp_path):
    real = tuple(load_mnist(write_mnist(tmp_path), split) for split in ("train", "test"))
    judge = MnistJudge(real)
    *_, line = judge.findings(real[0].images[:7])
    assert "(smallest 0.00)" in line and "drawn digits closer than any held-out one: 7" in line
    *_, line = judge.findings(real[1].images[:7])
    assert "drawn digits closer than any held-out one: 0" in line


def test_the_judge_reads_strokes():
    """A vertical stroke is a one, an ellipse a nought: the shipped classifier knows what no made-up data taught it."""
    judge = MnistJudge()
    y, x = torch.meshgrid(torch.arange(28.0) - 13.5, torch.arange(28.0) - 13.5, indexing="ij")
    one = (2.0 - x.abs()).clamp(-1, 1).where(y.abs() < 10, -1)
    nought = (1.5 - 3 * ((x / 6) ** 2 + (y / 9) ** 2 - 1).abs()).clamp(-1, 1)
    images = torch.stack([one, nought])[:, None]
    assert judge.recognised(images, torch.tensor([1, 0])) == 1
    assert judge.recognised(images, torch.tensor([0, 1])) == 0
