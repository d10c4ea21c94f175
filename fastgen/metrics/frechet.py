"""The Frechet distance between two Gaussians, which of features of Inception is the FID of Heusel et al. 2017.

    |m1 - m2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2))

Dowson and Landau 1982. The root of S1 S2, which is not symmetric, is never taken. With S1 = F1 F1^T and S2 = F2 F2^T its trace is
the sum of the singular values of F1^T F2, real whatever the ranks are. A root would turn a rounding error of 1e-16 in an
eigenvalue that is 0, and of fewer images than features many are, into 1e-8; here it stays what it is.
"""

import torch
from torch import Tensor

from .statistics import Gaussian, StatisticsError

_NEGATIVE = 1e-3  # of the largest eigenvalue: below minus that it is no rounding, the matrix is no covariance


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """The squared distance, at least 0, the same in both directions.

    Raises:
        StatisticsError: the two are of features of different numbers, or one has a covariance that is none.
    """
    if first.mean.shape != second.mean.shape:
        raise StatisticsError(
            f"statistics of {len(first.mean)} and {len(second.mean)} features cannot be compared: they are of different features"
        )
    between = first.mean - second.mean
    common = torch.linalg.svdvals(_factor(first.covariance).T @ _factor(second.covariance)).sum()
    spread = first.covariance.trace() + second.covariance.trace()
    return max(0.0, float(between @ between + spread - 2 * common))


def _factor(covariance: Tensor) -> Tensor:
    """F [D, R] with F F^T = ``covariance`` of rank R: eigenvectors times roots of the eigenvalues that are not 0."""
    values, vectors = torch.linalg.eigh(covariance)
    largest = values.abs().max()
    if values[0] < -_NEGATIVE * largest:
        raise StatisticsError(f"a covariance has no negative eigenvalues, this one has {values[0]:g}")
    kept = values > len(values) * torch.finfo(values.dtype).eps * largest  # less is rounding, as numpy counts ranks
    return vectors[:, kept] * values[kept].sqrt()
