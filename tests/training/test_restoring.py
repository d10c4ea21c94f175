"""Checkpoints: a resumed run is the uninterrupted one, bit for bit, and nothing of a malformed file is believed."""

import json
import re

import pytest
import torch

from fastgen.models import CheckpointError, load_state, save_state

from .tiny import make_trainer, state

WEIGHT = "model.out_conv.weight"  # [1, 8, 3, 3]
MOMENT = "adam.exp_avg.out_conv.weight"
SQUARE = "adam.exp_avg_sq.out_conv.weight"
EMA = "ema.out_conv.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(tensors, metadata) of a run of two steps."""
    path = tmp_path_factory.mktemp("saved") / "c.safetensors"
    trainer = make_trainer()
    trainer.fit(2)
    trainer.save(path)
    return load_state(path)


@pytest.mark.parametrize("split", [0, 1, 3])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, split):
    whole = make_trainer()
    whole.fit(5)
    first = make_trainer()
    first.fit(split)
    first.save(tmp_path / "c.safetensors")
    second = make_trainer()
    torch.manual_seed(1234)  # it must not depend on what this process drew in between
    second.restore(tmp_path / "c.safetensors")
    assert second.step == split
    second.fit(5)
    ours, theirs = state(second), state(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def entry(of, name, value):
    """A change of the JSON object ``of`` in the metadata: one entry replaced, or removed where ``value`` is None."""

    def change(tensors, metadata):
        given = json.loads(metadata[of])
        given.pop(name, None)
        metadata[of] = json.dumps(given if value is None else {**given, name: value})

    return change


def text(name, value):
    def change(tensors, metadata):
        metadata.pop(name) if value is None else metadata.update({name: value})

    return change


def tensor(name, make):
    def change(tensors, metadata):
        made = make(tensors.pop(name, None))
        if made is not None:
            tensors[name] = made

    return change


def with_value(value):
    def make(x):
        x = x.clone()
        x.view(-1)[0] = value
        return x

    return make


MALFORMED = {
    # of each field: missing, of another type, negative, NaN, of another length or dtype, or only broadcastable
    "step missing": (text("step", None), "'step' in the metadata must be a number of steps, got nothing"),
    "step negative": (text("step", "-2"), "'step' .* got '-2'"),
    "step no number": (text("step", "two"), "'step' .* got 'two'"),
    "step NaN": (text("step", "nan"), "'step' .* got 'nan'"),
    "step a fraction": (text("step", "2.5"), "'step' .* got '2.5'"),
    "step endless": (text("step", "9" * 40), "'step' .* got '9+'"),
    "options missing": (text("options", None), "no 'options' in the metadata"),
    "options no JSON": (text("options", "{"), "'options' in the metadata is not JSON"),
    "options a list": (text("options", "[1, 2]"), "'options' in the metadata must be a JSON object, got list"),
    "options without one": (entry("options", "seed", None), "'options' in the metadata has no 'seed'"),
    "options with one more": (entry("options", "colour", 1), "'options' in the metadata has an unknown 'colour'"),
    "options of another type": (entry("options", "lr", "0.001"), "made with lr='0.001', this run has 0.001"),
    "options negative": (entry("options", "batch_size", -4), "made with batch_size=-4, this run has 4"),
    "options NaN": (entry("options", "lr", float("nan")), "made with lr=nan, this run has 0.001"),
    "options true for 1": (entry("options", "seed", False), "made with seed=False, this run has 0"),
    "options of another run": (entry("options", "lr", 0.1), "made with lr=0.1, this run has 0.001"),
    "config missing": (text("config", None), "no 'config' in the metadata"),
    "config of another type": (text("config", '"UNet"'), "'config' in the metadata must be a JSON object, got str"),
    "config of another model": (entry("config", "model_channels", 16), "made with model_channels=16, this run has 8"),
    "weight missing": (tensor(WEIGHT, lambda x: None), f"it has no tensor '{WEIGHT}'"),
    "weight unknown": (tensor("model.more", lambda x: torch.zeros(3)), "it has an unknown tensor 'model.more'"),
    "weight broadcastable": (tensor(WEIGHT, lambda x: x[:, :1]), r"must be torch.float32 of shape \(1, 8, 3, 3\), got"),
    "weight of one number": (tensor(WEIGHT, lambda x: x.sum()), rf"'{WEIGHT}' must be .*, got torch.float32 of shape \(\)"),
    "weight of other dtype": (tensor(WEIGHT, lambda x: x.double()), f"'{WEIGHT}' must be torch.float32 .*got torch.float64"),
    "weight NaN": (tensor(WEIGHT, with_value(torch.nan)), f"'{WEIGHT}' has values that are not finite"),
    "average infinite": (tensor(EMA, with_value(torch.inf)), f"'{EMA}' has values that are not finite"),
    "moment missing": (tensor(MOMENT, lambda x: None), f"it has no tensor '{MOMENT}'"),
    "moment broadcastable": (tensor(MOMENT, lambda x: x[..., :1]), f"'{MOMENT}' must be .* of shape"),
    "moment of other dtype": (tensor(MOMENT, lambda x: x.half()), f"'{MOMENT}' must be torch.float32 .*got torch.float16"),
    "moment NaN": (tensor(MOMENT, with_value(torch.nan)), f"'{MOMENT}' has values that are not finite"),
    "second moment negative": (tensor(SQUARE, with_value(-1.0)), f"'{SQUARE}' has negative values"),
    "random state missing": (tensor("random.global", lambda x: None), "it has no tensor 'random.global'"),
    "random state short": (tensor("random.trainer", lambda x: x[:-1]), "'random.trainer' must be torch.uint8 of shape"),
    "random state of other dtype": (tensor("random.trainer", lambda x: x.int()), "'random.trainer' must be torch.uint8"),
    "random state of zeros": (tensor("random.trainer", torch.zeros_like), "'random.trainer' is not the state of a random"),
    "global random state of zeros": (tensor("random.global", torch.zeros_like), "'random.global' is not the state of"),
}  # fmt: skip


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_checkpoints(saved, tmp_path, kind):
    change, message = MALFORMED[kind]
    tensors, metadata = dict(saved[0]), dict(saved[1])
    change(tensors, metadata)
    save_state(tmp_path / "c.safetensors", tensors, metadata)
    trainer = make_trainer()
    trainer.fit(1)
    before = state(trainer)
    with pytest.raises(CheckpointError) as error:
        trainer.restore(tmp_path / "c.safetensors")
    line = str(error.value)
    assert line.startswith(f"{tmp_path / 'c.safetensors'}: ") and "\n" not in line
    assert re.search(message, line), line
    after = state(trainer)  # nothing is half restored
    assert trainer.step == 1 and all(torch.equal(before[name], after[name]) for name in before)


def test_a_cut_file_and_weights_alone(saved, tmp_path):
    trainer = make_trainer()
    trainer.save(tmp_path / "c.safetensors")
    (tmp_path / "c.safetensors").write_bytes((tmp_path / "c.safetensors").read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"c\.safetensors: not a readable safetensors file"):
        trainer.restore(tmp_path / "c.safetensors")
    trainer.save_weights(tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"w\.safetensors: no 'options' in the metadata"):
        trainer.restore(tmp_path / "w.safetensors")
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors: no such checkpoint file"):
        trainer.restore(tmp_path / "none.safetensors")
