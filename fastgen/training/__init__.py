"""Training of diffusion and autoregressive models: trainers with options, callbacks, moving average and exact checkpoints."""

from .autoregressive import AutoregressiveTrainer, begin_with_frequencies, mean_bits_per_dim
from .callbacks import Callback, CheckpointEvery, ProgressBar
from .ema import EMA
from .loop import TrainingLoop
from .options import PREDICTION_TYPES, SCHEDULES, AutoregressiveOptions, OptimizerOptions, TrainingOptions
from .record import TrainingRecord
from .trainer import Trainer

__all__ = [
    "EMA",
    "PREDICTION_TYPES",
    "SCHEDULES",
    "AutoregressiveOptions",
    "AutoregressiveTrainer",
    "Callback",
    "CheckpointEvery",
    "OptimizerOptions",
    "ProgressBar",
    "Trainer",
    "TrainingLoop",
    "TrainingOptions",
    "TrainingRecord",
    "begin_with_frequencies",
    "mean_bits_per_dim",
]
