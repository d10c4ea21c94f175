"""Small trainings in float64 for several ranks, which `rank_worker` runs and `test_ranks` compares with those of one process."""

from typing import Any

import torch

from fastgen.models import MAF, GatedPixelCNN, Glow, PixelCNN, PixelCNNPlusPlus, PixelSNAIL, RealNVP, TarFlow
from fastgen.training import (
    AutoregressiveOptions,
    AutoregressiveTrainer,
    Callback,
    FlowOptions,
    FlowTrainer,
    Trainer,
    TrainingOptions,
    begin_with_statistics,
)

from .tiny import data, make_model

LEVELS = 5
BATCH = 7  # which neither two nor four ranks divide
OPTIONS: dict[str, Any] = {"batch_size": BATCH, "lr": 1e-2, "warmup": 2}
STEPS = 6


def images(dtype=torch.float64, m=20):
    """The blobs of :func:`data` in five levels, and their labels."""
    blobs, labels = data(m)
    return (((blobs.clamp(-1, 1) + 1) * 2).round() / 2 - 1).to(dtype), labels


def diffusion(spread=None, dtype=torch.float64, model=None, **options):
    x, labels = data()
    if model is None:
        model = unet(dtype)
    return Trainer(model, TrainingOptions(**{**OPTIONS, **options}), x.to(dtype), labels, spread=spread)


def unet(dtype=torch.float64, dropout=0.0):
    return make_model(dtype, dropout=dropout, channel_mult=[1, 2], attention_resolutions=[2])


def autoregressive(model, spread=None, dtype=torch.float64):
    x, labels = images(dtype)
    return AutoregressiveTrainer(model.to(dtype), AutoregressiveOptions(**OPTIONS), x, labels, spread=spread)


def gated(spread=None, dtype=torch.float64):
    torch.manual_seed(0)
    model = GatedPixelCNN(1, 6, dilations=[1, 2], levels=LEVELS, num_classes=3)
    return autoregressive(model, spread, dtype)


def factorized(spread=None):
    """No loss depends on the vertical stack of its last layer."""
    torch.manual_seed(0)
    config = {"dilations": [1, 1], "factorized": True, "head_channels": 4, "levels": LEVELS, "num_classes": 3}
    return autoregressive(GatedPixelCNN(1, 6, **config), spread)


def pixel_cnn(spread=None, dtype=torch.float64):
    torch.manual_seed(0)
    return autoregressive(PixelCNN(1, 16, num_classes=3, levels=LEVELS), spread, dtype)


def pixel_snail(spread=None):
    torch.manual_seed(0)
    return autoregressive(PixelSNAIL(1, 8, num_blocks=2, num_residual=1, num_classes=3, levels=LEVELS), spread)


def mixture(spread=None, dropout=0.0):
    torch.manual_seed(0)
    config = {"num_resnet": 1, "mixtures": 2, "levels": LEVELS, "num_classes": 3, "dropout": dropout}
    return autoregressive(PixelCNNPlusPlus(1, 4, **config), spread)


def glow(spread=None):
    torch.manual_seed(0)
    model = Glow(1, 8, num_levels=2, num_steps=2, hidden_channels=6, num_classes=3, reversible=True)
    x, labels = images()
    model.double()
    with torch.random.fork_rng():
        statistics(model, x, labels)
    return FlowTrainer(model, FlowOptions(levels=LEVELS, **OPTIONS), x, labels, spread=spread)


def statistics(model, x, labels=None):
    """Of one rank's own, as before there is a process group."""
    distributed, torch.distributed.is_initialized = torch.distributed.is_initialized, lambda: False
    try:
        begin_with_statistics(model, x, labels, levels=LEVELS if x.dim() == 4 else None)
    finally:
        torch.distributed.is_initialized = distributed


def tar_flow(spread=None):
    torch.manual_seed(0)
    model = TarFlow(1, 8, 2, 8, num_blocks=2, layers_per_block=1, head_channels=4, num_classes=3).double()
    x, labels = images()
    return FlowTrainer(model, FlowOptions(levels=LEVELS, **OPTIONS), x, labels, spread=spread)


def rows_of(model, spread):
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model.double()
    statistics(model, x)
    return FlowTrainer(model, FlowOptions(**OPTIONS), x, spread=spread)


def real_nvp(spread=None):
    torch.manual_seed(0)
    return rows_of(RealNVP(4, num_couplings=3, hidden_features=12, num_blocks=1), spread)


def maf(spread=None):
    torch.manual_seed(0)
    return rows_of(MAF(4, num_transforms=2, hidden_features=8, num_blocks=1), spread)


CASES = {
    make.__name__: make
    for make in (diffusion, gated, factorized, pixel_cnn, pixel_snail, mixture, glow, tar_flow, real_nvp, maf)
}


class Losses(Callback):
    def __init__(self):
        self.seen = []

    def on_step(self, trainer, loss):
        self.seen.append(loss)


def losses(trainer, steps=STEPS):
    """Of a run up to ``steps``."""
    seen = Losses()
    trainer.fit(steps, [seen])
    return seen.seen
