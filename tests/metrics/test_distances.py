"""FID, KID, precision and recall: where their values are known, and against torch-fidelity on the same features."""

import importlib

import numpy as np
import pytest
import torch

from fastgen.metrics import (
    Gaussian,
    Moments,
    StatisticsError,
    class_accuracy,
    frechet_distance,
    kernel_distance,
    precision_recall,
)

from ..backends import import_peer
from .test_statistics import moments, rows

BLOCKS = importlib.import_module("fastgen.metrics.precision_recall")  # the function of that name hides it


def gaussian(mean, covariance):
    return Gaussian(torch.tensor(mean, dtype=torch.float64), torch.as_tensor(covariance, dtype=torch.float64))


def of(x):
    return moments(x).gaussian()


# Frechet distance


def test_known_gaussians():
    """With covariances that commute it is |m1 - m2|^2 + sum (s1 - s2)^2 over the deviations."""
    a = gaussian([0.0, 0.0, 0.0], torch.diag(torch.tensor([1.0, 4.0, 9.0])))
    b = gaussian([1.0, 2.0, -2.0], torch.diag(torch.tensor([4.0, 4.0, 0.0])))
    assert frechet_distance(a, b) == pytest.approx(9 + 1 + 0 + 9, rel=1e-14)
    turn = torch.linalg.qr(rows(3, 3)).Q
    turned = [Gaussian(turn @ g.mean, turn @ g.covariance @ turn.T) for g in (a, b)]
    assert frechet_distance(*turned) == pytest.approx(19, rel=1e-13)


def test_covariances_that_do_not_commute():
    """tr (S1 S2)^(1/2) of two 2 x 2 matrices is sqrt(tr S1 S2 + 2 sqrt(det S1 S2))."""
    s1, s2 = torch.tensor([[2.0, 1.0], [1.0, 3.0]]), torch.tensor([[5.0, -2.0], [-2.0, 1.0]])
    product = (s1 @ s2).double()
    root = (product.trace() + 2 * product.det().sqrt()).sqrt()
    expected = float(s1.trace() + s2.trace() - 2 * root)
    assert frechet_distance(gaussian([0.0, 0.0], s1), gaussian([0.0, 0.0], s2)) == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("n", [3, 20, 500])
def test_the_same_set_is_at_zero(n):
    x = of(rows(n, 40, mean=2.0))
    assert frechet_distance(x, x) <= 1e-12 * float(x.covariance.trace())


def test_one_feature_and_none_that_varies():
    assert frechet_distance(gaussian([1.0], [[4.0]]), gaussian([3.0], [[1.0]])) == pytest.approx(5.0)
    still = of(torch.ones(9, 4))
    assert frechet_distance(still, still) == 0
    assert frechet_distance(still, gaussian([1.0, 1.0, 1.0, 3.0], torch.eye(4))) == pytest.approx(8.0)


def test_fewer_images_than_features_cost_no_digits():
    """Both sets vary in few of 300 directions, of which two are common: the value is known."""
    deviations = torch.zeros(2, 300, dtype=torch.float64)
    deviations[0, :12], deviations[1, 10:30] = torch.arange(1.0, 13.0), 100.0
    turn = torch.linalg.qr(rows(300, 300)).Q
    a, b = (Gaussian(torch.zeros(300).double(), turn @ d.square().diag() @ turn.T) for d in deviations)
    expected = float((deviations[0] - deviations[1]).square().sum())
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)


def test_statistics_that_do_not_fit_are_refused():
    with pytest.raises(StatisticsError, match="2 and 1 features cannot be compared"):
        frechet_distance(gaussian([0.0, 0.0], torch.eye(2)), gaussian([0.0], [[1.0]]))
    with pytest.raises(StatisticsError, match="no negative eigenvalues, this one has -1"):
        frechet_distance(gaussian([0.0, 0.0], [[1.0, 2.0], [2.0, 1.0]]), gaussian([0.0, 0.0], torch.eye(2)))


