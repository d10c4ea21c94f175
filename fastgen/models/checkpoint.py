"""Checkpoints: safetensors files with string metadata, written so that a crash never leaves half a file."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .._files import write_atomically

Model = TypeVar("Model", bound=nn.Module)

WEIGHT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message begins with the file and says why."""


def save_state(
    path: str | os.PathLike[str], state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors and metadata to a safetensors file, atomically.

    Args:
        path: the file; its folder is made where it is missing.
        state: tensors by name, on any device; each is stored contiguous.
        metadata: strings by name, kept in the header.

    Raises:
        OSError: the file cannot be written, or the disk is full; what was there before is untouched.
    """
    tensors = {name: tensor.detach().contiguous() for name, tensor in state.items()}
    header = {"format": "pt", **(metadata or {})}
    try:
        write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=header), durable=True)
    except (SafetensorError, OSError) as error:  # safetensors has no OSError of its own for a full disk
        raise OSError(f"{path}: cannot be written: {_reason(error)}") from error


def load_state(
    path: str | os.PathLike[str], device: torch.device | str = "cpu"
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file.

    Returns:
        The tensors by name, on ``device``, and the metadata.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is not safetensors, or is cut off.
    """
    _check_exists(path)
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a readable safetensors file: {error}") from error


def save_model(
    path: str | os.PathLike[str],
    model: Model,
    name: str,
    config: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write weights, config and the name of the class, for :func:`load_model`. Raises as :func:`save_state`."""
    save_state(path, model.state_dict(), {**(metadata or {}), "model": name, "config": json.dumps(config)})


def load_model(
    path: str | os.PathLike[str],
    name: str,
    build: Callable[[Mapping[str, Any]], Model],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Model:
    """The model that :func:`save_model` wrote, in evaluation mode.

    Args:
        path: the file.
        name: of its class, which the metadata must say, if anything.
        build: makes a model of a config; raises ValueError or TypeError for one that it does not know.
        device: of the weights.
        dtype: of the weights; that of the file where None.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is damaged, is of another model, does not fit its own config, or its weights are not finite.
    """
    state, metadata = load_state(path, device)
    if metadata.get("model", name) != name:
        raise CheckpointError(f"{path}: the file holds a {metadata['model']}, not a {name}")
    check_weights(path, state)
    try:
        with torch.device("meta"):
            model = build(json_metadata(path, metadata, "config"))
        model.load_state_dict(state, assign=True)
    except CheckpointError:
        raise
    except (ArithmeticError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: the config in the metadata is not valid: {error}") from error
    except RuntimeError as error:
        reason = "; ".join(line.strip() for line in str(error).splitlines())
        raise CheckpointError(f"{path}: the weights do not fit the config: {reason}") from error
    return model.to(device=device, dtype=dtype).requires_grad_().eval()  # buffers too, which no file holds


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The metadata of a safetensors file, without its tensors. Raises as :func:`load_state`."""
    _check_exists(path)
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a readable safetensors file: {error}") from error


def json_metadata(path: str | os.PathLike[str], metadata: Mapping[str, str], key: str) -> dict[str, object]:
    """The JSON object under ``key``. Raises CheckpointError where it is missing or is not a JSON object."""
    if key not in metadata:
        found = ", ".join(sorted(metadata)) or "none"
        raise CheckpointError(f"{path}: no {key!r} in the metadata (found: {found}); was it saved by fastgen?")
    try:
        value = json.loads(metadata[key])
    except (json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: {key!r} in the metadata is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: {key!r} in the metadata must be a JSON object, got {type(value).__name__}")
    return value


def first_not_finite(state: Mapping[str, Tensor]) -> str | None:
    """The name of the first floating-point tensor with a NaN or an infinity in it, None where there is none."""
    return next((name for name, x in state.items() if x.is_floating_point() and not x.isfinite().all()), None)


def check_weights(path: str | os.PathLike[str], state: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError where ``state`` cannot be the weights of a model: one dtype of :data:`WEIGHT_DTYPES`, all finite."""
    for name, tensor in state.items():
        if tensor.dtype not in WEIGHT_DTYPES:
            raise CheckpointError(f"{path}: {name!r} must be of one of {WEIGHT_DTYPES}, got {tensor.dtype}")
    if len({tensor.dtype for tensor in state.values()}) > 1:
        found = sorted({str(tensor.dtype) for tensor in state.values()})
        raise CheckpointError(f"{path}: all weights must be of one dtype, got {', '.join(found)}")
    broken = first_not_finite(state)
    if broken is not None:
        raise CheckpointError(f"{path}: {broken!r} has values that are not finite")


def _check_exists(path: str | os.PathLike[str]) -> None:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint file")


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
