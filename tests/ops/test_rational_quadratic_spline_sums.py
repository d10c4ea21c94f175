"""What is summed over a batch: roundings that are the same in every element add up, where random ones cancel."""

import pytest
import torch

from fastgen.ops import rational_quadratic_spline

BINS = 8


@pytest.mark.isa
@pytest.mark.parametrize("inverse", [False, True])
def test_bins_all_alike_as_a_new_layer_has_them(inverse):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32768, 4, generator=generator).clamp(-2.9, 2.9)
    slopes = 0.1 * torch.randn(*x.shape, BINS - 1, generator=generator)

    def gradient(dtype):
        at = x.to(dtype).requires_grad_()
        alike = torch.zeros(*x.shape, BINS, dtype=dtype)
        _, log_det = rational_quadratic_spline(
            at, alike, alike, slopes.to(dtype), num_bins=BINS, bound=3.0, inverse=inverse
        )
        return torch.autograd.grad(log_det.sum(), at)[0].double()

    exact = gradient(torch.float64)
    bias = (gradient(torch.float32) - exact).mean() / exact.abs().mean()
    assert abs(bias) <= 2 * torch.finfo(torch.float32).eps
