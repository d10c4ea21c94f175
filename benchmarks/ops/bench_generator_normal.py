"""`generator_normal` beside `torch.randn`: the same numbers from the same generators, one for all or one a sample."""

import functools
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fastgen.ops import generator_normal

from ..cases import Case, Provider, Workload
from ..verify import Check, Outputs

DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}
SHAPES = ((1, 4, 32, 32), (1, 4, 64, 64), (4, 4, 64, 64), (16, 3, 256, 256))  # three sizes of latents, images
EACH = ((16, 4, 32, 32), (16, 4, 64, 64))  # with a generator a sample
TOLERANCE = 4  # units in the last place of each number
FLOPS_PER_ELEMENT = 60  # nominal: twisting and tempering a word, half a logarithm, a root, a sine and a cosine


def cases(device: torch.device, full: bool) -> list[Case]:
    if device.type != "cpu":
        return []  # generators of a GPU are torch's
    listed = [("one generator", shape, "fp32") for shape in SHAPES] + [
        ("one a sample", shape, "fp32") for shape in EACH
    ]
    listed += [
        ("one generator", shape, dtype)
        for shape in (SHAPES[1:] if full else SHAPES[-1:])
        for dtype in ("fp64", "bf16", "fp16")
    ]
    return [
        Case(
            "generator_normal", mode, shape, dtype, functools.partial(build, mode, shape, dtype),
            f"normals of torch's, {mode}, {math.prod(shape):,}", layout="flat",
        )
        for mode, shape, dtype in listed
    ]  # fmt: skip


class TorchsDraws:
    """The n-th call of a provider returns torch's n-th draw from generators in the same states: so states are compared too."""

    def __init__(self, draw: Callable[[], Tensor]) -> None:
        self._draw, self._drawn = draw, list[Tensor]()
        self._calls: dict[
            str, list[int]
        ] = {}  # of each provider, where the results of its calls lie: the same place is the same call

    def judge(self, provider: str, outputs: Outputs, all_outputs: Mapping[str, Outputs]) -> Check:
        calls, place = self._calls.setdefault(provider, []), outputs[0].data_ptr()
        if place not in calls:
            calls.append(place)
        call = calls.index(place)
        while len(self._drawn) <= call:
            self._drawn.append(self._draw())
        expected = self._drawn[call].double()
        unit = torch.finfo(self._drawn[call].dtype).eps * 2.0 ** expected.abs().clamp_min(2.0**-16).log2().floor()
        error = float(((outputs[0].double() - expected).abs() / unit).max())
        reason = "" if error <= TOLERANCE else f"draw {call} is {error:.3g} units in the last place off torch's"
        return Check(provider, error <= TOLERANCE, error, TOLERANCE, reason)


def build(mode: str, shape: tuple[int, ...], dtype_name: str, allow_compile: bool) -> Workload:
    dtype = DTYPES[dtype_name]

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(k) for k in range(shape[0] if mode == "one a sample" else 1)]

    def randn(given: list[torch.Generator]) -> Tensor:
        """As diffusers' pipelines draw."""
        if len(given) == 1:
            return torch.randn(shape, generator=given[0], dtype=dtype)
        return torch.cat([torch.randn((1, *shape[1:]), generator=g, dtype=dtype) for g in given])

    out = torch.empty(shape, dtype=dtype)
    providers = [
        Provider("randn", functools.partial(randn, generators())),
        Provider("fastgen", functools.partial(generator_normal, shape, generators(), dtype=dtype), "fastgen"),
        Provider("fill", functools.partial(out.fill_, 0.5), "floor"),  # one write of the same size
    ]
    expected = TorchsDraws(functools.partial(randn, generators()))
    elements = math.prod(shape)
    return Workload(providers, (expected,), min_bytes=out.nbytes, flops=FLOPS_PER_ELEMENT * elements)
