"""What `generator_normal` means, in plain torch: MT19937, torch's state of it, and the Box-Muller transform of blocks of 16.

Matsumoto and Nishimura, "Mersenne Twister", ACM TOMACS 8, 1998; the rest as torch's CPU kernel of `normal_` does it.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._dispatch import KERNEL_DTYPES
from ._check import require

STATE_BYTES = 5056  # int64 seed, int32 left, int32 seeded, int64 next, int64 words[624], and the spare normal of draws below BLOCK
WORDS, FAR_WORD = 624, 397
BLOCK = 16


def twist(x: Tensor) -> Tensor:
    """The 624 words after ``x`` [G, 624]; words are int64 here. Each needs one 227 before it, so they come in three parts."""
    whole = torch.cat([x, torch.zeros_like(x)], 1)
    for first, last in ((0, 227), (227, 454), (454, 624)):
        a, b = whole[:, first:last], whole[:, first + 1 : last + 1]
        mixed = (a & 0x80000000) | (b & 0x7FFFFFFF)
        far = whole[:, first + FAR_WORD : last + FAR_WORD]
        whole[:, WORDS + first : WORDS + last] = far ^ (mixed >> 1) ^ ((b & 1) * 0x9908B0DF)
    return whole[:, WORDS:]


def temper(y: Tensor) -> Tensor:
    y = y ^ (y >> 11)
    y = y ^ ((y << 7) & 0x9D2C5680)
    y = y ^ ((y << 15) & 0xEFC60000)
    return y ^ (y >> 18)


def box_muller(uniforms: Tensor, angles: Tensor) -> Tensor:
    """Blocks [..., 16] of normals in float64: element j of the first eight is r cos a, element j + 8 is r sin a."""
    radius = torch.sqrt(-2.0 * torch.log(1.0 - uniforms[..., :8]))
    normals = torch.cat([radius * torch.cos(angles[..., 8:]), radius * torch.sin(angles[..., 8:])], -1)
    return normals + 0.0  # torch's mean, which makes one zero of two


def generator_normal(
    states: Tensor, shape: Sequence[int], dtype: torch.dtype, wide_angle: bool
) -> tuple[Tensor, Tensor]:
    """Normals of ``shape`` from one state [5056], or a sample from each of [N, 5056]; and the states after it."""
    rows = states.reshape(-1, STATE_BYTES)
    count, g = math.prod(shape) // len(rows), len(rows)
    whole, rest = count // BLOCK * BLOCK, count % BLOCK
    # The last 16 are drawn again where the size is no multiple of 16; the low-precision dtypes have not drawn the rest before.
    again = torch.arange(BLOCK if rest else 0) + (count if dtype in (torch.float32, torch.float64) else whole)
    drawn = torch.cat([torch.arange(whole), again])  # which uniforms of the stream
    each = 2 if dtype == torch.float64 else 1
    words, after = _words(rows, each * (int(drawn[-1]) + 1))
    if dtype == torch.float64:
        pairs = words.reshape(g, -1, 2)[:, drawn]
        uniforms = (((pairs[..., 0] & 0x1FFFFF) << 32) | pairs[..., 1]).double() * 2.0**-53
        angles = 2 * math.pi * uniforms
    else:
        uniforms = (words[:, drawn] & 0xFFFFFF).double() * 2.0**-24
        angles = (
            (2 * math.pi * uniforms).float()
            if wide_angle
            else torch.tensor(2 * math.pi, dtype=torch.float32) * uniforms.float()
        )
    normals = box_muller(uniforms.reshape(g, -1, BLOCK), angles.double().reshape(g, -1, BLOCK)).reshape(g, -1)
    if rest:
        normals = torch.cat([normals[:, : count - BLOCK], normals[:, -BLOCK:]], 1)
    return normals.to(dtype).reshape(tuple(shape)).contiguous(), after.reshape(states.shape)


def _words(states: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The next ``count`` tempered words of each stream [G, count], and the states after them."""
    rows, ends = [], []
    for state in states:
        end = state.clone()  # whose first byte lies where int64 may
        left, following = end[8:12].view(torch.int32), end[16:24].view(torch.int64)
        block = end[24 : 24 + 8 * WORDS].view(torch.int64)[None]
        position = WORDS if left == 1 else int(following)
        drawn = [block[0, position:]]
        for _ in range(-((WORDS - position - count) // WORDS)):
            block = twist(block)
            drawn.append(block[0])
        words = torch.cat(drawn)
        rows.append(temper(words[:count]))
        following.fill_(WORDS - (len(words) - count))
        left.copy_(WORDS + 1 - following)
        end[24 : 24 + 8 * WORDS].view(torch.int64).copy_(block[0])
        ends.append(end)
    return torch.stack(rows), torch.stack(ends)


def generator_normal_check(states: Tensor, shape: Sequence[int], dtype: torch.dtype, wide_angle: bool) -> None:
    def ask(condition: bool, message: str) -> None:
        require("generator_normal", condition, message)

    found = f"{states.dtype}, {tuple(states.shape)}"
    rows = states.dtype == torch.uint8 and states.dim() in (1, 2) and states.shape[-1] == STATE_BYTES
    ask(
        rows and states.stride(-1) == 1,
        f"states must be uint8 [{STATE_BYTES}] or [N, {STATE_BYTES}] of whole rows, got {found}",
    )
    ask(states.device.type in ("cpu", "meta"), f"states must be on the CPU, got {states.device}")
    ask(all(size >= 0 for size in shape), f"shape must not be negative, got {tuple(shape)}")
    each = states.dim() == 2
    ask(
        not each or (len(shape) > 0 and shape[0] == states.shape[0]),
        f"states must be one or one a sample, got {found} for {tuple(shape)}",
    )
    count = math.prod(shape[each:])
    ask(math.prod(shape) < 2**63, f"shape has more than 2^63 elements, got {tuple(shape)}")
    ask(count >= BLOCK, f"a draw must be of {BLOCK} normals or more, got {count}: torch makes fewer in another way")
    ask(dtype in KERNEL_DTYPES, f"dtype must be float64, float32, bfloat16 or float16, got {dtype}")


def generator_normal_fake(
    states: Tensor, shape: Sequence[int], dtype: torch.dtype, wide_angle: bool
) -> tuple[Tensor, Tensor]:
    return states.new_empty(tuple(shape), dtype=dtype), states.new_empty(tuple(states.shape))
