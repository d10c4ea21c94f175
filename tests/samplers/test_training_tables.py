"""Tables for training: their definitions, and what they refuse."""

import pytest
import torch

from fastgen.ops import VLB_COLUMNS
from fastgen.samplers import alphas_cumprod, linear_betas, noising_tables, squared_cosine_betas, vlb_table


@pytest.mark.parametrize("betas", [linear_betas(50), squared_cosine_betas(50)])
def test_noising_tables(betas):
    bar = alphas_cumprod(betas)
    alphas, sigmas = noising_tables(bar.float())
    assert alphas.dtype == sigmas.dtype == torch.float64 and alphas.shape == (50,)
    torch.testing.assert_close(alphas.square(), bar, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(alphas.square() + sigmas.square(), torch.ones(50, dtype=torch.float64))


@pytest.mark.parametrize("bad", [torch.ones(2, 2), torch.tensor([0.5, 1.5]), torch.tensor([float("nan")])])
def test_refusals(bad):
    with pytest.raises(ValueError, match=r"alphas_cumprod must be \[T\] with values in \[0, 1\], got shape"):
        noising_tables(bad)


@pytest.mark.parametrize("betas", [linear_betas(50), squared_cosine_betas(50)])
def test_vlb_table(betas):
    """Against the product of the two Gaussians q(x_{t-1} | x0) and q(x_t | x_{t-1}), completed to a square."""
    bar = alphas_cumprod(betas)
    table = dict(zip(VLB_COLUMNS, vlb_table(bar).unbind(1), strict=True))
    before, alpha = bar[:-1], 1 - betas[1:]
    precision = 1 / (1 - before) + alpha / betas[1:]
    torch.testing.assert_close(table["inverse_deviation"][1:].square(), precision, rtol=1e-9, atol=0.0)
    torch.testing.assert_close(table["mean"][1:], before.sqrt() / (1 - before) / precision, rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(table["log_variance_range"][1:], (betas[1:] * precision).log(), rtol=1e-6, atol=1e-12)
    assert abs(table["mean"][0] - 1) < 1e-12 and table["inverse_deviation"][0] == table["inverse_deviation"][1]
    assert abs(table["log_variance_range"][0] - (betas[0] * precision[0]).log()) < 1e-9


@pytest.mark.parametrize("bar", [torch.tensor([0.9]), torch.tensor([0.9, 0.95]), torch.tensor([1.0, 0.5])])
def test_vlb_table_refusals(bar):
    with pytest.raises(ValueError, match="alphas_cumprod must fall, below 1, over at least two steps"):
        vlb_table(bar)
