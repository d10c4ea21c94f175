"""Error messages of the ops: each names the op, the argument, what came and what was expected."""

from typing import NoReturn

from torch import Tensor


def fail(op: str, message: str) -> NoReturn:
    raise ValueError(f"{op}: {message}")


def shape_of(tensor: Tensor) -> str:
    return f"shape {tuple(tensor.shape)}"
