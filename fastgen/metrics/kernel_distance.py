"""The kernel distance, which of features of Inception is the KID of Binkowski et al. 2018.

The squared maximum mean discrepancy of Gretton et al. 2012 with the kernel k(x, y) = (x.y / d + 1)^3, unbiased, so that it may
come out below 0 where the two sets hardly differ:

    mean of k(x, x') over x != x'  +  mean of k(y, y') over y != y'  -  2 mean of k(x, y)

over subsets of the images, drawn anew many times; the mean over the draws and its deviation are the result.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

SUBSETS = 100
SUBSET_SIZE = 1000
SEED = 2020  # these three as torch-fidelity has them, and the draws too


class KernelDistance(NamedTuple):
    """Mean and standard deviation over the subsets."""

    mean: float
    deviation: float


def kernel_distance(
    features: Tensor,
    reference: Tensor,
    *,
    subsets: int = SUBSETS,
    subset_size: int = SUBSET_SIZE,
    seed: int = SEED,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> KernelDistance:
    """The distance between ``features`` [N, D] and ``reference`` [M, D], in float64.

    Args:
        features: of the images.
        reference: of those they are compared with.
        subsets: how many pairs of subsets are drawn.
        subset_size: rows of each, drawn without replacement.
        seed: of the draws, by the generator of NumPy whose numbers stay what they are over its versions (MT19937).
        device: where the products are made.
        progress: a bar on the terminal.

    Raises:
        ValueError: the sets do not fit each other, or are too small for the subsets.
    """
    if features.dim() != 2 or reference.dim() != 2 or features.shape[1] != reference.shape[1]:
        raise ValueError(
            "kernel_distance: features and reference must be [N, D] and [M, D], "
            f"got {list(features.shape)} and {list(reference.shape)}"
        )
    if not 2 <= subset_size <= min(len(features), len(reference)):
        raise ValueError(
            f"kernel_distance: subset_size must be at least 2 and at most the fewer of {len(features)} and {len(reference)} rows, "
            f"got {subset_size}"
        )
    if subsets < 1:
        raise ValueError(f"kernel_distance: subsets must be at least 1, got {subsets}")
    draws = np.random.RandomState(seed)
    rounds: Iterable[int] = tqdm(range(subsets), desc="KID", unit="subset", delay=2, disable=None if progress else True)
    found = [
        _discrepancy(*(_drawn(draws, rows, subset_size).to(device).double() for rows in (features, reference)))
        for _ in rounds
    ]
    distances = torch.stack(found).cpu()
    return KernelDistance(float(distances.mean()), float(distances.std(correction=0)))


def _drawn(draws: np.random.RandomState, rows: Tensor, n: int) -> Tensor:
    return rows[torch.from_numpy(draws.choice(len(rows), n, replace=False))]


def _discrepancy(x: Tensor, y: Tensor) -> Tensor:
    m = len(x)
    pairs = m * (m - 1)
    within = sum((k.sum() - k.trace()) / pairs for k in (_kernel(x, x), _kernel(y, y)))
    return within - 2 * _kernel(x, y).mean()


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    """[m, m], the kernel between all rows of ``x`` and all of ``y`` [m, D]."""
    return torch.addmm(x.new_ones(1), x, y.T, alpha=1 / x.shape[1]).pow_(3)
