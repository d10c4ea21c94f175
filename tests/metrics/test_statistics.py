"""Moments: against NumPy, merged in any order, a mean of many digits; their files, and what is said of files that are none."""

import numpy as np
import pytest
import torch

from fastgen.metrics import Gaussian, Moments, StatisticsError, holds_statistics


def rows(n, d=7, seed=0, mean=0.0):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(n, d, generator=generator, dtype=torch.float64)
        @ torch.randn(d, d, generator=generator, dtype=torch.float64)
        + mean
    )


def moments(*parts):
    found = Moments(parts[0].shape[1])
    for part in parts:
        found.update(part)
    return found


@pytest.mark.parametrize("mean", [0.0, 1e6])
@pytest.mark.parametrize("batch", [1, 3, 100])
def test_they_are_those_of_numpy(mean, batch):
    x = rows(100, mean=mean)
    found = moments(*x.split(batch)).gaussian()
    np.testing.assert_allclose(found.mean, x.mean(dim=0), rtol=1e-14)
    np.testing.assert_allclose(found.covariance, np.cov(x.numpy(), rowvar=False), rtol=1e-9, atol=1e-9)
    assert found.count == 100 and torch.equal(found.covariance, found.covariance.T)


def test_parts_are_merged_in_any_order():
    x = rows(90, mean=3.0)
    whole = moments(x)
    for sizes in ([1, 89], [30, 30, 30], [0, 50, 40], [89, 1, 0]):
        merged = Moments(7)
        for part in reversed(x.split(sizes)):
            merged.merge(moments(part))
        assert merged.count == 90
        torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-12, atol=0)
        torch.testing.assert_close(merged.m2, whole.m2, rtol=1e-12, atol=1e-10)


def test_float32_rows_are_summed_in_float64():
    x = torch.full((4000, 2), 0.1) + torch.arange(2)
    found = moments(*x.split(7)).gaussian()
    torch.testing.assert_close(found.mean, x.double()[0], rtol=1e-15, atol=0)
    assert found.covariance.abs().max() < 1e-30


def test_a_covariance_needs_two_images_and_finite_features():
    with pytest.raises(StatisticsError, match="at least 2 images, got 1"):
        moments(rows(1)).gaussian()
    with pytest.raises(StatisticsError, match="not finite"):
        moments(rows(5) * torch.inf).gaussian()


def test_a_file_keeps_everything(tmp_path):
    x = moments(rows(20)).gaussian()
    spatial = (torch.ones(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64))
    Gaussian(x.mean, x.covariance, 20, "digits", spatial).save(tmp_path / "s.npz")
    again = Gaussian.load(tmp_path / "s.npz")
    assert torch.equal(again.mean, x.mean) and torch.equal(again.covariance, x.covariance)
    assert (again.count, again.features) == (20, "digits")
    assert again.spatial is not None and torch.equal(again.spatial[1], spatial[1])
    assert holds_statistics(tmp_path / "s.npz") and sorted(path.name for path in tmp_path.iterdir()) == ["s.npz"]


def test_a_file_of_adm_is_read(tmp_path):
    """mu float32, sigma float64, and those of spatial features; nothing says of how many images."""
    np.savez(tmp_path / "adm.npz", mu=np.ones(4, np.float32), sigma=np.eye(4), mu_s=np.ones(2), sigma_s=np.eye(2))
    found = Gaussian.load(tmp_path / "adm.npz")
    assert found.mean.dtype == torch.float64 and found.count is None and found.features is None


BROKEN = {
    "no sigma": ({"mu": np.ones(2)}, "holds no statistics: no 'sigma'"),
    "other sizes": ({"mu": np.ones(2), "sigma": np.eye(3)}, r"\[D\] and \[D, D\], got \[2\] and \[3, 3\]"),
    "integers": ({"mu": np.ones(2, int), "sigma": np.eye(2)}, "'mu' must be of floating-point numbers, got int64"),
    "NaN": ({"mu": np.ones(2), "sigma": np.eye(2) * np.nan}, "values that are not finite"),
    "not symmetric": ({"mu": np.ones(2), "sigma": np.array([[1.0, 2.0], [0.0, 1.0]])}, "'sigma' must be symmetric"),
    "pickles": ({"mu": np.array([None]), "sigma": np.eye(1)}, "cannot be read"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_statistics_is_refused(tmp_path, name):
    arrays, message = BROKEN[name]
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(StatisticsError, match=message):
        Gaussian.load(tmp_path / "x.npz")


def test_a_cut_file_is_refused(tmp_path):
    whole = tmp_path / "whole.npz"
    moments(rows(20)).gaussian().save(whole)
    cut = tmp_path / "cut.npz"
    for n in (0, 10, 200, whole.stat().st_size - 5):
        cut.write_bytes(whole.read_bytes()[:n])
        assert not holds_statistics(cut)
        with pytest.raises(StatisticsError, match=f"{cut}: cannot be read, it is no npz file, damaged or cut off"):
            Gaussian.load(cut)
    damaged = bytearray(whole.read_bytes())
    damaged[600] ^= 255
    cut.write_bytes(damaged)
    with pytest.raises(StatisticsError, match=r"cut\.npz: cannot be read"):
        Gaussian.load(cut)
