"""What the tests of all op families share: layouts, guarded memory and the bar of the numerics."""

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HALF_ULP = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
LAYOUTS = ("contiguous", "channels_last")


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


def poison_allocator(bytes_each: int) -> None:
    """Fill freed blocks with NaN, so that memory an op forgets to write is seen."""
    blocks = [torch.full((max(bytes_each // 4, 1),), float("nan")) for _ in range(8)]
    del blocks


def assert_bar(actual: Tensor, plain: Tensor, exact: Tensor, slack: float = 0.0) -> None:
    """Error against float64 at most twice that of plain torch in the same dtype, plus one rounding of the output.

    ``slack``, relative to the largest value or to 1, is for what plain torch happens to get exactly right.
    """
    assert actual.shape == exact.shape
    if exact.numel() == 0:
        return
    error, allowed = (actual.double() - exact).abs().max(), (plain.double() - exact).abs().max()
    largest = exact.abs().max()
    rounding = HALF_ULP[actual.dtype] * largest + slack * largest.clamp_min(1.0)
    assert error <= 2 * allowed + rounding, f"error {error:.3e}, plain torch {allowed:.3e}, one rounding {rounding:.3e}"
