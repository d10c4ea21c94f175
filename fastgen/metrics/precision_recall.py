"""Improved precision and recall of Kynkaanniemi et al. 2019: which share of each set lies on the manifold of the other.

A set's manifold is the union of balls around its points, each as large as the distance to the point's k-th nearest neighbour in the
set. Precision is the share of the images inside that of the reference, recall the share of the reference inside that of the images.

Distances come from products, |x|^2 + |y|^2 - 2 x.y in float64, a block at a time. As much as may be rounding of that is taken off,
down to 0: else equal points would be some 1e-8 of their length apart, and a point would miss a ball of radius 0 around its copy.
"""

from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

NEIGHBOURS = 3  # k of the paper

_BLOCK = 2048  # rows and columns: 32 MB of distances


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1]."""

    precision: float
    recall: float


def precision_recall(
    features: Tensor,
    reference: Tensor,
    *,
    neighbours: int = NEIGHBOURS,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> PrecisionRecall:
    """Precision and recall of ``features`` [N, D] against ``reference`` [M, D], in float64.

    Args:
        features: of the images.
        reference: of those they are compared with.
        neighbours: k, the neighbour that a ball reaches.
        device: where the distances are computed.
        progress: a bar on the terminal.

    Raises:
        ValueError: the sets do not fit each other, or one has not more than ``neighbours`` rows.
    """
    if features.dim() != 2 or reference.dim() != 2 or features.shape[1] != reference.shape[1]:
        raise ValueError(
            "precision_recall: features and reference must be [N, D] and [M, D], "
            f"got {list(features.shape)} and {list(reference.shape)}"
        )
    fewest = min(len(features), len(reference))
    if not 1 <= neighbours < fewest:
        raise ValueError(
            f"precision_recall: neighbours must be at least 1 and below the fewer of {len(features)} and {len(reference)} rows, "
            f"got {neighbours}"
        )
    # products of deviations are smaller than those of the features themselves, and so is their rounding
    mean = reference.double().mean(dim=0)
    x, y = (_Points(rows, mean, device) for rows in (features, reference))
    n, m = len(x.parts), len(y.parts)
    total = n * (n + 1) // 2 + m * (m + 1) // 2 + n * m
    with tqdm(total=total, desc="precision, recall", unit="block", delay=2, disable=None if progress else True) as bar:
        reach_x, reach_y = (_reach(points, neighbours, bar) for points in (x, y))
        inside_y = torch.zeros(len(x), dtype=torch.bool, device=device)
        inside_x = torch.zeros(len(y), dtype=torch.bool, device=device)
        for rows, columns in product(x.parts, y.parts):
            squares = _squares(x, rows, y, columns)
            inside_y[rows] |= (squares <= reach_y[columns]).any(dim=1)
            inside_x[columns] |= (squares <= reach_x[rows, None]).any(dim=0)
            bar.update()
    return PrecisionRecall(float(inside_y.double().mean()), float(inside_x.double().mean()))


class _Points:
    """Rows [N, D] as deviations from ``mean``, a part at a time in float64, and their squared lengths [N]."""

    def __init__(self, rows: Tensor, mean: Tensor, device: torch.device | str) -> None:
        self._rows, self._mean, self._device = rows, mean.to(device), device
        self.parts = [slice(start, min(start + _BLOCK, len(rows))) for start in range(0, len(rows), _BLOCK)]
        self.lengths = torch.cat([self[part].square().sum(dim=1) for part in self.parts])

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, part: slice) -> Tensor:
        return self._rows[part].to(self._device).double() - self._mean


def _squares(x: _Points, rows: slice, y: _Points, columns: slice) -> Tensor:
    """[n, m], the squared distances between ``rows`` of ``x`` and ``columns`` of ``y``."""
    part = x[rows]
    lengths = x.lengths[rows, None] + y.lengths[columns]
    rounding = part.shape[1] * torch.finfo(torch.float64).eps  # of a product, in parts of the lengths
    return torch.addmm(lengths, part, y[columns].T, beta=1 - rounding, alpha=-2).clamp_(min=0)


def _reach(points: _Points, neighbours: int, bar: tqdm) -> Tensor:
    """[N], the squared distance of each point to its k-th neighbour; the point itself is the nearest and is not counted.

    A block of distances serves its rows and, across, its columns.
    """
    nearest = points.lengths.new_full((len(points), neighbours + 1), torch.inf)
    for i, rows in enumerate(points.parts):
        for columns in points.parts[i:]:
            squares = _squares(points, rows, points, columns)
            for part, found in ((rows, squares), (columns, squares.T))[: 1 if rows == columns else 2]:
                best = found.topk(min(neighbours + 1, found.shape[1]), dim=1, largest=False).values
                both = torch.cat([nearest[part], best], dim=1)
                nearest[part] = both.topk(neighbours + 1, dim=1, largest=False).values
            bar.update()
    return nearest[:, -1]
