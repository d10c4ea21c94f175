"""`TrainingRecord`: what a file says is believed only where a training could have written it."""

import json

import pytest

from fastgen.models import CheckpointError
from fastgen.training import TrainingRecord

from .tiny import make_model, make_trainer


def test_what_the_trainer_writes_is_read_back(tmp_path):
    trainer = make_trainer(prediction_type="v_prediction", timesteps=50)
    trainer.fit(1)
    trainer.save_weights(tmp_path / "w.safetensors", "blobs")
    record = TrainingRecord.read(tmp_path / "w.safetensors")
    assert record == TrainingRecord("blobs", "squared_cosine", 50, "v_prediction", (1, 8, 8))


def test_weights_that_say_nothing(tmp_path):
    make_model().save(tmp_path / "w.safetensors")
    assert TrainingRecord.read(tmp_path / "w.safetensors") == TrainingRecord()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("recipe", 3),
        ("schedule", "cubic"),
        ("schedule", ["linear"]),
        ("timesteps", "1000"),
        ("timesteps", 0),
        ("timesteps", -5),
        ("timesteps", 1e3),
        ("timesteps", True),
        ("timesteps", None),
        ("prediction_type", "flow_prediction"),
        ("prediction_type", {}),
        ("image_shape", [1, 8]),
        ("image_shape", [1, 8, -8]),
        ("image_shape", "188"),
        ("image_shape", [1, 8, float("nan")]),
        ("levels", 0),
        ("levels", "17"),
        ("columns", "age"),
        ("columns", ["age", 3]),
        ("mean", [0.0]),
        ("scale", 1.0),
    ],
)
def test_malformed_fields(tmp_path, field, value):
    make_model().save(tmp_path / "w.safetensors", {"training": json.dumps({field: value})})
    with pytest.raises(
        CheckpointError, match=rf"w\.safetensors: '{field}' of the training must be [^\n]*, got [^\n]*$"
    ):
        TrainingRecord.read(tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("field", "value"), [("mean", [0.0]), ("mean", [0.0, "1"]), ("scale", [1.0, float("inf")]), ("scale", None)]
)
def test_numbers_that_do_not_fit_the_columns(tmp_path, field, value):
    training = {"columns": ["age", "bmi"], "mean": [0.0, 1.0], "scale": [1.0, 2], field: value}
    make_model().save(tmp_path / "w.safetensors", {"training": json.dumps(training)})
    with pytest.raises(
        CheckpointError, match=rf"'{field}' of the training must be 2 finite numbers, one a column, got "
    ):
        TrainingRecord.read(tmp_path / "w.safetensors")


def test_columns_without_their_units(tmp_path):
    make_model().save(tmp_path / "w.safetensors", {"training": json.dumps({"columns": ["age"], "mean": [0.0]})})
    with pytest.raises(
        CheckpointError, match="'scale' of the training must be 1 finite numbers, one a column, got nothing"
    ):
        TrainingRecord.read(tmp_path / "w.safetensors")


def test_the_state_of_a_training_is_told_from_weights(tmp_path):
    make_trainer().save(tmp_path / "c.safetensors")
    with pytest.raises(CheckpointError, match=r"c\.safetensors: the state of a training, not weights"):
        TrainingRecord.read(tmp_path / "c.safetensors")


def test_what_is_no_object(tmp_path):
    make_model().save(tmp_path / "w.safetensors", {"training": "[1]"})
    with pytest.raises(CheckpointError, match="'training' in the metadata must be a JSON object, got list"):
        TrainingRecord.read(tmp_path / "w.safetensors")
