"""The recipes of flows: each a data set, images or a table, a model and the options that suit both."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..data import NUM_CLASSES, Table, load_digits, load_mnist, load_table
from ..models import MAF, FlowModel, Glow, MultiScaleRealNVP, NeuralSplineFlow
from ..training import FlowOptions
from ._autoregressive_recipes import DIGIT_LEVELS

MNIST_LEVELS = 256


class FlowData(NamedTuple):
    """What a flow is trained on: images [M, C, H, W] in [-1, 1] and labels [M], or rows [M, D] of a table."""

    data: Tensor
    labels: Tensor | None
    table: Table | None = None

    def first(self, count: int) -> "FlowData":
        return FlowData(self.data[:count], None if self.labels is None else self.labels[:count])

    @property
    def units(self) -> dict[str, Any]:
        """For the record: the columns of a table, and what was done to them."""
        if self.table is None:
            return {}
        table = self.table
        return {"columns": list(table.columns), "mean": table.mean.tolist(), "scale": table.scale.tolist()}

    def to(self, device: torch.device) -> "FlowData":
        return FlowData(self.data.to(device), None if self.labels is None else self.labels.to(device))


@dataclass(frozen=True)
class FlowRecipe:
    """What `fastgen train` begins with where its options say nothing else.

    Args:
        summary: one line of help.
        load: the data of a split; takes the folder that ``--data`` names, None where the recipe has its own.
        splits: trained on, and judged by.
        reads_folder: whether there is such an option.
        kind: what the examples are, in a word.
        model: the class.
        config: its arguments.
        steps: of the optimiser, whose rate falls to 0 at the last.
        options: all else.
        weights_dtype: of the file of weights.
    """

    summary: str
    load: Callable[[Path | None, str], FlowData]
    splits: tuple[str, str]
    reads_folder: bool
    kind: str
    model: type[FlowModel]
    config: Mapping[str, Any]
    steps: int
    options: FlowOptions
    weights_dtype: str = "float16"

    def examples_of(self, split: str, folder: Path | None) -> FlowData:
        """Of one split; labels where the model has classes."""
        found = self.load(folder, split)
        return found if self.config.get("num_classes") else found._replace(labels=None)


def _digits(folder: Path | None, split: str) -> FlowData:
    return FlowData(*load_digits(split))


def _mnist(folder: Path | None, split: str) -> FlowData:
    assert folder is not None  # the option is required
    return FlowData(*load_mnist(folder, split))


def _table(name: str) -> Callable[[Path | None, str], FlowData]:
    def load(folder: Path | None, split: str) -> FlowData:
        table = load_table(name, split)
        return FlowData(table.rows, None, table)

    return load


FLOW_RECIPES = {
    "digits-realnvp": FlowRecipe(
        summary="RealNVP of the 8 x 8 digits of scikit-learn; 17 grey levels",
        load=_digits,
        splits=("train", "held_out"),
        reads_folder=False,
        kind="images",
        model=MultiScaleRealNVP,
        config={
            "in_channels": 1,
            "image_size": 8,
            "num_scales": 2,
            "hidden_channels": 16,
            "num_blocks": 1,
            "alpha": 1e-3,
        },
        steps=1000,
        options=FlowOptions(batch_size=32, lr=2e-3, warmup=50, ema_decay=0.995, levels=DIGIT_LEVELS),
    ),
    "digits-glow": FlowRecipe(
        summary="Glow of the 8 x 8 digits of scikit-learn by class, 17 grey levels",
        load=_digits,
        splits=("train", "held_out"),
        reads_folder=False,
        kind="images",
        model=Glow,
        config={
            "in_channels": 1,
            "image_size": 8,
            "num_levels": 2,
            "num_steps": 8,
            "hidden_channels": 48,
            "alpha": 1e-2,
            "num_classes": NUM_CLASSES,
        },
        steps=1200,
        options=FlowOptions(batch_size=32, lr=4e-3, warmup=50, ema_decay=0.995, levels=DIGIT_LEVELS),
    ),
    "mnist-glow": FlowRecipe(
        summary="Glow of the 28 x 28 digits of MNIST by class, 256 grey levels",
        load=_mnist,
        splits=("train", "test"),
        reads_folder=True,
        kind="images",
        model=Glow,
        config={
            "in_channels": 1,
            "image_size": 28,
            "alpha": 1e-6,
            "num_levels": 2,
            "num_steps": 8,
            "hidden_channels": 64,
            "num_classes": NUM_CLASSES,
        },
        steps=15_000,
        options=FlowOptions(batch_size=32, lr=4e-3, warmup=100, levels=MNIST_LEVELS),
    ),
    "breast-cancer-maf": FlowRecipe(
        summary="masked autoregressive flow of the 30 measurements of scikit-learn's breast cancer table",
        load=_table("breast_cancer"),
        splits=("train", "held_out"),
        reads_folder=False,
        kind="rows",
        model=MAF,
        config={"features": 30, "num_transforms": 4, "hidden_features": 64, "num_blocks": 1, "scale_fn": "softplus"},
        steps=400,
        options=FlowOptions(batch_size=64, lr=2e-3, warmup=20, ema_decay=0.99, clip_norm=5.0),
        weights_dtype="float32",
    ),
    "diabetes-spline": FlowRecipe(
        summary="neural spline flow of 9 measurements of scikit-learn's diabetes table",
        load=_table("diabetes"),
        splits=("train", "held_out"),
        reads_folder=False,
        kind="rows",
        model=NeuralSplineFlow,
        config={"features": 9, "num_transforms": 3, "hidden_features": 32, "num_blocks": 1, "bound": 4.0},
        steps=300,
        options=FlowOptions(batch_size=64, lr=2e-3, warmup=20, ema_decay=0.99, clip_norm=5.0),
        weights_dtype="float32",
    ),
}
