"""`TrainingOptions` refuses what no training could use, in words that name the option."""

import math

import numpy as np
import pytest

from fastgen.training import TrainingOptions


def test_defaults_and_numpy_numbers():
    options = TrainingOptions(batch_size=np.int64(8), lr=np.float32(0.5))
    assert options.batch_size == 8 and options.lr == 0.5 and options.prediction_type == "epsilon"
    assert TrainingOptions(warmup=0, seed=-3, lr=1) == TrainingOptions(warmup=0, seed=-3, lr=1.0)


def test_the_learning_rate_rises_and_stays_or_falls_along_half_a_cosine():
    stays = TrainingOptions(lr=0.5, warmup=4)
    assert [stays.learning_rate(step) for step in (0, 1, 3, 4, 10**6)] == [0.125, 0.25, 0.5, 0.5, 0.5]
    falls = TrainingOptions(lr=0.5, warmup=4, lr_decay_steps=12)
    assert [falls.learning_rate(step) for step in (0, 1, 3, 4)] == [0.125, 0.25, 0.5, 0.5]
    assert falls.learning_rate(8) == pytest.approx(0.25)
    assert falls.learning_rate(6) == pytest.approx(0.5 * (1 + math.sqrt(0.5)) / 2)
    assert falls.learning_rate(12) == falls.learning_rate(99) == 0
    assert TrainingOptions(warmup=0).learning_rate(0) == TrainingOptions().lr


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "batch_size must be an integer of at least 1"),
        ({"batch_size": 1.0}, TypeError, "batch_size must be an integer, got 1.0"),
        ({"batch_size": True}, TypeError, "batch_size must be an integer, got True"),
        ({"timesteps": 0}, ValueError, "timesteps must be an integer of at least 1"),
        ({"warmup": -1}, ValueError, "warmup must be an integer of at least 0"),
        ({"lr_decay_steps": -1}, ValueError, "lr_decay_steps must be an integer of at least 0"),
        (
            {"lr_decay_steps": 200},
            ValueError,
            "lr_decay_steps must be 0 or more than the warm-up of 200 steps, got 200",
        ),
        ({"autocast": 1}, TypeError, "autocast must be True or False, got 1"),
        ({"seed": 2**63}, ValueError, "below 2^63, got 9223372036854775808"),
        ({"lr": -1.0}, ValueError, "lr must be positive and finite, got -1.0"),
        ({"lr": 0}, ValueError, "lr must be positive and finite, got 0"),
        ({"lr": math.nan}, ValueError, "lr must be positive and finite, got nan"),
        ({"lr": math.inf}, ValueError, "lr must be positive and finite, got inf"),
        ({"lr": "1"}, TypeError, "lr must be a number, got '1'"),
        ({"ema_decay": 1.0}, ValueError, r"ema_decay must be in \[0, 1\), got 1.0"),
        ({"label_dropout": math.nan}, ValueError, r"label_dropout must be in \[0, 1\), got nan"),
        ({"schedule": "cubic"}, ValueError, "schedule must be one of .*'squared_cosine'.*, got 'cubic'"),
        ({"prediction_type": "flow_prediction"}, ValueError, "prediction_type must be one of .*got 'flow_prediction'"),
    ],
)
def test_refusals(options, error, message):
    with pytest.raises(error, match=message.replace("^", r"\^")):
        TrainingOptions(**options)
