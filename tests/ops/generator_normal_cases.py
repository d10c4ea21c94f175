"""Arguments of `generator_normal` for its tests, and words of MT19937 chosen by what they shall become. CPU generators alone."""

from typing import Any

import torch
from torch import Tensor

from .families import OfTensors
from .numerics import DTYPES

# Before 2.13 torch drew the low-precision dtypes from uniforms of as few bits as they have; there it goes on to draw them itself.
DRAWN = DTYPES if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13) else (torch.float64, torch.float32)
EIGHTH = 2**21  # of a turn, in the 24 bits of an angle
TOP = 2**24 - 1


def state(seed: int, drawn: int = 0, spare: bool = False) -> Tensor:
    """Of a generator that ``drawn`` words have been taken from; with a spare normal, which a draw of fewer than 16 leaves."""
    generator = torch.Generator().manual_seed(seed)
    torch.rand(drawn, generator=generator)
    if spare:
        torch.randn(1, generator=generator)
    return generator.get_state()


def states(*seeds: int) -> Tensor:
    return torch.stack([state(seed, drawn=100 * i, spare=i % 2 == 1) for i, seed in enumerate(seeds)])


def untempered(words: Tensor) -> Tensor:
    """The words of a state that MT19937 tempers to these: each of its four steps undone, the last first."""
    y = words ^ (words >> 18)
    y = y ^ ((y << 15) & 0xEFC60000)
    x = y
    for _ in range(5):
        x = y ^ ((x << 7) & 0x9D2C5680)
    y = x
    for _ in range(3):
        x = y ^ (x >> 11)
    return x & 0xFFFFFFFF


def state_that_draws(words: Tensor) -> Tensor:
    """Of a generator whose next draws are these words, 623 at most; a draw of its first has been taken."""
    chosen = state(0, drawn=1)
    chosen[24 + 8 : 24 + 8 * (1 + len(words))].view(torch.int64).copy_(untempered(words))
    return chosen


def corners() -> Tensor:
    """Words of blocks of 16 that are hardest to be right for: the least and greatest radii, with angles at and beside every
    eighth of a turn, where quarters change and sine or cosine is next to nothing."""
    radii = [0, 1, 2, TOP // 2, TOP // 2 + 1, TOP - 1, TOP, TOP // 4]
    turns = [(EIGHTH * i + d) & TOP for i in range(8) for d in (-2, -1, 0, 1, 2)]
    blocks = [[*radii[i:], *radii[:i], *turns[first : first + 8]] for first in range(0, 40, 8) for i in range(7)]
    return torch.tensor(blocks).flatten()


def units_off(actual: Tensor, expected: Tensor) -> float:
    """The largest error in units in the last place of each number expected; one under 2^-16 counts as that.

    There, at whole quarters of a turn, sine or cosine is 1e-7, and torch's own vectors and scalar code are 8 units apart.
    """
    error = (actual.double() - expected.double()).abs()
    kind = torch.finfo(expected.dtype)
    least = max(2.0**-16, kind.smallest_normal)
    return float((error / (kind.eps * 2.0 ** expected.double().abs().clamp_min(least).log2().floor())).max())


def example(dtype: torch.dtype) -> dict[str, Any]:
    return {"shape": (2, 3, 4096), "generator": [torch.Generator().manual_seed(k) for k in (1, 2)], "dtype": dtype}


UNSEEN = {"generator_normal": lambda: (states(1, 2), [2, 3, 7], torch.float32, False)}
REFUSED = [
    ("generator_normal", {"shape": [3, 21]}, "states"),
    ("generator_normal", {"shape": []}, "states"),
    ("generator_normal", {"shape": [2, -1]}, "shape"),
    ("generator_normal", {"shape": [2, 2**32, 2**32]}, "shape"),
    ("generator_normal", {"shape": [2, 3, 5]}, "16 normals or more, got 15"),
    ("generator_normal", {"shape": [2, 0]}, "16 normals or more, got 0"),
    ("generator_normal", {"dtype": torch.int64}, "float64, float32, bfloat16 and float16|must be float64"),
]


def harmless(op: str, name: str, how: str, arguments: dict[str, Any]) -> bool:
    """One state is for all samples; nothing else says where the normals are wanted."""
    return how in ("a dimension less", "the meta device")


MAPPED = OfTensors(
    lambda states: torch.ops.fastgen.generator_normal(states, (2, 3, 7), torch.float32, False),
    lambda k: [states(2 * k, 2 * k + 1)],
)
EXPORTED = {
    "generator_normal": OfTensors(
        lambda states: torch.ops.fastgen.generator_normal(states, (states.shape[0], 3, 7), torch.float32, False),
        lambda n: [states(*range(n))],
    )
}
