"""What `sample` and its like check before anything is drawn: each error names the argument, what came and what was expected."""

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .._dispatch import KERNEL_DTYPES
from .guidance import Guidance, Model


def check_shape(shape: Sequence[int], form: str = "[N, C, *]", least: int = 2) -> tuple[int, ...]:
    """``shape`` as a tuple of integers, at least ``least`` of them."""
    try:
        sizes = tuple(operator.index(size) for size in shape)
    except TypeError:
        raise TypeError(f"shape must be {form}, integers, got {shape!r}") from None
    if len(sizes) < least or min(sizes, default=0) < 0:
        raise ValueError(f"shape must be {form}, got {sizes}")
    return sizes


def check_dtype(dtype: torch.dtype) -> torch.dtype:
    """``dtype`` itself, one that the kernels take."""
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be floating-point, got {dtype}")
    if dtype not in KERNEL_DTYPES:
        raise ValueError(f"dtype must be float64, float32, bfloat16 or float16, got {dtype}")
    return dtype


def check_device(device: torch.device | str | None, model: Any) -> torch.device:
    """``device``, one that torch has here; that of the model's first parameter where it is None, or the CPU."""
    if device is None:
        parameter = next(model.parameters(), None) if isinstance(model, torch.nn.Module) else None
        return torch.device("cpu") if parameter is None else parameter.device
    try:
        place = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device must be one that torch knows, such as 'cpu' or 'cuda', got {device!r}") from None
    except TypeError:
        raise TypeError(f"device must be a torch.device or its name, got {device!r}") from None
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device must be one of this machine, got {place}: torch sees {torch.cuda.device_count()} GPUs"
        )
    return place


def check_model(model: Model | None, guidance: Guidance | None) -> None:
    """A model that can be called, or a guidance that holds one."""
    if guidance is not None and not isinstance(guidance, Guidance):
        raise TypeError(f"guidance must be one of fastgen.samplers.guidance, got {type(guidance).__name__}")
    if model is None and guidance is None:
        raise ValueError("model may be None only with a guidance, which holds its own")
    if model is not None and not callable(model):
        raise TypeError(f"model must be callable as model(x, t, **kwargs), got {type(model).__name__}")


def check_kwargs(name: str, kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """A dict of keyword arguments, empty where there are none."""
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise TypeError(f"{name} must be a dict of keyword arguments, got {type(kwargs).__name__}")
    return dict(kwargs or {})


def check_tensor(name: str, tensor: Tensor) -> Tensor:
    """``tensor`` itself: NumPy arrays have no device, and are not taken for tensors."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    return tensor


def check_start(noise: Tensor, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """The start of a trajectory, where the samples are and of their dtype."""
    if not check_tensor("noise", noise).is_floating_point():
        raise TypeError(f"noise must be floating-point, got {noise.dtype}")
    if noise.shape != shape:
        raise ValueError(f"noise must have the shape {shape} of the samples, got {tuple(noise.shape)}")
    return noise.to(device, dtype)


def check_classes(classes: Tensor | Sequence[int], n: int, model: Model | None) -> Tensor:
    """Labels as int64. Out of range, they would be an assertion on the device that ends the process's use of it."""
    try:
        labels = torch.as_tensor(classes)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"classes must be [N] = [{n}] integers, got {classes!r}") from None
    if labels.shape != (n,) or labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"classes must be [N] = [{n}] integers, got shape {tuple(labels.shape)} of {labels.dtype}")
    num_classes, null_label = getattr(model, "num_classes", None), getattr(model, "null_label", None)
    if isinstance(num_classes, int):
        known = num_classes + (null_label == num_classes)
        wrong = sorted({label for label in labels.tolist() if not 0 <= label < known})
        if wrong:
            raise ValueError(f"classes must be in [0, {known}), got {wrong}")
    return labels.long()


def check_inpainting(
    known: Tensor | None, mask: Tensor | None, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """``known`` and ``mask`` spread over the samples, or nothing."""
    if (known is None) != (mask is None):
        raise ValueError("known and mask come together")
    if known is None or mask is None:
        return {}
    spread = {}
    for name, tensor in (("known", known), ("mask", mask)):
        try:
            spread[name] = check_tensor(name, tensor).to(device, dtype).expand(shape).contiguous()
        except RuntimeError:
            raise ValueError(f"{name} must broadcast to {shape}, got shape {tuple(tensor.shape)}") from None
    return spread