@pytest.mark.parametrize(("n", "d"), [(400, 32), (400, 200), (60, 200), (2, 5)])
def test_fid_is_that_of_torch_fidelity(n, d):
    fid = import_peer("torch_fidelity.metric_fid")
    x, y = rows(n, d, seed=1), rows(n + 10, d, seed=2, mean=0.5)
    theirs = [fid.fid_features_to_statistics(features) for features in (x, y)]
    for own, other in zip((of(x), of(y)), theirs, strict=True):
        np.testing.assert_allclose(own.covariance, other["sigma"], rtol=1e-10, atol=1e-10)
    expected = fid.fid_statistics_to_metric(*theirs, False)["frechet_inception_distance"]
    assert frechet_distance(of(x), of(y)) == pytest.approx(expected, rel=1e-6)


def test_fid_is_that_of_the_root_of_scipy():
    linalg = import_peer("scipy.linalg")
    x, y = of(rows(300, 40, seed=1)), of(rows(200, 40, seed=2, mean=0.5))
    root = linalg.sqrtm((x.covariance @ y.covariance).numpy()).real
    expected = float((x.mean - y.mean).square().sum() + (x.covariance + y.covariance).trace()) - 2 * np.trace(root)
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-10)


# kernel distance


def test_kid_of_whole_sets_by_hand():
    """Subsets as large as the sets leave nothing to chance: sums over all pairs, one by one."""
    x, y = rows(5, 3, seed=1), rows(5, 3, seed=2)

    def kernel(a, b):
        return (float(a @ b) / 3 + 1) ** 3

    def within(z):
        return sum(kernel(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j) / 20

    expected = within(x) + within(y) - 2 * sum(kernel(a, b) for a in x for b in y) / 25
    found = kernel_distance(x, y, subsets=3, subset_size=5)
    assert found.mean == pytest.approx(expected, rel=1e-12) and found.deviation == pytest.approx(0, abs=1e-9)


def test_kid_is_that_of_torch_fidelity():
    kid = import_peer("torch_fidelity.metric_kid")
    x, y = rows(150, 16, seed=1), rows(120, 16, seed=2, mean=0.2)
    for seed in (2020, 1):
        theirs = kid.kid_features_to_metric(x, y, kid_subsets=10, kid_subset_size=100, rng_seed=seed, verbose=False)
        found = kernel_distance(x, y, subsets=10, subset_size=100, seed=seed)
        assert found.mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-10)
        assert found.deviation == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-10)


def test_the_defaults_are_those_of_torch_fidelity():
    defaults = import_peer("torch_fidelity.defaults").DEFAULTS
    assert kernel_distance.__kwdefaults__["subsets"] == defaults["kid_subsets"]
    assert kernel_distance.__kwdefaults__["subset_size"] == defaults["kid_subset_size"]
    assert kernel_distance.__kwdefaults__["seed"] == defaults["rng_seed"]
    assert precision_recall.__kwdefaults__["neighbours"] == defaults["prc_neighborhood"]


def test_kid_draws_the_same_twice_and_others_of_another_seed():
    x, y = rows(50, 4, seed=1).float(), rows(50, 4, seed=2).float()
    first, again, other = (kernel_distance(x, y, subsets=4, subset_size=20, seed=seed) for seed in (0, 0, 1))
    assert first == again != other


def test_kid_refuses_what_does_not_fit():
    x = rows(10, 3)
    with pytest.raises(ValueError, match=r"must be \[N, D\] and \[M, D\], got \[10, 3\] and \[10, 2\]"):
        kernel_distance(x, x[:, :2])
    for size in (1, 11):
        with pytest.raises(ValueError, match=f"subset_size .* of 10 and 20 rows, got {size}"):
            kernel_distance(x, rows(20, 3), subset_size=size)
    with pytest.raises(ValueError, match="subsets must be at least 1"):
        kernel_distance(x, x, subsets=0, subset_size=5)


