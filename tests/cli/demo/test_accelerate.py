"""`fastgen demo accelerate`: what it writes and says with a tiny model, that its pipeline is that model, and how it fails."""

import json

import pytest
import torch

from fastgen.cli.main import main
from fastgen.models import UNet
from fastgen.training import TrainingRecord

from ...backends import import_peer
from ...modules import max_difference, randomize
from ..running import refused

for peer in ("matplotlib", "rich", "diffusers"):
    import_peer(peer)

from fastgen.cli.demo import accelerate as demo_accelerate  # noqa: E402
from fastgen.cli.demo.digits_pipeline import unet_2d_model  # noqa: E402

TINY = {
    "model_channels": 8, "channel_mult": (1, 2), "num_res_blocks": 1, "num_head_channels": 8, "num_groups": 4,
    "num_classes": 10, "null_class": True,
}  # fmt: skip
TRAINING = {"prediction_type": "v_prediction", "schedule": "squared_cosine", "timesteps": 1000}


@pytest.fixture
def weights(tmp_path):
    """A small model of 28 x 28 digits that draws something, in half precision."""
    return save(tmp_path / "w.safetensors")


def save(path, image_shape=(1, 28, 28), **training):
    model = randomize(UNet(1, **TINY)).half()
    model.save(path, {"training": json.dumps({**TRAINING, **training, "image_shape": image_shape})})
    return path


def demo(weights, out, *options):
    return ["demo", "accelerate", "--quiet", "--steps", "3", "--weights", str(weights), "--out", str(out), *options]


def test_demo(weights, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo_accelerate, "PER_CLASS", 2)
    monkeypatch.setattr(demo_accelerate, "WANTED", 0.0)
    out = tmp_path / "out"
    assert main(demo(weights, out)) == 0
    assert sorted(p.name for p in out.iterdir()) == ["accelerate.md", "accelerate.png"]
    printed, report = " ".join(capsys.readouterr().out.split()), (out / "accelerate.md").read_text()
    for text in ("20 digits by DDIM, 3 steps", "restored: the same bits", "largest difference of a pixel"):
        assert text in printed and text in report
    for row in ("ResnetBlock2D", "DDIMScheduler", "each step one kernel"):
        assert row in printed and row in report


@pytest.mark.parametrize(("name", "value", "said"), [("AGREE", -1.0, "the images differ by"), ("WANTED", 1.1, "only")])
def test_failures_are_said(weights, tmp_path, capsys, monkeypatch, name, value, said):
    monkeypatch.setattr(demo_accelerate, "PER_CLASS", 1)
    monkeypatch.setattr(demo_accelerate, "WANTED", 0.0)
    monkeypatch.setattr(demo_accelerate, name, value)
    assert main(demo(weights, tmp_path / "out")) == 1
    assert f"fastgen demo: FAILED: {said}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options", [{}, {"use_scale_shift_norm": True, "attention_resolutions": (1,), "num_res_blocks": 2}]
)
def test_the_model_of_the_pipeline_is_ours(options):
    model = randomize(UNet(1, **{**TINY, **options})).eval()
    x, y = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 4, 10])
    with torch.no_grad():
        expected = model(x, torch.tensor(37), y)
        result = unet_2d_model(model, 8).eval()(x, torch.tensor(37), class_labels=y).sample
    assert expected.std() > 0.1 and max_difference(result, expected) <= 1e-4


def test_the_pipeline_steps_as_the_weights_were_trained(weights):
    scheduler = demo_accelerate.load(weights).scheduler
    assert TrainingRecord.read(weights).prediction_type == scheduler.config.prediction_type == "v_prediction"
    assert scheduler.config.timestep_spacing == "trailing"


def test_refusals_are_one_line(weights, tmp_path, capsys):
    out = tmp_path / "o"
    other = save(tmp_path / "linear.safetensors", schedule="linear")
    for options, message in (
        (["--weights", "digits-ddpm"], "draws images of shape (1, 8, 8), not (1, 28, 28)"),
        (["--weights", "mnist-classifier"], "the file holds a DigitClassifier, not a UNet"),
        (["--weights", str(other)], "trained on schedule linear, not squared_cosine"),
        (["--data", "/none"], "/none: no train-images-idx3-ubyte"),
    ):
        assert message in refused(capsys, *demo(weights, out), *options)
    assert not out.exists()
