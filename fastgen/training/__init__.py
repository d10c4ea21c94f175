"""Training of diffusion models, autoregressive ones and flows: trainers, options, callbacks, moving average, exact checkpoints.

On one process or, with :class:`Spread`, on the ranks of a launcher.
"""

from .._ranks import RankError, Ranks, meet, process_group
from .autoregressive import AutoregressiveTrainer, begin_with_frequencies, mean_bits_per_dim
from .callbacks import Callback, CheckpointEvery, ProgressBar
from .ema import EMA
from .flow import FlowTrainer, begin_with_statistics, mean_score
from .loop import TrainingLoop
from .options import (
    PREDICTION_TYPES,
    SCHEDULES,
    AutoregressiveOptions,
    FlowOptions,
    LikelihoodOptions,
    OptimizerOptions,
    TrainingOptions,
)
from .record import TrainingRecord
from .spread import Spread
from .trainer import Trainer

__all__ = [
    "EMA",
    "PREDICTION_TYPES",
    "SCHEDULES",
    "AutoregressiveOptions",
    "AutoregressiveTrainer",
    "Callback",
    "CheckpointEvery",
    "FlowOptions",
    "FlowTrainer",
    "LikelihoodOptions",
    "OptimizerOptions",
    "ProgressBar",
    "RankError",
    "Ranks",
    "Spread",
    "Trainer",
    "TrainingLoop",
    "TrainingOptions",
    "TrainingRecord",
    "begin_with_frequencies",
    "begin_with_statistics",
    "mean_bits_per_dim",
    "mean_score",
    "meet",
    "process_group",
]
