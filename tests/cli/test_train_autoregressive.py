"""`fastgen train` of autoregressive models: tiny runs, their files, interruption, and what is said of images not trained on."""

import json
import os
import re
import signal

import pytest
import torch

from fastgen.cli._autoregressive_recipes import AUTOREGRESSIVE_RECIPES
from fastgen.cli.main import main
from fastgen.data import load_digits, load_mnist
from fastgen.models import load_state, read_metadata
from fastgen.training import AutoregressiveTrainer, Callback, mean_bits_per_dim

from ..backends import import_peer
from ..mnist_files import write_mnist
from .running import refused, run

import_peer("sklearn")

TINY = ["--channels", "4", "--batch-size", "4", "--warmup", "1", "--quiet"]
DIGITS = ["digits-pixelcnn", "digits-pixelcnn++"]


def command(name, folder, *arguments):
    return ["train", name, *TINY, "--out", str(folder / "w.safetensors"), *arguments]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", DIGITS)
def test_a_resumed_run_is_the_uninterrupted_one_and_says_its_bits(tmp_path, capsys, name):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(command(name, whole, "--steps", "4")) == 0
    said = capsys.readouterr()
    assert said.err == "" and len(said.out.splitlines()) == 2
    assert main(command(name, parts, "--steps", "2", "--lr-decay", "none")) == 0
    line = refused(capsys, *command(name, parts, "--steps", "4", "--resume"))
    assert "made with lr_decay_steps=0, this run has 4" in line
    assert main(command(name, tmp_path / "short", "--steps", "2", "--lr-decay", "none")) == 0
    torch.manual_seed(1234)
    assert main(command(name, parts, "--steps", "4", "--lr-decay", "none", "--resume")) == 0
    assert main(command(name, tmp_path / "long", "--steps", "4", "--lr-decay", "none")) == 0
    (ours, metadata), (theirs, other_metadata) = (
        load_state(tmp_path / part / "w.safetensors") for part in ("parts", "long")
    )
    assert metadata == other_metadata and all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert {x.dtype for x in ours.values()} == {torch.float16}

    model = AUTOREGRESSIVE_RECIPES[name].model.load(whole / "w.safetensors", dtype=torch.float32)
    training = json.loads(read_metadata(whole / "w.safetensors")["training"])
    digits = load_digits("held_out")
    bits = mean_bits_per_dim(model, digits.images, digits.labels)
    assert training["bits_per_dim"] == pytest.approx(bits, rel=1e-5)
    assert f"{training['bits_per_dim']:.4f} bits a dimension on 300 images not trained on" in said.out
    expected = {"recipe": name, "steps": 4, "lr_decay_steps": 4, "seed": 0, "image_shape": [1, 8, 8]}
    assert training.items() >= {**expected, "evaluated_on": "held_out", "clip_norm": 1.0}.items()
    assert model.levels == 17 and model.num_classes == 10


def test_the_levels_are_those_of_the_digits():
    images = load_digits().images
    for name in DIGITS:
        model = AUTOREGRESSIVE_RECIPES[name].model.from_config(AUTOREGRESSIVE_RECIPES[name].config)
        levels = model.indices(images)
        assert levels.min() == 0 and levels.max() == 16 and torch.equal(levels / 8 - 1, images)


def test_mnist_from_a_folder(tmp_path, capsys):
    data = write_mnist(tmp_path / "data", n=12, packed=True)
    assert main(command("mnist-pixelcnn", tmp_path / "run", "--steps", "2", "--data", str(data))) == 0
    assert "on 12 images not trained on" in capsys.readouterr().out
    model = AUTOREGRESSIVE_RECIPES["mnist-pixelcnn"].model.load(tmp_path / "run" / "w.safetensors")
    assert model.levels == 256
    images = load_mnist(data, "test").images
    assert torch.equal(model.indices(images).float() / 127.5 - 1, images)
    line = refused(capsys, *command("mnist-pixelcnn", tmp_path / "none", "--data", str(tmp_path)))
    assert "no train-images-idx3-ubyte, gzipped or not" in line
    assert "the following arguments are required: --data" in refused(capsys, "train", "mnist-pixelcnn")


class Interrupt(Callback):
    """Ctrl-C, as the terminal sends it, after step ``at``."""

    def __init__(self, at):
        self.at = at

    def on_step(self, trainer, loss):
        if trainer.step == self.at:
            os.kill(os.getpid(), signal.SIGINT)


def test_interruption_saves_and_says_how_to_resume(tmp_path, monkeypatch, capsys):
    real = AutoregressiveTrainer.fit
    monkeypatch.setattr(
        AutoregressiveTrainer, "fit", lambda self, steps, callbacks: real(self, steps, [*callbacks, Interrupt(2)])
    )
    assert run(*command("digits-pixelcnn", tmp_path, "--steps", "5")) == 130
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "stopped at step 2" in error and "the same command with --resume" in error
    assert names(tmp_path) == ["w.checkpoint.safetensors"]
    monkeypatch.setattr(AutoregressiveTrainer, "fit", real)
    assert run(*command("digits-pixelcnn", tmp_path, "--steps", "5", "--resume")) == 0
    assert names(tmp_path) == ["w.checkpoint.safetensors", "w.safetensors"]
    assert run(*command("digits-pixelcnn", tmp_path, "--steps", "5", "--resume")) == 0
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--clip-norm", "-1"], "clip_norm must be finite and not negative, got -1.0"),
        (["--channels", "0"], "--channels: must be at least 1, got 0"),
        (["--lr", "0"], "lr must be positive and finite, got 0.0"),
        (["--steps", "1"], "--steps must be more than --warmup 1 for --lr-decay cosine, got 1"),
        (["--timesteps", "10"], "unrecognized arguments: --timesteps 10"),
        (["--resume"], "w.checkpoint.safetensors: no such checkpoint file"),
        (["--lr", "1e30", "--clip-norm", "0"], "is inf at step|is nan at step|is not finite at step"),
    ],
)
def test_refusals(tmp_path, capsys, arguments, message):
    assert re.search(message, refused(capsys, *command("digits-pixelcnn", tmp_path, *arguments)))
    assert names(tmp_path) == []
