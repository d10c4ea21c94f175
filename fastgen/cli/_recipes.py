"""The recipes of diffusion models, by which `fastgen train` begins: each a data set, a model and the options that suit both."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data import IMAGE_SHAPE, NUM_CLASSES, Digits, load_digits, load_mnist
from ..training import TrainingOptions


@dataclass(frozen=True)
class Recipe:
    """What `fastgen train` begins with where its options say nothing else.

    Args:
        summary: one line of help.
        load: the training images; takes the folder that ``--data`` names, None where the recipe has its own.
        reads_folder: whether there is such an option.
        unet: arguments of :class:`fastgen.models.UNet`, all but ``model_channels`` and ``dropout``.
        model_channels: width of the first level.
        steps: of the optimiser.
        options: all else; ``lr_decay_steps`` follows from ``lr_decay``.
        lr_decay: ``"cosine"``, to 0 at the last step, or ``"none"``.
        weights_dtype: of the file of weights.
    """

    summary: str
    load: Callable[[Path | None], Digits]
    reads_folder: bool
    unet: Mapping[str, Any]
    model_channels: int
    steps: int
    options: TrainingOptions
    lr_decay: str = "none"
    weights_dtype: str = "float32"


def _mnist(folder: Path | None) -> Digits:
    assert folder is not None  # the option is required
    return load_mnist(folder)


RECIPES = {
    "digits-ddpm": Recipe(
        summary="the 8 x 8 digits of scikit-learn by class, in minutes on two cores",
        load=lambda folder: load_digits(),
        reads_folder=False,
        unet={
            "in_channels": IMAGE_SHAPE[0],
            "channel_mult": [1, 1],
            "num_res_blocks": 1,
            "attention_resolutions": [2],
            "num_head_channels": 16,
            "num_classes": NUM_CLASSES,
            "null_class": True,
            "use_scale_shift_norm": True,
            "num_groups": 8,
        },
        model_channels=48,
        steps=4000,
        options=TrainingOptions(),
    ),
    "mnist-ddpm": Recipe(
        summary="the 28 x 28 digits of MNIST by class, in an hour on two cores",
        load=_mnist,
        reads_folder=True,
        unet={
            "in_channels": 1,
            "channel_mult": [1, 2, 2],
            "num_res_blocks": 1,
            "attention_resolutions": [4],
            "num_head_channels": 32,
            "num_classes": NUM_CLASSES,
            "null_class": True,
            "use_scale_shift_norm": True,
            "num_groups": 16,
        },
        model_channels=32,
        steps=6000,
        options=TrainingOptions(batch_size=32, warmup=100, ema_decay=0.998, prediction_type="v_prediction"),
        lr_decay="cosine",
        weights_dtype="float16",
    ),
}
