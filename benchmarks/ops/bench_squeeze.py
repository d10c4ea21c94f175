"""`squeeze` of images and back, beside `F.pixel_unshuffle`, the view and permutation of nflows and Glow's ports, and FrEIA's
convolution.

The floor is a clone of the input.
"""

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.ops import squeeze

from ..cases import DTYPES, Case, Provider, Workload, compiled, random_tensor
from ..verify import Values

SHAPES = ((64, 3, 64, 64), (64, 24, 16, 16))
GROUP_OF = {"forward": "squeeze", "inverse": "squeeze back"}

Function = Callable[[Tensor], Tensor]


def permuted(x: Tensor, inverse: bool) -> Tensor:
    n, c, h, w = x.shape
    if inverse:
        return x.view(n, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, c // 4, 2 * h, 2 * w)
    return x.view(n, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(n, 4 * c, h // 2, w // 2)


def cases(device: torch.device, full: bool) -> list[Case]:
    """2 modes x 2 shapes x 2 layouts x dtypes."""
    dtypes = ("bf16", "fp32", "fp16") if device.type == "cuda" else ("fp32", "bf16")
    return [
        Case("squeeze", mode, shape, dtype, functools.partial(build, mode, shape, layout, dtype, device), group, layout=layout)
        for mode, group in GROUP_OF.items()
        for shape in SHAPES
        for layout in ("NCHW", "NHWC")
        for dtype in dtypes
    ]  # fmt: skip


def build(
    mode: str, shape: tuple[int, ...], layout: str, dtype: str, device: torch.device, allow_compile: bool
) -> Workload:
    inverse = mode == "inverse"
    n, c, h, w = shape
    x = random_tensor((n, 4 * c, h // 2, w // 2) if inverse else shape, device, dtype, seed=0, layout=layout)
    notes: list[str] = []
    eager = F.pixel_shuffle if inverse else F.pixel_unshuffle
    functions: dict[str, Function] = {
        "eager": functools.partial(eager, **{f"{'up' if inverse else 'down'}scale_factor": 2})
    }
    if layout == "NCHW":
        functions["view, permute"] = functools.partial(permuted, inverse=inverse)
    try:
        from FrEIA.modules import IRevNetDownsampling

        layer = IRevNetDownsampling([(c, h, w)]).to(x)
        functions["FrEIA"] = lambda t: layer([t], rev=inverse)[0][0]
    except ImportError:
        notes.append("FrEIA is not installed")
    if function := compiled(functions["eager"], [x], allow_compile, notes):
        functions["compile"] = function
    functions["fastgen"] = functools.partial(squeeze, inverse=inverse)
    providers = [
        Provider(name, functools.partial(lambda f: (f(x),), f), "fastgen" if name == "fastgen" else "baseline")
        for name, f in functions.items()
    ]
    providers.append(Provider("copy", x.clone, "floor"))
    return Workload(
        providers,
        (Values(lambda: (functions["eager"](x.double()),), yardstick="eager"),),
        min_bytes=2 * math.prod(shape) * DTYPES[dtype].itemsize,
        flops=0,
        notes=notes,
    )
