"""Mean and covariance of features: gathered a batch at a time, merged in any order, read and written as the ADM evaluator does.

Chan, Golub and LeVeque, Updating formulae and a pairwise algorithm for computing sample variances, 1979. Everything is float64, and
deviations are taken from the mean before they are squared, so that a large mean costs no digits.
"""

import os
import zipfile
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._files import write_atomically

_DAMAGE = (ValueError, EOFError, zipfile.BadZipFile, zlib.error, KeyError)
_SLIGHTLY = 1e-3  # of the largest variance: what rounding of a published covariance may make of a variance of 0


class StatisticsError(ValueError):
    """Statistics cannot be used; the message says which and why."""


class Moments:
    """Count, mean and sum of squared deviations of the rows seen so far.

    Attributes:
        count: n.
        mean: [D] float64.
        m2: [D, D] float64, the sum of (x - mean)(x - mean)^T.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self.m2 = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def update(self, rows: Tensor) -> None:
        """Take in ``rows`` [n, D], one product of matrices.

        Their deviations from their own mean, and one row more for what lies between that mean and the mean so far: with n rows
        taken and m to come it weighs n m / (n + m).
        """
        m = len(rows)
        if not m:
            return
        rows = rows.double()
        mean = rows.mean(dim=0)
        deviations = torch.cat([rows - mean, self._between(mean, m)[None]])
        self.m2.addmm_(deviations.T, deviations)
        self._move(mean, m)

    def merge(self, other: "Moments") -> None:
        """Take in the rows that ``other`` has seen."""
        if not other.count:
            return
        between = self._between(other.mean, other.count)
        self.m2.add_(other.m2).addr_(between, between)
        self._move(other.mean, other.count)

    def gaussian(self) -> "Gaussian":
        """Mean and covariance, the latter with n - 1 below, as np.cov, torch-fidelity and ADM have it.

        Raises:
            StatisticsError: fewer than 2 rows have been seen, or some that are not finite.
        """
        if self.count < 2:
            raise StatisticsError(f"a covariance needs at least 2 images, got {self.count}")
        covariance = self.m2 / (self.count - 1)
        if not covariance.isfinite().all():
            raise StatisticsError("the features are not finite")
        return Gaussian(self.mean.cpu(), ((covariance + covariance.T) / 2).cpu(), self.count)

    def _between(self, mean: Tensor, m: int) -> Tensor:
        return (mean - self.mean) * (self.count * m / (self.count + m)) ** 0.5

    def _move(self, mean: Tensor, m: int) -> None:
        self.count += m
        self.mean += (mean - self.mean) * (m / self.count)


@dataclass(frozen=True)
class Gaussian:
    """What the Frechet distance knows of a set of images.

    Attributes:
        mean: [D] float64, ``mu`` of the file.
        covariance: [D, D] float64, ``sigma``.
        count: of the images, ``count`` of the file; None where it does not say.
        features: what the statistics are of, ``features`` of the file; None where it does not say.
        spatial: ``mu_s`` and ``sigma_s``, which ADM's files have besides, of features that lie elsewhere in the network. No metric
            here reads them; they are kept, so that a file that is read and written loses nothing.
    """

    mean: Tensor
    covariance: Tensor
    count: int | None = None
    features: str | None = None
    spatial: tuple[Tensor, Tensor] | None = None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an npz of ADM's keys ``mu`` and ``sigma``, with ``count`` and ``features`` beside them, atomically."""
        arrays: dict[str, Any] = {"mu": self.mean.numpy(), "sigma": self.covariance.numpy()}
        if self.spatial is not None:
            arrays["mu_s"], arrays["sigma_s"] = (part.numpy() for part in self.spatial)
        if self.count is not None:
            arrays["count"] = np.array(self.count)
        if self.features is not None:
            arrays["features"] = np.array(self.features)
        write_atomically(path, partial(_save, arrays=arrays), durable=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Gaussian":
        """Read what :meth:`save` wrote, or a file of ADM's.

        Raises:
            FileNotFoundError: there is no such file.
            StatisticsError: it is no npz, is cut off, or does not hold a mean and a covariance that fits it.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                if not isinstance(file, np.lib.npyio.NpzFile):
                    raise ValueError("it is no npz file")
                found = {
                    name: file[name] for name in ("mu", "sigma", "mu_s", "sigma_s", "count", "features") if name in file
                }
        except _DAMAGE as error:
            raise StatisticsError(f"{path}: cannot be read, it is no npz file, damaged or cut off: {error}") from error
        mean, covariance = _pair(path, found, "mu", "sigma")
        spatial = _pair(path, found, "mu_s", "sigma_s") if {"mu_s", "sigma_s"} <= found.keys() else None
        count, features = found.get("count"), found.get("features")
        return cls(
            mean,
            covariance,
            None if count is None else int(count),
            None if features is None else str(features),
            spatial,
        )


def holds_statistics(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` is an npz that has ``mu`` and ``sigma`` in it."""
    path = Path(path)
    if not path.is_file() or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return {"mu.npy", "sigma.npy"} <= set(archive.namelist())


def _save(path: Path, arrays: dict[str, Any]) -> None:
    np.savez(path, allow_pickle=False, **arrays)


def _pair(path: str | os.PathLike[str], found: dict[str, np.ndarray], mu: str, sigma: str) -> tuple[Tensor, Tensor]:
    """A mean [D] and a covariance [D, D] that is one, in float64."""
    for name in (mu, sigma):
        if name not in found:
            raise StatisticsError(f"{path}: holds no statistics: no {name!r}")
        if not np.issubdtype(found[name].dtype, np.floating):
            raise StatisticsError(f"{path}: {name!r} must be of floating-point numbers, got {found[name].dtype}")
    mean, covariance = (torch.from_numpy(found[name].astype(np.float64)) for name in (mu, sigma))
    if mean.dim() != 1 or covariance.shape != (len(mean), len(mean)):
        raise StatisticsError(
            f"{path}: {mu!r} and {sigma!r} must be [D] and [D, D], got {list(mean.shape)} and {list(covariance.shape)}"
        )
    if not (mean.isfinite().all() and covariance.isfinite().all()):
        raise StatisticsError(f"{path}: {mu!r} or {sigma!r} has values that are not finite")
    largest = covariance.abs().max() if len(mean) else 0.0
    if (covariance - covariance.T).abs().max() > _SLIGHTLY * largest:
        raise StatisticsError(f"{path}: {sigma!r} must be symmetric")
    return mean, (covariance + covariance.T) / 2
