"""What the tests of all op families share: layouts, guarded memory and the bar of the numerics."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HALF_ULP = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
LAYOUTS = ("contiguous", "channels_last")
PLACES = (*LAYOUTS, "strided")


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def laid_out(t: Tensor, layout: str) -> Tensor:
    """``t`` [N, C, *spatial] with its channels innermost, or as it is."""
    return t.movedim(1, -1).contiguous().movedim(-1, 1) if layout == "channels_last" and t.dim() > 2 else t


def guarded(t: Tensor, before: int = 61) -> Tensor:
    """The values and strides of ``t`` in the middle of NaN: reading past either end shows."""
    extent = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) + 1 if t.numel() else 0
    buffer = torch.full((before + extent + 67,), float("nan"), dtype=t.dtype)
    return torch.as_strided(buffer, t.shape, t.stride(), before).copy_(t)


def place(t: Tensor, layout: str) -> Tensor:
    """``t`` in one of PLACES, in the middle of NaN; strided is every second column of a wider tensor."""
    if layout != "strided":
        return guarded(laid_out(t, layout))
    wide = torch.full((*t.shape[:-1], 2 * t.shape[-1]), float("nan"), dtype=t.dtype)
    wide[..., ::2] = t
    return wide[..., ::2]


STRIDES = ("transposed", "sliced", "expanded", "channels")


def strided(x: Tensor, kind: str) -> Tensor:
    """``x`` [N, C, H, W] in memory that is neither contiguous nor channels-last: one of STRIDES."""
    n, c, h, w = x.shape
    if kind == "transposed":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if kind == "expanded":
        return x[:1, :, :, :1].expand(x.shape)
    if kind == "channels":
        return torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last)[:, :c]
    every_second = torch.full((n, c, h, 2 * w), float("nan"), dtype=x.dtype)
    every_second[..., ::2] = x
    return every_second[..., ::2]


def dtype_name(dtype: torch.dtype) -> str:
    """fp64, fp32, bf16 or fp16."""
    return {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def widened(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same with every floating tensor in float64."""
    return tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, arguments)


def poison_allocator(bytes_each: int) -> None:
    """Fill freed blocks with NaN, so that memory an op forgets to write is seen."""
    blocks = [torch.full((max(bytes_each // 4, 1),), float("nan")) for _ in range(8)]
    del blocks


def relative(actual: Tensor, exact: Tensor) -> float:
    """The norm of the error, in float64, by the norm of what is exact."""
    return ((actual.double() - exact).norm() / exact.norm()).item()


def assert_bar(actual: Tensor, plain: Tensor, exact: Tensor, slack: float = 0.0, terms: float = 1.0) -> None:
    """Error against float64 at most twice that of plain torch in the same dtype, plus one rounding of the output.

    ``slack``, relative to the largest value or to ``terms``, the size of what it is the sum of, is for what plain torch happens to
    get exactly right.
    """
    assert actual.shape == exact.shape
    if exact.numel() == 0:
        return
    error, allowed = (actual.double() - exact).abs().max(), (plain.double() - exact).abs().max()
    largest = exact.abs().max()
    rounding = HALF_ULP[actual.dtype] * largest + slack * largest.clamp_min(terms)
    assert error <= 2 * allowed + rounding, f"error {error:.3e}, plain torch {allowed:.3e}, one rounding {rounding:.3e}"


def assert_any_threads(function: Callable[[], Tensor | Sequence[Tensor]]) -> None:
    """The same bits on one thread, two and three, and on one again."""
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            found.append(_several(function()))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def assert_registered(op: torch._ops.OpOverload, arguments: Sequence[Any]) -> None:
    """opcheck, which asks about the registration and takes half a second, and :func:`assert_fake`."""
    torch.library.opcheck(op, arguments)
    assert_fake(op, arguments)


def assert_fake(op: torch._ops.OpOverload, arguments: Sequence[Any]) -> None:
    """Shapes, strides and dtypes of the fake against those of the kernel, which opcheck does not always compare."""
    real = _several(op(*arguments))
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = _several(op(*tree_map_only(Tensor, mode.from_tensor, arguments)))
    for r, f in zip(real, fake, strict=True):
        assert (r.shape, r.stride(), r.dtype) == (f.shape, f.stride(), f.dtype)


def chi_square(counts: Tensor, probabilities: Tensor) -> float:
    """The probability of counts no likelier than these, of cells that are expected at least five times."""
    expected = counts.sum() * probabilities
    assert (counts[probabilities == 0] == 0).all()
    small = expected < 5
    counts = torch.cat([counts[~small], counts[small].sum()[None]]).double()
    expected = torch.cat([expected[~small], expected[small].sum()[None]])
    counts, expected = counts[expected > 0], expected[expected > 0]
    statistic = ((counts - expected).square() / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2).double(), statistic / 2).item()


def _several(results: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return [results] if isinstance(results, Tensor) else results