# precision and recall


def line(*places):
    return torch.tensor(places, dtype=torch.float64)[:, None]


def test_precision_and_recall_on_a_line():
    """With one neighbour the balls of 0, 1, 10 reach 1, 1, 9: they cover [-1, 2] and [1, 19]."""
    reference = line(0, 1, 10)
    images = line(-0.5, 1.5, 19.5, 40)  # their balls reach 2, 2, 18, 20.5: [-2.5, 3.5], [1.5, 37.5], ...
    found = precision_recall(images, reference, neighbours=1)
    assert found == (0.5, 1.0)
    assert precision_recall(reference, images, neighbours=1) == (1.0, 0.5)


def test_sets_far_apart_share_nothing_and_a_set_all_with_itself():
    x = rows(70, 5)
    assert precision_recall(x, x) == (1, 1)
    assert precision_recall(x, x + 1e3) == (0, 0)


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_copies_are_at_distance_zero(offset):
    """Every image four times: the third neighbour is a copy, the balls are points, and each holds its own copies alone."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 400, generator=generator) * 3 + offset
    copies = x.repeat(4, 1)
    points, others = (BLOCKS._Points(rows, x.double().mean(0), "cpu") for rows in (copies, copies[:77].flip(0)))
    squares = BLOCKS._squares(points, points.parts[0], others, others.parts[0])
    equal = (copies[:, None] == copies[:77].flip(0)).all(dim=2)
    assert equal.sum() == 4 * 77 and torch.equal(squares == 0, equal)
    assert precision_recall(copies, copies.flip(0)) == (1, 1)
    assert precision_recall(copies, copies + 0.01 * torch.randn(120, 400, generator=generator)).recall == 0


@pytest.mark.parametrize("block", [16, 64, 4096])
def test_blocks_change_nothing_and_torch_fidelity_says_the_same(block, monkeypatch):
    prc = import_peer("torch_fidelity.metric_prc")
    monkeypatch.setattr(BLOCKS, "_BLOCK", block)
    x, y = rows(150, 6, seed=1), rows(130, 6, seed=1)[:, [1, 0, 2, 3, 4, 5]] * 1.3
    for k in (1, 3, 5):
        theirs = prc.prc_features_to_metric(x, y, prc_neighborhood=k, verbose=False)
        found = precision_recall(x, y, neighbours=k)
        assert found.precision == pytest.approx(theirs["precision"], abs=1e-7)  # theirs is a mean in float32
        assert found.recall == pytest.approx(theirs["recall"], abs=1e-7)
        assert 0 < found.precision < 1 and 0 < found.recall < 1


def test_more_neighbours_than_a_block_has_rows(monkeypatch):
    x, y = rows(30, 3, seed=1), rows(25, 3, seed=2)
    expected = precision_recall(x, y, neighbours=20)
    monkeypatch.setattr(BLOCKS, "_BLOCK", 4)
    assert precision_recall(x, y, neighbours=20) == expected


def test_precision_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"must be \[N, D\] and \[M, D\]"):
        precision_recall(rows(10, 3), rows(10, 2))
    for k in (0, 10):
        with pytest.raises(ValueError, match=f"neighbours .* of 10 and 20 rows, got {k}"):
            precision_recall(rows(10, 3), rows(20, 3), neighbours=k)


# class accuracy


def test_accuracy_counts():
    logits = torch.eye(3).repeat(2, 1)
    found = class_accuracy(logits, torch.tensor([0, 1, 2, 0, 0, 7]))
    assert (found.right, found.total, found.share) == (4, 6, pytest.approx(4 / 6))


def test_moments_of_nothing_change_nothing():
    found = Moments(3)
    found.update(torch.empty(0, 3))
    assert found.count == 0 and not found.m2.any()
