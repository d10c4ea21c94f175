"""Helpers for tests of modules: weights that are not their initial values, and copies between modules."""

import torch
from torch import Tensor, nn


def randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter a value that shows in the output: no zero-initialised layer, no identity norm."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                values /= parameter[0].numel() ** 0.5
            elif name.endswith("weight"):
                values = 1 + 0.3 * values
            else:
                values = 0.3 * values
            parameter.copy_(values)
    return module


def copy_parameters(source: nn.Module, target: nn.Module) -> None:
    """Copy weight and bias from one layer to another of the same shape."""
    with torch.no_grad():
        for name, parameter in target.named_parameters(recurse=False):
            parameter.copy_(getattr(source, name))


def max_difference(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape and a.dtype == b.dtype
    return (a - b).abs().max().item()
