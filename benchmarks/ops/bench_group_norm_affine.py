"""`group_norm_affine` beside the same from torch's statistics: what a convolution that norms its input waits for."""

import functools

import torch
from torch import Tensor

from fastgen.ops import group_norm_affine

from ..cases import DTYPES, Case, Provider, Workload, compiled, random_tensor
from ..verify import Values

GROUPS = 32
SHAPES = ((4, 128, 32, 32), (1, 320, 64, 64), (1, 1280, 16, 16))


def plain(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    n, c = x.shape[:2]
    variance, mean = torch.var_mean(x.float().reshape(n, GROUPS, -1), 2, correction=0)
    rstd, mean = ((t.repeat_interleave(c // GROUPS, 1)) for t in (torch.rsqrt(variance + 1e-5), mean))
    a = rstd * weight.float()
    return a, bias.float() - mean * a


def cases(device: torch.device, full: bool) -> list[Case]:
    if device.type != "cpu":
        return []
    return [
        Case(
            "group_norm_affine", "affine", shape, dtype, functools.partial(build, shape, layout, dtype, device),
            "GroupNorm as scale and shift", layout=layout,
        )
        for shape in SHAPES
        for layout in ("NCHW", "NHWC")
        for dtype in ("fp32", "bf16")
    ]  # fmt: skip


def build(shape: tuple[int, ...], layout: str, dtype: str, device: torch.device, allow_compile: bool) -> Workload:
    x = random_tensor(shape, device, dtype, seed=0, layout=layout, mean=0.3, deviation=1.5)
    weight = random_tensor(shape[1:2], device, dtype, seed=1, mean=1.0, deviation=0.2)
    bias = random_tensor(shape[1:2], device, dtype, seed=2, deviation=0.2)
    notes: list[str] = []
    providers = [Provider("eager", functools.partial(plain, x, weight, bias))]
    if function := compiled(plain, (x, weight, bias), allow_compile, notes):
        providers.append(Provider("compile", functools.partial(function, x, weight, bias)))
    providers.append(Provider("fastgen", functools.partial(group_norm_affine, x, GROUPS, weight, bias), "fastgen"))
    providers.append(Provider("copy", x.clone, "floor"))

    def expected() -> tuple[Tensor, ...]:
        n, c = x.shape[:2]
        wide = x.double().reshape(n, GROUPS, -1)
        mean, rstd = wide.mean(2), torch.rsqrt(wide.var(2, correction=0) + 1e-5)
        a = rstd.repeat_interleave(c // GROUPS, 1) * weight.double()
        return a, bias.double() - mean.repeat_interleave(c // GROUPS, 1) * a

    return Workload(
        providers,
        (Values(expected, tolerance=2e-5),),
        min_bytes=x.numel() * DTYPES[dtype].itemsize,
        flops=5 * x.numel(),
        notes=notes,
    )
