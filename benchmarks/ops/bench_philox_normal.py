"""`philox_normal` beside `torch.randn`: normals that depend on the sample's seed alone, against torch's own generator."""

import functools
import math

import torch
from torch import Tensor

from fastgen.ops import philox_normal
from fastgen.reference.philox_normal import philox_normal as reference_normal

from ..cases import WITH_SEEDS, Case, Provider, Workload
from ..verify import Normals, Values

SHAPES = ((1, 4, 64, 64), (16, 4, 256, 256), (64, 4, 256, 256))  # a latent, 4 Mi elements, 16 Mi
TOLERANCE = 1e-6  # of the largest normal expected (about 5): a few units in the last place
STEP = 7
FLOPS_PER_ELEMENT = 60  # nominal: ten rounds of Philox for four words, a logarithm, a root, a sine and a cosine for two


def cases(device: torch.device, full: bool) -> list[Case]:
    return [
        Case(
            "philox_normal", "normals", shape, "fp32", functools.partial(build, shape, device),
            f"normals, {math.prod(shape):,}", WITH_SEEDS, layout="flat",
        )
        for shape in SHAPES
    ]  # fmt: skip


def build(shape: tuple[int, ...], device: torch.device, allow_compile: bool) -> Workload:
    seeds = torch.arange(1, shape[0] + 1, dtype=torch.int64, device=device)
    generator = torch.Generator(device).manual_seed(1)

    def randn() -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    def fastgen() -> Tensor:
        return philox_normal(seeds, shape, STEP)

    some = sorted({0, shape[0] // 2, shape[0] - 1})  # the reference's int64 arithmetic is wide: these samples alone

    def expected() -> tuple[Tensor]:
        return (torch.cat([reference_normal(seeds[i : i + 1], (1, *shape[1:]), STEP) for i in some]),)

    normal = Normals(lambda outputs: outputs[0])
    out = torch.empty(shape, device=device)
    providers = [
        Provider("randn", randn, expected=(normal,)),
        Provider("fastgen", fastgen, "fastgen"),
        Provider("fill", functools.partial(out.fill_, 0.5), "floor"),  # one write of the same size
    ]
    elements = math.prod(shape)
    exact = Values(expected, tolerance=TOLERANCE, of=lambda outputs: (outputs[0][some],))
    return Workload(providers, (exact, normal), min_bytes=4 * elements, flops=FLOPS_PER_ELEMENT * elements)
