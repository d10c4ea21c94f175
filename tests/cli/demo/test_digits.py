"""`fastgen demo digits` with few steps: what it writes, what it prints, and that it can fail."""

import pytest
import torch

from fastgen.cli.demo import demonstration
from fastgen.cli.demo.digit_scores import DigitJudge
from fastgen.cli.demo.plain_sampling import PlainSampler
from fastgen.cli.main import main
from fastgen.data import load_digits
from fastgen.models import UNet
from fastgen.samplers import DDIM, DDPM, squared_cosine_betas

from ..running import refused


@pytest.fixture(scope="module")
def judge() -> DigitJudge:
    return DigitJudge()


@pytest.fixture
def few(monkeypatch):
    """Four digits of each class in place of ten."""
    monkeypatch.setattr(demonstration, "PER_CLASS", 4)


def test_demo(tmp_path, capsys, few):
    assert main(["demo", "digits", "--quiet", "--steps", "12", "--out", str(tmp_path)]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["digits.png", "report.md", "trajectory.png"]
    printed, report = capsys.readouterr().out, (tmp_path / "report.md").read_text()
    for text in ("largest difference between the two ways", "are read as the class asked for", "real held-out digits"):
        assert text in printed and text in report
    assert "| DDPM | whole |" in report and "x |" in report


def test_demo_fails_where_digits_are_not_recognised(tmp_path, capsys, monkeypatch, few):
    monkeypatch.setattr(demonstration, "WANTED", 1.01)
    assert main(["demo", "digits", "--quiet", "--steps", "2", "--out", str(tmp_path)]) == 1
    assert "FAILED: DDIM: only" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "--steps: must be at least 1, got 0"),
        (["--steps", "1001"], "--steps: steps must be in [1, 1000], got 1001"),
        (["--seed", "x"], "--seed: must be an integer, got 'x'"),
        (["--weights", "none"], "none: no such checkpoint file"),
        (["--out", "/proc/x"], "/proc/x/digits.png: cannot be written"),
        (["--data", "."], "--data is for `fastgen demo mnist`"),
    ],
)
def test_refusals_are_one_line(tmp_path, capsys, options, message):
    assert message in refused(capsys, "demo", "digits", "--out", tmp_path / "o", *options)
    assert not (tmp_path / "o" / "digits.png").exists()


def test_weights_of_something_else(tmp_path, capsys):
    model = UNet(3, 8, channel_mult=(1,), num_res_blocks=1, attention_resolutions=(), num_groups=4)
    model.save(tmp_path / "w.safetensors")
    line = refused(capsys, "demo", "digits", "--out", tmp_path, "--weights", tmp_path / "w.safetensors")
    assert "w.safetensors: not a model of digits with 10 classes and a null class" in line


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("kind", ["ddim", "ddpm"])
def test_the_plain_loop_is_the_solver(kind, prediction_type):
    betas = squared_cosine_betas()
    common = {"betas": betas, "prediction_type": prediction_type}
    if prediction_type == "v_prediction":
        common["timestep_spacing"] = "trailing"
    solver = DDIM(**common, use_clipped_model_output=True) if kind == "ddim" else DDPM(**common)
    plan = solver.plan(8, guidance_scale=3.0).to("cpu")
    plain = PlainSampler(kind, betas, plan.timesteps, 3.0, prediction_type)
    shape = (2, 1, 8, 8)
    for i in range(8):
        x, cond, uncond = torch.randn(shape), torch.randn(shape), torch.randn(shape)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(i))
        ours = plan.step(cond, i, x, uncond=uncond, noise=noise)
        theirs = plain.step(cond, uncond, i, x, torch.Generator().manual_seed(i))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)


def test_the_judge_knows_digits_from_noise(judge):
    held_out = load_digits("held_out")
    assert judge.held_out_recognised() > 0.95
    assert judge.recognised(held_out.images, (held_out.labels + 1) % 10) < 0.05
    noise = torch.randn(100, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert judge.recognised(noise, torch.arange(100) % 10) < 0.3


def test_copies_are_found(judge):
    copies = judge.copies(load_digits("train").images[:50])
    assert copies.smallest == 0 and copies.closer_than_any_held_out == 50
    assert judge.copies(load_digits("held_out").images).closer_than_any_held_out == 0
