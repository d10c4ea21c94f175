"""fastgen's one random generator, in plain torch: Philox4x32-10 and its conversion to normals.

Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. The key is the sample's seed, the
counter (block, step), so element `4 * block + lane` of a sample depends on nothing but (seed, step, element).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
_MASK = 0xFFFFFFFF


def _mulhilo(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the product of two 32-bit numbers held in int64, which has no room for it whole."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)  # < 2^48 each
    middle = high + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def philox_4x32(counter: Sequence[Tensor], key: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds over int64 tensors that hold 32-bit words: four counter words, two key words; returns four words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        hi0, lo0 = _mulhilo(MULTIPLIERS[0], c0)
        hi1, lo1 = _mulhilo(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + WEYL[0]) & _MASK, (k1 + WEYL[1]) & _MASK
    return c0, c1, c2, c3


def box_muller(r0: Tensor, r1: Tensor) -> tuple[Tensor, Tensor]:
    """Two 32-bit words -> two normals: sqrt(-2 ln u) * (cos, sin)(2 pi v), u = (r0 + 1/2) / 2^32, v = r1 / 2^32.

    In float64. Kernels round ``r0`` to float32 before the logarithm, as this does: it keeps u > 0 and the tail to 6.7 sigma.
    """
    u = (r0.to(torch.float32) + 0.5).double() * 2.0**-32
    radius = torch.sqrt(-2.0 * torch.log(u))
    angle = (2.0 * math.pi * 2.0**-32) * r1.double()
    return radius * torch.cos(angle), radius * torch.sin(angle)


def normals(seeds: Tensor, shape: Sequence[int], step: int) -> Tensor:
    """Standard normals [N, *], float32, ``shape[0] == len(seeds)``; the counter's words are (block, block >> 32, step, 0).
    A negative ``step`` counts from the end of the 32-bit range, as Python indices do."""
    n, size = shape[0], math.prod(shape[1:])
    block = torch.arange((size + 3) // 4, device=seeds.device)[None]  # [1, B]
    key = seeds.to(torch.int64)[:, None]  # [N, 1]
    words = philox_4x32(
        torch.broadcast_tensors(
            block & _MASK, block >> 32, torch.full_like(block, step & _MASK), torch.zeros_like(block)
        ),
        (key & _MASK, (key >> 32) & _MASK),
    )
    z0, z1 = box_muller(words[0], words[1])
    z2, z3 = box_muller(words[2], words[3])
    drawn = torch.stack((z0, z1, z2, z3), dim=-1).reshape(n, 4 * block.shape[1])[:, :size]  # [N, size]
    return drawn.to(torch.float32).reshape(tuple(shape)).contiguous()
