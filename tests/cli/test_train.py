"""`fastgen train`: a tiny run, its files, and a resumed run that cannot be told from one that never stopped."""

import json

import pytest
import torch

from fastgen import training
from fastgen.cli.main import main
from fastgen.cli.train import DIGITS_UNET
from fastgen.data import load_digits
from fastgen.models import CheckpointError, UNet, load_state, read_metadata

from ..backends import import_peer

import_peer("sklearn")

TINY = ["--model-channels", "16", "--batch-size", "8", "--warmup", "2", "--dropout", "0.2", "--quiet"]
CONFIG = {**DIGITS_UNET, "model_channels": 16}


def _train(folder, *arguments):
    return main(["train", "digits-ddpm", *TINY, "--out", str(folder / "w.safetensors"), *arguments])


def _trainer(**options):
    data = load_digits("train")
    return training.Trainer(CONFIG, training.TrainingOptions(**{"batch_size": 8, **options}), *data)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert _train(whole, "--steps", "6") == 0
    assert _train(parts, "--steps", "3") == 0
    torch.manual_seed(1234)  # the resumed run must not depend on what this process drew in between
    assert _train(parts, "--steps", "6", "--resume") == 0
    for name in ("w.safetensors", "w.checkpoint.safetensors"):
        (ours, metadata), (theirs, other_metadata) = load_state(whole / name), load_state(parts / name)
        assert metadata == other_metadata
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_the_seed_decides(tmp_path):
    states = []
    for i, seed in enumerate((3, 3, 4)):
        _train(tmp_path / str(i), "--steps", "2", "--seed", str(seed))
        states.append(load_state(tmp_path / str(i) / "w.safetensors")[0])
    key = "input_blocks.0.0.weight"
    assert torch.equal(states[0][key], states[1][key])
    assert not torch.equal(states[0][key], states[2][key])


def test_the_weights_are_the_average_and_say_how_they_were_made(tmp_path):
    _train(tmp_path, "--steps", "4", "--schedule", "linear", "--timesteps", "100")
    model = UNet.load(tmp_path / "w.safetensors")
    assert model.config == {**UNet.from_config(CONFIG).config, "dropout": 0.2}
    state, _ = load_state(tmp_path / "w.checkpoint.safetensors")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[f"ema.{name}"])
    assert not torch.equal(state["ema.out_conv.weight"], state["model.out_conv.weight"])
    training = json.loads(read_metadata(tmp_path / "w.safetensors")["training"])
    expected = {
        "recipe": "digits-ddpm",
        "schedule": "linear",
        "timesteps": 100,
        "steps": 4,
        "prediction_type": "epsilon",
    }
    assert training.items() >= {**expected, "seed": 0, "image_shape": [1, 8, 8]}.items()


def test_the_loss_falls():
    trainer = _trainer(batch_size=16, warmup=5, lr=2e-3)
    losses = [trainer.train_step() for _ in range(40)]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


def test_one_step_is_algorithm_1():
    """The training pair, recomputed by hand from the trainer's generator and the definition of the forward process."""
    trainer = _trainer(label_dropout=0.5, batch_size=32)
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(1497, (32,), generator=generator)
    timesteps = torch.randint(1000, (32,), generator=generator)
    noise = torch.randn(32, 1, 8, 8, generator=generator)
    kept = torch.rand(32, generator=generator) >= 0.5
    alpha_bar = torch.cumprod(1 - training.SCHEDULES["squared_cosine"](1000), 0)[timesteps][:, None, None, None]
    noisy = alpha_bar.sqrt() * trainer.images[chosen].double() + (1 - alpha_bar).sqrt() * noise
    seen = []
    trainer.model.register_forward_pre_hook(lambda module, arguments: seen.append(arguments))
    _, target = trainer._predict()
    assert torch.equal(target, noise)
    x, t, y = seen[0]
    torch.testing.assert_close(x.double(), noisy, atol=1e-6, rtol=0)
    assert torch.equal(t, timesteps)
    assert 0 < kept.sum() < 32
    assert torch.equal(y, torch.where(kept, trainer.labels[chosen], 10))


def test_resume_refuses_another_run(tmp_path, capsys):
    trainer = _trainer()
    trainer.train_step()
    trainer.save(tmp_path / "c.safetensors")
    with pytest.raises(
        CheckpointError, match=r"c\.safetensors: the checkpoint was made with lr=0\.001, this run has 0\.1"
    ):
        _trainer(lr=0.1).restore(tmp_path / "c.safetensors")
    trainer.ema.save(tmp_path / "ema.safetensors")
    with pytest.raises(CheckpointError, match=r"ema\.safetensors: no 'options' in the metadata"):
        _trainer().restore(tmp_path / "ema.safetensors")
    assert _train(tmp_path, "--steps", "2", "--resume", "--checkpoint", str(tmp_path / "none.safetensors")) == 1
    assert "none.safetensors: no such checkpoint file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "must be at least 1, got 0"),
        (["--label-dropout", "1.5"], "must be in [0, 1), got 1.5"),
        (["--schedule", "cubic"], "invalid choice: 'cubic'"),
    ],
)
def test_bad_options(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit):
        _train(tmp_path, *arguments)
    assert message in capsys.readouterr().err


def test_a_model_without_null_class_is_refused():
    with pytest.raises(ValueError, match=r"config must have num_classes and null_class"):
        training.Trainer({**CONFIG, "null_class": False}, training.TrainingOptions(), *load_digits())


def test_a_diverging_run_stops_with_a_message(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training.Trainer, "train_step", lambda self: float("nan"))
    assert _train(tmp_path, "--steps", "2") == 1
    assert "the loss is nan at step 0: try a smaller --lr" in capsys.readouterr().err
    assert not (tmp_path / "w.safetensors").exists()
