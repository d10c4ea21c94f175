"""The recipes of autoregressive models: each a data set, a model and the options that suit both."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data import NUM_CLASSES, Digits, load_digits, load_mnist
from ..models import AutoregressiveModel, GatedPixelCNN, PixelCNNPlusPlus
from ..training import AutoregressiveOptions

DIGIT_LEVELS = 17  # a pixel of the 8 x 8 digits counts the set pixels of a block of 4 x 4: 0 to 16


@dataclass(frozen=True)
class AutoregressiveRecipe:
    """What `fastgen train` begins with where its options say nothing else.

    Args:
        summary: one line of help.
        load: the images of a split; takes the folder that ``--data`` names, None where the recipe has its own.
        splits: trained on, and judged by.
        reads_folder: whether there is such an option.
        model: the class.
        config: its arguments, ``channels`` among them.
        steps: of the optimiser, whose rate falls to 0 at the last.
        options: all else.
    """

    summary: str
    load: Callable[[Path | None, str], Digits]
    splits: tuple[str, str]
    reads_folder: bool
    model: type[AutoregressiveModel]
    config: Mapping[str, Any]
    steps: int
    options: AutoregressiveOptions


def _mnist(folder: Path | None, split: str) -> Digits:
    assert folder is not None  # the option is required
    return load_mnist(folder, split)


AUTOREGRESSIVE_RECIPES = {
    "digits-pixelcnn": AutoregressiveRecipe(
        summary="Gated PixelCNN of the 8 x 8 digits of scikit-learn by class, 17 grey levels",
        load=lambda folder, split: load_digits(split),
        splits=("train", "held_out"),
        reads_folder=False,
        model=GatedPixelCNN,
        config={"channels": 24, "dilations": [1, 2, 1, 2, 1], "levels": DIGIT_LEVELS, "num_classes": NUM_CLASSES},
        steps=1000,
        options=AutoregressiveOptions(batch_size=16, lr=3e-3, warmup=50, ema_decay=0.995),
    ),
    "digits-pixelcnn++": AutoregressiveRecipe(
        summary="PixelCNN++ of the 8 x 8 digits of scikit-learn by class, 17 grey levels",
        load=lambda folder, split: load_digits(split),
        splits=("train", "held_out"),
        reads_folder=False,
        model=PixelCNNPlusPlus,
        config={
            "in_channels": 1,
            "channels": 14,
            "num_resnet": 1,
            "mixtures": 5,
            "levels": DIGIT_LEVELS,
            "dropout": 0.2,
            "num_classes": NUM_CLASSES,
        },
        steps=800,
        options=AutoregressiveOptions(batch_size=16, lr=3e-3, warmup=50, ema_decay=0.995),
    ),
    "mnist-pixelcnn": AutoregressiveRecipe(
        summary="Gated PixelCNN of the 28 x 28 digits of MNIST by class, 256 grey levels",
        load=_mnist,
        splits=("train", "test"),
        reads_folder=True,
        model=GatedPixelCNN,
        config={"channels": 32, "dilations": [1, 2, 1, 4, 1, 2, 1], "levels": 256, "num_classes": NUM_CLASSES},
        steps=15_000,
        options=AutoregressiveOptions(batch_size=16, lr=3e-3, warmup=100),
    ),
}
