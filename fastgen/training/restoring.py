"""What a training checkpoint must be before anything of it is believed.

Each check raises a CheckpointError of one line that names the file and the field.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..models import CheckpointError
from ..models.checkpoint import first_not_finite

_Path = str | os.PathLike[str]


def check_equal(path: _Path, field: str, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """The JSON object ``saved`` has the names, the types and the values of ``wanted``."""
    for name in sorted(saved.keys() | wanted.keys()):
        if name not in saved or name not in wanted:
            odd = "has no" if name not in saved else "has an unknown"
            raise CheckpointError(f"{path}: {field!r} in the metadata {odd} {name!r}")
        ours, theirs = wanted[name], saved[name]
        # an integer written for a float is the same number; true is not 1
        if ours != theirs or isinstance(ours, bool) != isinstance(theirs, bool):
            raise CheckpointError(f"{path}: the checkpoint was made with {name}={theirs!r}, this run has {ours!r}")


def read_step(path: _Path, metadata: Mapping[str, str]) -> int:
    """The number of steps done, a plain decimal number."""
    text = metadata.get("step")
    if text is None or not re.fullmatch("[0-9]{1,18}", text, re.ASCII):
        got = "nothing" if text is None else repr(text)
        raise CheckpointError(f"{path}: 'step' in the metadata must be a number of steps, got {got}")
    return int(text)


def check_tensors(path: _Path, state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Names, shapes and dtypes are those of ``expected``; what is floating-point is finite, and second moments are not negative."""
    if state.keys() != expected.keys():
        odd = sorted(state.keys() ^ expected.keys())
        kind = "no" if odd[0] in expected else "an unknown"
        raise CheckpointError(f"{path}: not a training checkpoint of this model: it has {kind} tensor {odd[0]!r}")
    for name, tensor in expected.items():
        saved = state[name]
        if saved.shape != tensor.shape or saved.dtype != tensor.dtype:
            raise CheckpointError(
                f"{path}: {name!r} must be {tensor.dtype} of shape {tuple(tensor.shape)}, "
                f"got {saved.dtype} of shape {tuple(saved.shape)}"
            )
        if name.startswith("adam.exp_avg_sq.") and (saved < 0).any():
            raise CheckpointError(f"{path}: {name!r} has negative values, which a mean of squares has not")
    broken = first_not_finite(state)
    if broken is not None:
        raise CheckpointError(f"{path}: {broken!r} has values that are not finite")


def check_random_states(path: _Path, states: Mapping[str, Tensor]) -> None:
    """Each is the state of a generator, which a generator on trial accepts."""
    for name, state in states.items():
        trial = torch.Generator("cuda" if name == "random.cuda" else "cpu")
        try:
            trial.set_state(state)
        except (RuntimeError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(f"{path}: {name!r} is not the state of a random generator: {reason}") from error
