"""`fastgen train`: a tiny run, its files, how it is interrupted and resumed, and what it refuses before it begins."""

import json
import os
import resource
import signal

import pytest
import torch

from fastgen._ranks import Ranks
from fastgen.cli._recipes import RECIPES
from fastgen.cli.main import main
from fastgen.models import UNet, load_state, read_metadata
from fastgen.training import Callback, CheckpointEvery, Trainer, TrainingRecord

from ..backends import import_peer
from ..mnist_files import write_mnist
from .running import refused, run

import_peer("sklearn")

TINY = ["--model-channels", "16", "--batch-size", "8", "--warmup", "2", "--dropout", "0.2", "--quiet"]
CONFIG = {**RECIPES["digits-ddpm"].unet, "model_channels": 16}


def command(folder, *arguments):
    return ["train", "digits-ddpm", *TINY, "--out", str(folder / "w.safetensors"), *arguments]


def train(folder, *arguments):
    return main(command(folder, *arguments))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(whole, "--steps", "6") == 0
    assert train(parts, "--steps", "3") == 0
    torch.manual_seed(1234)  # the resumed run must not depend on what this process drew in between
    assert train(parts, "--steps", "6", "--resume") == 0
    for name in ("w.safetensors", "w.checkpoint.safetensors"):
        (ours, metadata), (theirs, other_metadata) = load_state(whole / name), load_state(parts / name)
        assert metadata == other_metadata
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert names(parts) == ["w.checkpoint.safetensors", "w.safetensors"]


def test_the_weights_are_the_average_and_say_how_they_were_made(tmp_path):
    options = ["--schedule", "linear", "--timesteps", "100", "--prediction-type", "v_prediction"]
    assert train(tmp_path, "--steps", "4", *options) == 0
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
        "prediction_type": "v_prediction",
    }
    assert training.items() >= {**expected, "seed": 0, "image_shape": [1, 8, 8]}.items()


def test_mnist_from_a_folder_resumed_and_in_half_precision(tmp_path):
    data = write_mnist(tmp_path / "data", packed=True)
    options = [*TINY, "--data", str(data), "--lr-decay", "none", "--autocast"]

    def run_mnist(out, *arguments):
        return main(["train", "mnist-ddpm", *options, "--out", str(tmp_path / out / "w.safetensors"), *arguments])

    assert run_mnist("whole", "--steps", "4") == 0
    assert run_mnist("parts", "--steps", "2") == 0
    assert run_mnist("parts", "--steps", "4", "--resume") == 0
    (ours, metadata), (theirs, _) = (load_state(tmp_path / part / "w.safetensors") for part in ("whole", "parts"))
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == torch.float16 for name in ours)
    record = TrainingRecord.read(tmp_path / "whole" / "w.safetensors")
    assert record == TrainingRecord("mnist-ddpm", "squared_cosine", 1000, "v_prediction", (1, 28, 28))
    assert json.loads(metadata["training"])["autocast"] is True
    assert main(["sample", "--weights", str(tmp_path / "whole" / "w.safetensors"), "--num", "2", "--steps", "2",
                 "--class", "3", "--quiet", "--out", str(tmp_path / "s")]) == 0  # fmt: skip


def test_mnist_is_refused_before_the_first_step_where_it_is_not_there(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Trainer, "train_step", lambda self: pytest.fail("a step was done"))
    command = ["train", "mnist-ddpm", "--out", str(tmp_path / "w.safetensors")]
    assert "the following arguments are required: --data" in refused(capsys, *command)
    assert "no train-images-idx3-ubyte, gzipped or not" in refused(capsys, *command, "--data", tmp_path)
    (write_mnist(tmp_path / "d") / "train-labels-idx1-ubyte").write_bytes(b"damaged")
    line = refused(capsys, *command, "--data", tmp_path / "d")
    assert f"--data: {tmp_path}/d/train-labels-idx1-ubyte: not an IDX file" in line


