"""Error messages of the ops: each names the op, the argument, what came and what was expected."""

from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import NoReturn

import torch
from torch import Tensor

from .._schema import PREDICTION_TYPES

TABLE_DTYPES = frozenset({torch.float32, torch.float64})


def fail(op: str, message: str) -> NoReturn:
    raise ValueError(f"{op}: {message}")


def shape_of(tensor: Tensor) -> str:
    return f"shape {tuple(tensor.shape)}"


def kind_of(value: object) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


def check_main(op: str, name: str, tensor: Tensor) -> None:
    """``tensor`` is the argument whose dtype and layout the op follows: [N, *]."""
    check_floating(op, name, tensor)
    if tensor.dim() < 1:
        fail(op, f"{name} must be [N, *], got a scalar")


def check_floating(op: str, name: str, tensor: Tensor) -> None:
    """``tensor`` has a floating-point dtype; :mod:`fastgen.ops._dtypes` copies those that no kernel takes."""
    if not isinstance(tensor, Tensor) or not tensor.dtype.is_floating_point:
        raise TypeError(f"{op}: {name} must be a floating-point tensor, got {kind_of(tensor)}")


def check_like(op: str, name: str, tensor: Tensor, like: Tensor, like_name: str) -> None:
    """``tensor`` has the shape and device of ``like``, and a floating-point dtype."""
    check_floating(op, name, tensor)
    if tensor.shape != like.shape:
        fail(op, f"{name} must have the shape of {like_name} {tuple(like.shape)}, got {shape_of(tensor)}")
    if tensor.device != like.device:
        fail(op, f"{name} must be on the device of {like_name} ({like.device}), got {tensor.device}")


def check_skip(op: str, input: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
    """``input`` [N, C, *spatial] and ``skip`` [N, C', *spatial] as `torch.cat` takes them: in the wider dtype of the two."""
    check_floating(op, "input", input)
    check_floating(op, "skip", skip)
    same = skip.dim() == input.dim() and skip.shape[:1] == input.shape[:1] and skip.shape[2:] == input.shape[2:]
    if not same:
        fail(op, f"skip must have the shape of input but for the channels, {tuple(input.shape)}, got {shape_of(skip)}")
    if skip.device != input.device:
        fail(op, f"skip must be on the device of input ({input.device}), got {skip.device}")
    if skip.dtype == input.dtype:
        return input, skip
    dtype = torch.promote_types(input.dtype, skip.dtype)
    return input.to(dtype), skip.to(dtype)


def check_timesteps(op: str, t: Tensor, like: Tensor, like_name: str) -> None:
    """``t`` is int64 [N] beside ``like`` [N, *]; its values are for the kernel to check."""
    if not isinstance(t, Tensor) or t.dtype != torch.int64:
        raise TypeError(f"{op}: t must be an int64 tensor, got {kind_of(t)}")
    if t.shape != like.shape[:1]:
        fail(op, f"t must be one per sample ({like.shape[0]}), got {shape_of(t)}")
    if t.device != like.device:
        fail(op, f"t must be on the device of {like_name} ({like.device}), got {t.device}")


def check_seeds(op: str, seeds: Tensor | Sequence[int], device: torch.device | str | None = None) -> Tensor:
    """``seeds`` as a contiguous int64 tensor; integers of up to 64 bits, Python's or NumPy's, signed or not, keep their bits."""
    if not isinstance(seeds, Tensor):
        if not isinstance(seeds, Iterable) or isinstance(seeds, (str, bytes)):
            raise TypeError(f"{op}: seeds must be a list or tensor of integers, one a sample, got {seeds!r}")
        values = list(seeds)
        if not all(isinstance(s, Integral) and -(2**63) <= s < 2**64 for s in values):
            raise TypeError(f"{op}: seeds must be integers of at most 64 bits, got {values}")
        whole = [int(s) for s in values]
        seeds = torch.tensor([s - 2**64 if s >= 2**63 else s for s in whole], dtype=torch.int64, device=device)
    if seeds.dtype != torch.int64:
        raise TypeError(f"{op}: seeds must be an int64 tensor or a list of integers, got {seeds.dtype}")
    if seeds.dim() != 1:
        fail(op, f"seeds must be one-dimensional, got shape {tuple(seeds.shape)}")
    return seeds.contiguous()


def check_draw(op: str, seeds: Tensor, like: Tensor, element: int, step: int, temperature: float) -> None:
    """``seeds`` [N] beside ``like`` [N, *], the place of a draw in their streams, and its temperature."""
    if seeds.shape != like.shape[:1]:
        fail(op, f"seeds must be one per sample ({like.shape[0]}), got {shape_of(seeds)}")
    if seeds.device != like.device:
        fail(op, f"seeds must be on the device of logits ({like.device}), got {seeds.device}")
    if not 0 <= element < 2**62:
        fail(op, f"element must be in [0, 2^62), got {element}")
    if not -(2**31) <= step < 2**32:
        fail(op, f"step must be in [-2^31, 2^32), got {step}")
    if not 0 <= temperature < float("inf"):
        fail(op, f"temperature must be finite and not negative, got {temperature}")


def check_table(op: str, name: str, table: Tensor, like: Tensor, like_name: str, steps: int | None = None) -> None:
    """``table`` is [T], T >= 1 and equal to ``steps`` where that is given."""
    if not isinstance(table, Tensor) or table.dtype not in TABLE_DTYPES:
        raise TypeError(f"{op}: {name} must be a float32 or float64 tensor, got {kind_of(table)}")
    if table.dim() != 1 or table.shape[0] < 1 or steps not in (None, table.shape[0]):
        wanted = "[T] with T >= 1" if steps is None else f"[T] with T = {steps}, the length of alphas"
        fail(op, f"{name} must be {wanted}, got {shape_of(table)}")
    if table.device != like.device:
        fail(op, f"{name} must be on the device of {like_name} ({like.device}), got {table.device}")
    refuse_gradient(op, name, table)


def refuse_gradient(op: str, name: str, tensor: Tensor) -> None:
    """``tensor`` is a constant to ``op``: better an error than a gradient of zero that nobody sees."""
    if tensor.requires_grad and torch.is_grad_enabled():
        fail(op, f"there is no gradient in {name}: detach it")


def prediction_code(op: str, name: str, value: str) -> int:
    """The index of ``value`` in PREDICTION_TYPES."""
    if value not in PREDICTION_TYPES:
        raise ValueError(f"{op}: {name} must be one of {PREDICTION_TYPES}, got {value!r}")
    return PREDICTION_TYPES.index(value)
