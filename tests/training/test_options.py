"""`TrainingOptions` refuses what no training could use, in words that name the option."""

import math

import numpy as np
import pytest

from fastgen.training import TrainingOptions


def test_defaults_and_numpy_numbers():
    options = TrainingOptions(batch_size=np.int64(8), lr=np.float32(0.5))
    assert options.batch_size == 8 and options.lr == 0.5 and options.prediction_type == "epsilon"
    assert TrainingOptions(warmup=0, seed=-3, lr=1) == TrainingOptions(warmup=0, seed=-3, lr=1.0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "batch_size must be an integer of at least 1"),
        ({"batch_size": 1.0}, TypeError, "batch_size must be an integer, got 1.0"),
        ({"batch_size": True}, TypeError, "batch_size must be an integer, got True"),
        ({"timesteps": 0}, ValueError, "timesteps must be an integer of at least 1"),
        ({"warmup": -1}, ValueError, "warmup must be an integer of at least 0"),
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
