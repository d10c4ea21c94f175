"""`TrainingRecord`: what a weights file says of its training, as far as a sampler needs to know it."""

import math
import os
from dataclasses import dataclass

from ..models import CheckpointError, read_metadata
from ..models.checkpoint import json_metadata
from .options import PREDICTION_TYPES, SCHEDULES


@dataclass(frozen=True)
class TrainingRecord:
    """Each field is None where the file does not say: weights need not come from :class:`fastgen.training.Trainer`.

    ``columns`` of a table come with the ``mean`` and the ``scale`` of each, which are to be undone.
    """

    recipe: str | None = None
    schedule: str | None = None
    timesteps: int | None = None
    prediction_type: str | None = None
    image_shape: tuple[int, int, int] | None = None
    levels: int | None = None
    columns: tuple[str, ...] | None = None
    mean: tuple[float, ...] | None = None
    scale: tuple[float, ...] | None = None

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> "TrainingRecord":
        """The record in the metadata of ``path``.

        Raises:
            FileNotFoundError: there is no such file.
            CheckpointError: a field is none that a training could have had; the message names file and field.
        """
        metadata = read_metadata(path)
        if {"options", "step"} <= metadata.keys():
            raise CheckpointError(
                f"{path}: the state of a training, not weights: `fastgen train --resume` goes on from it"
            )
        if "training" not in metadata:
            return cls()
        saved = json_metadata(path, metadata, "training")

        def field(name: str, valid: bool, wanted: str) -> None:
            if name in saved and not valid:
                raise CheckpointError(f"{path}: {name!r} of the training must be {wanted}, got {saved[name]!r}")

        schedule, kind, shape = saved.get("schedule"), saved.get("prediction_type"), saved.get("image_shape")
        field("recipe", isinstance(saved.get("recipe"), str), "a string")
        field("schedule", isinstance(schedule, str) and schedule in SCHEDULES, f"one of {tuple(SCHEDULES)}")
        field("timesteps", _is_count(saved.get("timesteps")), "a positive integer")
        field("prediction_type", isinstance(kind, str) and kind in PREDICTION_TYPES, f"one of {PREDICTION_TYPES}")
        levels = saved.get("levels")
        field("levels", levels is None or _is_count(levels), "null or a positive integer")
        three = isinstance(shape, list) and len(shape) == 3 and all(_is_count(size) for size in shape)
        field("image_shape", three, "three positive integers")
        columns = saved.get("columns")
        names = isinstance(columns, list) and all(isinstance(column, str) for column in columns)
        field("columns", names, "a list of names")
        for name in ("mean", "scale"):
            count = len(columns) if isinstance(columns, list) else 0
            wanted = f"{count} finite numbers, one a column"
            field(name, _are_numbers(saved.get(name), count), wanted)
            if count and name not in saved:
                raise CheckpointError(f"{path}: {name!r} of the training must be {wanted}, got nothing")
        known = {name: saved[name] for name in cls.__dataclass_fields__ if name in saved}
        lists = {name: tuple(value) for name, value in known.items() if isinstance(value, list)}
        return cls(**{**known, **lists})  # type: ignore[arg-type]  # checked above, field by field


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31


def _are_numbers(value: object, count: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) == count
        and all(isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) for x in value)
    )
