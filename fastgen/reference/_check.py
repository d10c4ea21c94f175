"""What a raw op asks of its arguments before anything is read, for the reference and the fakes; `csrc/common` says it in C++.

Plain torch broadcasts and a fake looks at one argument, so without this an argument too short, of another rank, dtype or device
would get an answer. The public functions have asked already, with messages that say more.
"""

import torch
from torch import Tensor

from .._schema import ACTIVATIONS, PREDICTION_TYPES


def require(op: str, condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(f"{op}: {message}")


def check_main(op: str, name: str, t: Tensor, dims: int = 1) -> None:
    """``t`` is floating-point, of at least ``dims`` dimensions."""
    require(op, t.is_floating_point(), f"{name} must be a floating-point tensor, got {t.dtype}")
    require(op, t.dim() >= dims, f"{name} must have at least {dims} dimensions, got shape {tuple(t.shape)}")


def check_floats(op: str, like: Tensor, shape: tuple[int, ...], **tensors: Tensor | None) -> None:
    """Those given are floating-point, of ``shape``, on the device of ``like``."""
    for name, t in tensors.items():
        if t is None:
            continue
        require(op, t.is_floating_point(), f"{name} must be a floating-point tensor, got {t.dtype}")
        require(op, tuple(t.shape) == tuple(shape), f"{name} must have shape {tuple(shape)}, got {tuple(t.shape)}")
        _check_device(op, name, t, like)


def check_skip(op: str, input: Tensor, skip: Tensor | None) -> int:
    """A second input [N, C', *spatial] beside ``input`` [N, C, *spatial], where there is one; returns the channels of both."""
    if skip is None:
        return input.shape[1]
    require(op, skip.dtype == input.dtype, f"skip must have the dtype of input, got {skip.dtype}")
    fits = skip.dim() == input.dim() and (skip.shape[0], *skip.shape[2:]) == (input.shape[0], *input.shape[2:])
    shapes = f"{tuple(skip.shape)} and {tuple(input.shape)}"
    require(op, fits, f"skip must have the shape of input but for the channels, got {shapes}")
    _check_device(op, "skip", skip, input)
    return input.shape[1] + skip.shape[1]


def check_per_sample(op: str, name: str, t: Tensor, like: Tensor) -> None:
    """``t`` is int64, one a sample of ``like``: seeds or timesteps."""
    require(op, t.dtype == torch.int64 and t.dim() == 1, f"{name} must be int64 [N], got {t.dtype}, {tuple(t.shape)}")
    require(op, t.shape[0] == like.shape[0], f"{name} must be one per sample, got {t.shape[0]} for {like.shape[0]}")
    _check_device(op, name, t, like)


def check_table(op: str, name: str, t: Tensor, like: Tensor, columns: int) -> None:
    """``t`` is [rows, >= columns]."""
    require(op, t.is_floating_point(), f"{name} must be a floating-point tensor, got {t.dtype}")
    fits = t.dim() == 2 and t.shape[1] >= columns
    require(op, fits, f"{name} must be [rows, >= {columns} columns], got shape {tuple(t.shape)}")
    _check_device(op, name, t, like)


def check_noising(op: str, like: Tensor, t: Tensor, alphas: Tensor, **tables: Tensor | None) -> None:
    """Timesteps, one a sample, and the tables [T] they index, of which ``alphas`` says how long they are."""
    check_per_sample(op, "t", t, like)
    require(op, alphas.dim() == 1, f"alphas must be [T], got shape {tuple(alphas.shape)}")
    check_floats(op, like, tuple(alphas.shape), alphas=alphas, **tables)


def check_prediction(op: str, name: str, code: int, least: int = 0) -> None:
    require(op, least <= code < len(PREDICTION_TYPES), f"{name} must be an index of PREDICTION_TYPES, got {code}")


def check_activation(op: str, code: int) -> None:
    require(op, 0 <= code < len(ACTIVATIONS), f"activation must be an index of ACTIVATIONS, got {code}")


def _check_device(op: str, name: str, t: Tensor, like: Tensor) -> None:
    require(op, t.device == like.device, f"{name} must be on the device {like.device}, got {t.device}")
