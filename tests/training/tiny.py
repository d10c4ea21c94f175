"""A trainer small enough to do a hundred steps in a second: blobs of 8 x 8, three classes, a U-Net of a few thousand weights."""

import torch

from fastgen.models import UNet
from fastgen.training import Trainer, TrainingOptions

CONFIG = {
    "in_channels": 1,
    "model_channels": 8,
    "channel_mult": [1, 1],
    "num_res_blocks": 1,
    "attention_resolutions": [],
    "num_classes": 3,
    "null_class": True,
    "num_groups": 4,
    "dropout": 0.1,
}


def data(m=20):
    """(images [M, 1, 8, 8] in [-1, 1], labels [M])."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(m) % 3
    images = torch.rand(m, 1, 8, 8, generator=generator) * 0.4 - 1
    for image, label in zip(images, labels, strict=True):
        image[0, 2 * label : 2 * label + 3, 2:6] += 1.5
    return images, labels


def make_model(dtype=torch.float32, **config):
    torch.manual_seed(0)
    return UNet.from_config({**CONFIG, **config}).to(dtype)


def make_trainer(config=None, dtype=torch.float32, **options):
    images, labels = data()
    model = make_model(dtype, **(config or {}))
    return Trainer(model, TrainingOptions(**{"batch_size": 4, **options}), images.to(dtype), labels)


def state(trainer):
    """Everything a checkpoint holds, copied."""
    return {name: tensor.clone() for name, tensor in trainer._state()}
