"""Three tables of measurements that come inside scikit-learn, standardised and split once for each seed: data for densities.

diabetes: Efron, Hastie, Johnstone and Tibshirani, 2004; wine: Forina et al., 1991; breast cancer: Street, Wolberg and Mangasarian,
1993.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .digits import SPLITS

TABLES = ("diabetes", "wine", "breast_cancer")
HELD_OUT_SHARE = 5  # one row of so many
# A column of a few values, a sex say, has no density: a model would put ever narrower peaks on them and gain without end.
FEWEST_VALUES = 20


class Table(NamedTuple):
    """``rows`` [N, D] float32 and what each of the D columns is: in the table's units it is ``rows * scale + mean``.

    ``mean`` and ``scale`` are float64 [D], of the training rows of the same split.
    """

    rows: Tensor
    columns: tuple[str, ...]
    mean: Tensor
    scale: Tensor

    def in_units(self, rows: Tensor) -> Tensor:
        """``rows`` [*, D], standardised, in the units of the table, float64."""
        return rows.double() * self.scale + self.mean


def load_table(name: str, split: str = "train", seed: int = 0) -> Table:
    """The rows of one split, each column of mean 0 and deviation 1 over the training rows.

    Columns of fewer than :data:`FEWEST_VALUES` values over the training rows, constant ones among them, are dropped.

    Args:
        name: one of :data:`TABLES`.
        split: ``"train"``, or ``"held_out"``, a fifth of the rows.
        seed: of the choice of the rows that are held out, the same ones on every machine.

    Raises:
        ValueError: there is no such table or split.
        ModuleNotFoundError: scikit-learn is not installed; the message says how to install it.
    """
    if name not in TABLES:
        raise ValueError(f"load_table: name must be one of {TABLES}, got {name!r}")
    if split not in SPLITS:
        raise ValueError(f"load_table: split must be one of {SPLITS}, got {split!r}")
    try:
        from sklearn import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the tables come from scikit-learn, which is not installed: pip install scikit-learn", name=error.name
        ) from error
    bunch = getattr(datasets, f"load_{name}")()
    values = torch.from_numpy(bunch.data).double()  # [N, D]
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))
    held_out, train = order.tensor_split([len(values) // HELD_OUT_SHARE])
    kept = [i for i in range(values.shape[1]) if len(values[train, i].unique()) >= FEWEST_VALUES]
    values = values[:, kept]
    scale, mean = torch.std_mean(values[train], dim=0)
    chosen = (held_out if split == "held_out" else train).sort().values
    columns = tuple(str(bunch.feature_names[i]) for i in kept)
    return Table(((values[chosen] - mean) / scale).float(), columns, mean, scale)
