"""Training of diffusion models: `Trainer` with its options, callbacks, moving average and exact checkpoints."""

from .callbacks import Callback, CheckpointEvery, ProgressBar
from .ema import EMA
from .options import PREDICTION_TYPES, SCHEDULES, TrainingOptions
from .record import TrainingRecord
from .trainer import Trainer

__all__ = [
    "EMA",
    "PREDICTION_TYPES",
    "SCHEDULES",
    "Callback",
    "CheckpointEvery",
    "ProgressBar",
    "Trainer",
    "TrainingOptions",
    "TrainingRecord",
]
