"""Every autoregressive model in forms small enough for a test, with the image each is given."""

import torch

from fastgen.models import GatedPixelCNN, PixelCNN, PixelCNNPlusPlus, PixelSNAIL, WaveNet

from ..modules import randomize

GATED = {"channels": 6, "dilations": [1, 2], "levels": 5}
SMALL = {
    "pixel_cnn": (PixelCNN, {"channels": 8, "num_blocks": 2, "head_channels": 5, "levels": 5}, (1, 7, 6)),
    "pixel_cnn_plain": (
        PixelCNN,
        {"channels": 16, "num_blocks": 2, "block": "plain", "kernel_size": 7, "head_channels": None, "levels": 5},
        (1, 7, 6),
    ),
    "pixel_cnn_residual_two_channels": (
        PixelCNN,
        {"in_channels": 2, "channels": 6, "num_blocks": 2, "block": "residual", "levels": 4, "unit_range": True},
        (2, 7, 6),
    ),
    "gated": (GatedPixelCNN, GATED, (1, 7, 6)),
    "gated_two_channels": (GatedPixelCNN, {**GATED, "in_channels": 2, "input_kernel_size": 5}, (2, 7, 6)),
    "gated_factorized": (
        GatedPixelCNN,
        {**GATED, "factorized": True, "head_channels": 5, "input_kernel_size": 7, "unit_range": True},
        (1, 7, 6),
    ),
    "gated_bernoulli": (GatedPixelCNN, {**GATED, "distribution": "bernoulli", "levels": 2}, (1, 7, 6)),
    "plus_plus": (PixelCNNPlusPlus, {"in_channels": 1, "channels": 4, "num_resnet": 1, "mixtures": 2}, (1, 8, 8)),
    "plus_plus_rgb": (PixelCNNPlusPlus, {"channels": 4, "num_resnet": 1, "mixtures": 2, "levels": 16}, (3, 8, 4)),
    "snail": (
        PixelSNAIL,
        {"channels": 6, "num_blocks": 2, "num_residual": 1, "key_channels": 3, "value_channels": 5, "levels": 5},
        (1, 6, 5),
    ),
    "wavenet": (WaveNet, {"channels": 5, "skip_channels": 6, "dilations": [1, 2, 4], "levels": 5}, (1, 1, 14)),
}


def build(name, dtype=torch.float64, **options):
    cls, config, _ = SMALL[name]
    return randomize(cls(**{**config, **options})).to(dtype).eval()


def image(name, n=2, dtype=torch.float64, seed=0):
    """[n, C, H, W] of random levels."""
    _, config, shape = SMALL[name]
    levels = config.get("levels", 256)
    k = torch.randint(levels, (n, *shape), generator=torch.Generator().manual_seed(seed))
    return (2 * k / (levels - 1) - 1).to(dtype)