def test_a_cosine_ends_at_the_last_step(tmp_path):
    assert train(tmp_path, "--steps", "5", "--lr-decay", "cosine") == 0
    training = json.loads(read_metadata(tmp_path / "w.safetensors")["training"])
    assert training["lr_decay_steps"] == 5 and training["warmup"] == 2


def test_each_recipe_has_its_own_defaults(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")  # of the help, so that no word is broken
    for name, steps in (("digits-ddpm", 4000), ("mnist-ddpm", RECIPES["mnist-ddpm"].steps)):
        assert run("train", name, "--help") == 0
        printed = " ".join(capsys.readouterr().out.split())
        assert f"optimiser steps in all (default: {steps})" in printed and f"(default: {name}.safetensors)" in printed
    assert "RECIPE" in refused(capsys, "train")
    assert "invalid choice: 'letters'" in refused(capsys, "train", "letters")


def test_nothing_is_printed_beside_the_lines_where_there_is_no_terminal(tmp_path, capsys):
    arguments = [argument for argument in command(tmp_path, "--steps", "2") if argument != "--quiet"]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert printed.err == "" and len(printed.out.splitlines()) == 2


BAD_OPTIONS = [
    (["--steps", "0"], "must be at least 1, got 0"),
    (["--lr", "-1"], "lr must be positive and finite, got -1.0"),
    (["--lr", "nan"], "--lr: must be finite, got nan"),
    (["--lr", "fast"], "--lr: must be a number, got 'fast'"),
    (["--warmup", "-1"], "warmup must be an integer of at least 0"),
    (["--label-dropout", "1.5"], "label_dropout must be in [0, 1), got 1.5"),
    (["--dropout", "-0.5"], "dropout must be in [0, 1), got -0.5"),
    (["--ema-decay", "1"], "ema_decay must be in [0, 1), got 1.0"),
    (["--schedule", "cubic"], "invalid choice: 'cubic'"),
    (["--prediction-type", "flow_prediction"], "invalid choice: 'flow_prediction'"),
    (["--model-channels", "7"], "num_groups must divide every width [7, 7]"),
    (["--lr-decay", "linear"], "--lr-decay: invalid choice: 'linear'"),
    (["--lr-decay", "cosine", "--steps", "2"], "--steps must be more than --warmup 2 for --lr-decay cosine, got 2"),
    (["--weights-dtype", "int8"], "--weights-dtype: invalid choice: 'int8'"),
    (["--data", "."], "unrecognized arguments: --data ."),
    (["--seed", str(2**63)], "--seed: must be at least -2^63 and below 2^63"),
    (["--out", ""], "--out: must be the name of a file or folder, got ''"),
    (["--checkpoint", " "], "--checkpoint: must be the name of a file or folder"),
    (["--device", "tpu"], "--device: must be cpu, cuda or cuda:N, got 'tpu'"),
    (["--device", "cuda:99"], "--device cuda:99: torch finds"),
    (["--resume", "--overwrite"], "not allowed with argument"),
    (["--resume"], "w.checkpoint.safetensors: no such checkpoint file"),
    (["--accumulate", "0"], "--accumulate: must be at least 1, got 0"),
    (["--accumulate", "9"], "batch_size must be at least the number of ranks times accumulate, 1 x 9 = 9, got 8"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_OPTIONS, ids=[" ".join(a) or "empty" for a, _ in BAD_OPTIONS])
def test_bad_options_are_one_line(tmp_path, capsys, arguments, message):
    assert message in refused(capsys, *command(tmp_path, *arguments))
    assert names(tmp_path) == []


def test_out_and_checkpoint_must_differ(tmp_path, capsys):
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "w.safetensors")
    for checkpoint in ("w.safetensors", "link.safetensors"):
        line = refused(capsys, *command(tmp_path, "--checkpoint", str(tmp_path / checkpoint)))
        assert "--out and --checkpoint are the same file" in line
    assert names(tmp_path) == ["link.safetensors"]


@pytest.mark.parametrize("existing", ["w.checkpoint.safetensors", "w.safetensors"])
def test_what_is_there_is_not_overwritten_in_silence(tmp_path, capsys, existing):
    (tmp_path / existing).write_text("precious")
    line = refused(capsys, *command(tmp_path, "--steps", "1"))
    assert f"{existing} is there already" in line and "--resume" in line and "--overwrite" in line
    assert (tmp_path / existing).read_text() == "precious" and names(tmp_path) == [existing]
    assert train(tmp_path, "--steps", "1", "--overwrite") == 0
    assert names(tmp_path) == ["w.checkpoint.safetensors", "w.safetensors"]


def test_an_unwritable_place_is_found_before_the_first_step(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Trainer, "train_step", lambda self: pytest.fail("a step was done"))
    (tmp_path / "file").touch()
    for option in ("--out", "--checkpoint"):
        line = refused(capsys, *command(tmp_path, option, str(tmp_path / "file" / "x.safetensors")))
        assert "file/x.safetensors: cannot be written" in line
    assert "it is a folder" in refused(capsys, *command(tmp_path, "--checkpoint", str(tmp_path)))
    assert names(tmp_path) == ["file"]


def test_leftovers_of_a_killed_run_are_cleaned_at_the_start(tmp_path):
    (tmp_path / ".w.checkpoint.safetensors.abc.tmp").mkdir()
    (tmp_path / ".w.checkpoint.safetensors.abc.tmp" / ".tmp123").write_text("half")
    assert train(tmp_path, "--steps", "1") == 0
    assert names(tmp_path) == ["w.checkpoint.safetensors", "w.safetensors"]


def test_nothing_to_do(tmp_path, capsys):
    assert train(tmp_path, "--steps", "3") == 0
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    capsys.readouterr()
    for steps in ("2", "3"):
        assert train(tmp_path, "--steps", steps, "--resume") == 0
        printed = capsys.readouterr().out
        assert f"nothing to do: {tmp_path}/w.checkpoint.safetensors is at step 3, and --steps is {steps}\n" == printed
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    (tmp_path / "w.safetensors").unlink()  # as where the run was killed between its two files
    assert train(tmp_path, "--steps", "3", "--resume") == 0
    ours, theirs = load_state(tmp_path / "w.safetensors")[0], before[tmp_path / "w.safetensors"]
    (tmp_path / "before").write_bytes(theirs)
    theirs = load_state(tmp_path / "before")[0]
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_diverging_run_stops_with_a_message(tmp_path, monkeypatch, capsys):
    real = Trainer.loss
    monkeypatch.setattr(Trainer, "loss", lambda self, batch: torch.nan * real(self, batch))
    assert "the loss is nan at step 0: try a smaller learning rate" in refused(capsys, *command(tmp_path))
    assert names(tmp_path) == []


class Interrupt(Callback):
    """Ctrl-C, as the terminal sends it, or other signals, after step ``at``."""

    def __init__(self, at, *signals):
        self.at, self.signals = at, signals

    def on_step(self, trainer, loss):
        if trainer.step == self.at:
            for signum in self.signals:
                os.kill(os.getpid(), signum)


@pytest.mark.parametrize(
    ("flag", "signals", "status"),
    [
        ([], [signal.SIGINT], 130),
        (["--overwrite"], [signal.SIGINT], 130),
        ([], [signal.SIGTERM, signal.SIGTERM], 143),  # of the launcher and of the batch system
    ],
)
def test_interruption_saves_and_says_how_to_resume(tmp_path, monkeypatch, capsys, flag, signals, status):
    assert train(tmp_path / "whole", "--steps", "5") == 0
    real, strike = Trainer.fit, Interrupt(2, *signals)
    monkeypatch.setattr(Trainer, "fit", lambda self, steps, callbacks: real(self, steps, [*callbacks, strike]))
    handlers = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
    capsys.readouterr()
    assert run(*command(tmp_path / "parts", "--steps", "5", *flag)) == status
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "stopped at step 2" in error and "the same command with --resume" in error
    assert ("in place of --overwrite" in error) == bool(flag)
    assert [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert names(tmp_path / "parts") == ["w.checkpoint.safetensors"]
    monkeypatch.setattr(Trainer, "fit", real)
    assert train(tmp_path / "parts", "--steps", "5", "--resume") == 0
    ours, theirs = (load_state(tmp_path / part / "w.safetensors")[0] for part in ("parts", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_second_ctrl_c_ends_the_process_where_no_launcher_repeats_it(tmp_path, monkeypatch, capsys):
    real, strike = Trainer.fit, Interrupt(2, signal.SIGINT, signal.SIGINT)
    monkeypatch.setattr(Trainer, "fit", lambda self, steps, callbacks: real(self, steps, [*callbacks, strike]))
    assert run(*command(tmp_path, "--steps", "5")) == 130
    assert capsys.readouterr().err.strip() == "" and names(tmp_path) == []
    monkeypatch.setattr("fastgen.cli.train.meet", one_launched)
    assert run(*command(tmp_path, "--steps", "5")) == 130
    assert "stopped at step 2" in capsys.readouterr().err and names(tmp_path) == ["w.checkpoint.safetensors"]


def one_launched():
    """The only rank of a launcher."""
    return Ranks(0, 1, 0, torch.distributed.HashStore(), launched=True)


def test_the_first_start_of_a_launcher_that_resumes_begins(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fastgen.cli.train.meet", one_launched)
    assert train(tmp_path, "--steps", "2", "--resume") == 0
    assert "w.checkpoint.safetensors is not there yet: training begins at step 0" in capsys.readouterr().out
    assert train(tmp_path, "--steps", "3", "--resume") == 0
    printed = capsys.readouterr().out
    assert "steps 2 to 3" in printed and "begins" not in printed
    (tmp_path / "w.checkpoint.safetensors").unlink()
    line = refused(capsys, *command(tmp_path, "--resume"))
    assert "w.safetensors is there already, and no checkpoint" in line and names(tmp_path) == ["w.safetensors"]


def test_micro_batches_and_shares_of_one_process(tmp_path):
    """The former round otherwise, of the latter there is one; a checkpoint of either is that of all."""
    assert train(tmp_path / "plain", "--steps", "3") == 0
    assert train(tmp_path / "parts", "--steps", "2", "--accumulate", "3") == 0
    assert train(tmp_path / "parts", "--steps", "3", "--resume", "--fsdp") == 0
    ours, theirs = (load_state(tmp_path / part / "w.safetensors")[0] for part in ("parts", "plain"))
    assert all((ours[name] - theirs[name]).abs().max() < 1e-2 for name in theirs)  # dropout has other masks


def save_on_a_full_disk(trainer, path):
    """No file may grow past a limit: what a full disk looks like to a program."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        SAVE(trainer, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


SAVE = Trainer.save


@pytest.mark.skipif(resource.getrlimit(resource.RLIMIT_FSIZE)[0] != resource.RLIM_INFINITY, reason="a limit is set")
def test_a_full_disk_is_one_line_and_the_old_checkpoint_survives(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save", lambda self, path: (save_on_a_full_disk if self.step == 2 else SAVE)(self, path))
        error = refused(capsys, *command(tmp_path, "--steps", "4", "--checkpoint-every", "1"))
    assert error.startswith(f"fastgen: error: {tmp_path}/w.checkpoint.safetensors: cannot be written: ")
    assert "File too large" in error
    assert names(tmp_path) == ["w.checkpoint.safetensors"]
    assert load_state(tmp_path / "w.checkpoint.safetensors")[1]["step"] == "1"
    assert train(tmp_path, "--steps", "2", "--resume") == 0


def test_a_checkpoint_is_written_as_often_as_asked(tmp_path, monkeypatch):
    steps = []
    monkeypatch.setattr(CheckpointEvery, "_save", lambda self, trainer: steps.append(trainer.step))
    train(tmp_path, "--steps", "5", "--checkpoint-every", "2")
    assert [*dict.fromkeys(steps)] == [2, 4, 5]
