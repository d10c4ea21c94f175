"""The quantile of dynamic thresholding against torch's, and a whole step against diffusers' way of it."""

import pytest
import torch

from fastgen.samplers import DDIM, dynamic_threshold, linear_betas


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (3, 2, 5, 7), (2, 4, 64, 64)])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.9, 0.995, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_is_the_quantile(shape, ratio, dtype):
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3).to(dtype)
    wide = x if dtype == torch.float64 else x.float()
    expected = torch.quantile(wide.abs().flatten(1), ratio, dim=1).clamp(1, 2.5)
    torch.testing.assert_close(dynamic_threshold(x, ratio, 2.5), expected)


@pytest.mark.parametrize("ratio", [0.2, 0.995])
def test_nan_stays_with_its_sample(ratio):
    x = torch.randn(3, 4, 8, 8)
    x[1, 2, 3, 4] = float("nan")
    assert dynamic_threshold(x, ratio, 9.0).isnan().tolist() == [False, True, False]


def test_more_values_than_torch_takes():
    x = torch.zeros(1, 2**24 + 1)
    x[0, :1000] = 4.0
    with pytest.raises(RuntimeError):
        torch.quantile(x, 0.99999)
    assert dynamic_threshold(x, 0.99999, 9.0) == 4.0


def test_a_step_is_thresholded():
    """x' = a' clamp(x0, -s, s) / s + ..., as Imagen writes it."""
    betas = linear_betas()
    plan = (
        DDIM(betas=betas, thresholding=True, sample_max_value=3.0, use_clipped_model_output=True)
        .plan(10)
        .to("cpu", torch.float64)
    )
    x, eps = torch.randn(2, 3, 8, 8, dtype=torch.float64) * 2, torch.randn(2, 3, 8, 8, dtype=torch.float64)
    bar = torch.cumprod(1 - betas, 0)
    t = plan.timesteps[4]
    a, b = bar[t], bar[t - 100]
    x0 = (x - (1 - a).sqrt() * eps) / a.sqrt()
    s = dynamic_threshold(x0, 0.995, 3.0).reshape(-1, 1, 1, 1)
    x0 = x0.clamp(-s, s) / s
    expected = b.sqrt() * x0 + (1 - b).sqrt() * (x - a.sqrt() * x0) / (1 - a).sqrt()
    torch.testing.assert_close(plan.step(eps, 4, x), expected)
    torch.testing.assert_close(plan.predicted_sample(eps, 4, x), x0)


def test_bad_ratio():
    with pytest.raises(ValueError, match="ratio must be"):
        dynamic_threshold(torch.ones(1, 2), 1.5)
