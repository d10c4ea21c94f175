"""`fastgen demo flows` with few steps and a tiny model of 28 x 28 pixels: what it writes and says, and that it can fail."""

import dataclasses
import math

import pytest
import torch

from fastgen.cli.demo import flows
from fastgen.cli.demo.flow_peers import glow_pair, maf_pair, spline_pair
from fastgen.cli.demo.flow_training import Contest, Run
from fastgen.cli.demo.flows import interpolated
from fastgen.cli.main import main
from fastgen.data import load_digits, load_table
from fastgen.models import Glow, MultiScaleRealNVP, find_weights

from ...backends import import_peer
from ..running import refused

import_peer("matplotlib")
import_peer("rich")
import_peer("sklearn")
import_peer("nflows")
import_peer("normflows")


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    Glow(1, 28, num_levels=2, num_steps=1, hidden_channels=4, num_classes=10).half().save(
        tmp_path / "w.safetensors", {"training": '{"bits_per_dim": 1.25, "evaluated_on": "test", "levels": 256}'}
    )
    return tmp_path / "w.safetensors"


@pytest.fixture
def few(monkeypatch):
    """One digit of each class, and trainings of a few steps, which end within each other's noise."""
    monkeypatch.setattr(flows, "PER_CLASS", 1)
    monkeypatch.setattr(flows, "SEEDS", 2)
    monkeypatch.setattr(flows, "STEPS", {"maf": 3, "spline": 3, "glow": 3})
    monkeypatch.setattr(flows, "GLOW", {"num_levels": 2, "num_steps": 1, "hidden_channels": 4})
    monkeypatch.setattr(flows, "WANTED", 0.0)
    monkeypatch.setattr(Contest, "equal", property(lambda contest: math.isfinite(contest.difference)))


def demo(weights, out, *options):
    return ["demo", "flows", "--quiet", "--weights", str(weights), "--out", str(out), *options]


def test_demo(weights, tmp_path, capsys, few):
    out = tmp_path / "out"
    assert main(demo(weights, out)) == 0
    assert sorted(p.name for p in out.iterdir()) == ["flows.md", "flows.png", "interpolation.png"]
    printed, report = " ".join(capsys.readouterr().out.split()), (out / "flows.md").read_text()
    for text in (
        "MAF, breast cancer: fastgen less nflows, the mean of 2 seeds: ",
        "NeuralSplineFlow, diabetes: fastgen less nflows, the mean of 2 seeds: ",
        "Glow, 8 x 8 digits: fastgen less normflows, the mean of 2 seeds: ",
        "w: 1.250 bits a dimension of the test images",
        "encoded and decoded again, the held-out digits differ by at most ",
    ):
        assert text in printed and text in report
    assert "| MAF, breast cancer | nflows | " in report and "| Glow, 8 x 8 digits | fastgen | " in report


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("WANTED", 1.1, "of the digits of 8 x 8 recognised"),
        (
            "interpolated",
            lambda model: (0.5, torch.zeros(1, flows.STAGES, 1, 8, 8)),
            "encoded and decoded is another one",
        ),
    ],
)
def test_demo_fails_where_digits_are_none(weights, tmp_path, capsys, few, monkeypatch, name, value, said):
    monkeypatch.setattr(flows, name, value)
    monkeypatch.setattr(flows, "_settings", lambda: [])
    assert main(demo(weights, tmp_path)) == 1
    assert "FAILED" in (printed := capsys.readouterr().out) and said in printed


def test_demo_fails_where_the_libraries_differ(weights, tmp_path, capsys, few, monkeypatch):
    real = flows._settings
    monkeypatch.setattr(flows, "_settings", lambda: real()[:1])
    monkeypatch.setattr(Contest, "equal", property(lambda contest: False))
    assert main(demo(weights, tmp_path)) == 1
    assert "FAILED: MAF, breast cancer: fastgen and nflows differ by more than the noise" in capsys.readouterr().out


def test_equal_within_noise():
    contest = Contest("a", "nats", Run("fastgen", [1.0, 1.1, 1.2]), Run("nflows", [1.0, 1.1, 1.2]))
    assert contest.difference == pytest.approx(0) and contest.noise == pytest.approx(0.1) and contest.equal
    for score, equal in ((1.25, True), (1.35, False), (math.nan, False)):
        ours = Run("fastgen", [score] * 3)
        assert dataclasses.replace(contest, ours=ours).equal is equal


@pytest.mark.parametrize(
    ("make", "data", "config"),
    [
        (
            maf_pair,
            lambda: load_table("breast_cancer").rows,
            {"num_transforms": 3, "hidden_features": 40, "num_blocks": 2, "scale_fn": "softplus"},
        ),
        (
            spline_pair,
            lambda: load_table("diabetes").rows,
            {"num_transforms": 3, "hidden_features": 8, "num_blocks": 1, "bound": 4.0, "num_bins": 5},
        ),
        (
            glow_pair,
            lambda: load_digits().images / 2,
            {"num_levels": 2, "num_steps": 2, "hidden_channels": 8},
        ),
    ],
)
def test_the_pairs_are_the_same_function(make, data, config):
    x = data()[:64]
    torch.manual_seed(0)
    ours, theirs = make(x, config)
    assert sum(p.numel() for p in ours.model.parameters()) == sum(p.numel() for p in theirs.model.parameters())
    with torch.no_grad():
        a, b = ours.log_prob(x), theirs.log_prob(x)
        assert a.shape == b.shape == (64,) and a.std() > 0.1
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)
        assert ours.sample(3).shape == theirs.sample(3).shape == (3, *x.shape[1:])


def test_the_ends_of_an_interpolation_are_the_digits():
    torch.manual_seed(0)
    model = MultiScaleRealNVP(1, 8, num_scales=2, hidden_channels=4, num_blocks=1, alpha=1e-3).eval()
    back, images = interpolated(model)
    digits = load_digits("held_out")
    assert back <= 1e-4 and images.shape == (len(flows.BETWEEN), flows.STAGES, 1, 8, 8)
    for row, pair in zip(images, flows.BETWEEN, strict=True):
        for image, label in zip((row[0], row[-1]), pair, strict=True):
            assert torch.equal(image, digits.images[digits.labels == label][0])
        assert not torch.equal(row[1], row[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "5"], "--steps is for `fastgen demo mnist` and `digits`"),
        (["--weights", "mnist-ddpm"], "the file holds a UNet, not a Glow"),
        (["--weights", "digits-glow"], "not a Glow of 28 x 28 digits with 10 classes"),
        (["--weights", "none"], "none: no such checkpoint file"),
        (["--data", "/none"], "/none: no train-images-idx3-ubyte"),
        (["--out", "/proc/x"], "/proc/x/flows.png: cannot be written"),
    ],
)
def test_refusals_are_one_line(weights, tmp_path, capsys, options, message):
    assert message in refused(capsys, *demo(weights, tmp_path / "o"), *options)
    assert not (tmp_path / "o" / "flows.png").exists()


def test_shipped_weights_say_how_likely_digits_are():
    for name in (flows.SMALL, flows.WITHOUT_CLASSES):
        (line,) = flows.held_out_line(name, find_weights(name))
        assert "bits a dimension of the held-out images" in line
