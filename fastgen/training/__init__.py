"""Training of the models: `Trainer` and its options."""

from .trainer import SCHEDULES, Trainer, TrainingOptions

__all__ = ["SCHEDULES", "Trainer", "TrainingOptions"]
