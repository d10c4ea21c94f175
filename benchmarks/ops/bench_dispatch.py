"""What a call costs before any arithmetic: `group_norm` on a tensor of 16 numbers, without gradients.

The host's time on every device: on a GPU it is the time to launch, not to finish.
"""

import functools

import torch
import torch.nn.functional as F

from fastgen.ops import group_norm

from ..cases import Case, Provider, Workload, random_tensor
from ..verify import Values

SHAPE = (1, 4, 2, 2)
GROUPS = 2


def cases(device: torch.device, full: bool) -> list[Case]:
    group = "what a call costs: GroupNorm + SiLU of 16 numbers"
    return [Case("dispatch", "group_norm", SHAPE, "fp32", functools.partial(build, device), group, clock="host")]


def build(device: torch.device, allow_compile: bool) -> Workload:
    x = random_tensor(SHAPE, device, "fp32", seed=0, mean=0.3)
    weight = random_tensor(SHAPE[1:2], device, "fp32", seed=1, mean=1.0, deviation=0.2)
    bias = random_tensor(SHAPE[1:2], device, "fp32", seed=2)

    def eager() -> torch.Tensor:
        return F.silu(F.group_norm(x, GROUPS, weight, bias))

    def fastgen() -> torch.Tensor:
        return group_norm(x, GROUPS, weight, bias, activation="silu")

    def expected() -> tuple[torch.Tensor]:
        return (F.silu(F.group_norm(x.double(), GROUPS, weight.double(), bias.double())),)

    providers = [Provider("eager", eager), Provider("fastgen", fastgen, "fastgen"), Provider("copy", x.clone, "floor")]
    return Workload(providers, (Values(expected, yardstick="eager"),), min_bytes=2 * x.nbytes, flops=11 * x.numel())
