"""Fills the table of docs/autoregressive.md: bits a dimension of held-out 8 x 8 digits, our models and the ports they stand for.

    python docs/make_likelihood_table.py [--steps N] [--seeds N]

Each pair is trained by the same trainer with the same options, seeds and batches, without classes; the ports are the structures of
tests/models, which compute what the ports do. Takes twenty minutes; with other steps or seeds the table is printed, not written.
"""

import argparse
import math
from collections.abc import Callable
from typing import Any

import torch
from _pages import replace_part, table
from torch import Tensor, nn
from tqdm import tqdm

from fastgen.cli._autoregressive_recipes import DIGIT_LEVELS
from fastgen.data import load_digits
from fastgen.models import AutoregressiveModel, GatedPixelCNN, PixelCNNPlusPlus
from fastgen.training import AutoregressiveOptions, AutoregressiveTrainer, begin_with_frequencies, mean_bits_per_dim
from tests.models import foreign_pixel_cnn_pp, foreign_uva_tutorial

SEEDS, STEPS = 3, 1000
OPTIONS: dict[str, Any] = {"batch_size": 16, "lr": 3e-3, "warmup": 50, "ema_decay": 0.995}
CHANNELS, DILATIONS = 24, (1, 2, 1, 2, 1)
MIXTURES, WIDTH, BLOCKS = 5, 14, 1


class Port(AutoregressiveModel):
    """A port's own module under our contract: the same loss of the logits that it gives."""

    def __init__(self, network: nn.Module, distribution: str, logits: Callable[[nn.Module, Tensor], Tensor]) -> None:
        config = {"in_channels": 1, "levels": DIGIT_LEVELS, "num_classes": None, "condition_channels": None}
        super().__init__(config, distribution)
        self.network, self.logits = network, logits
        with torch.no_grad():
            self(torch.zeros(1, 1, 8, 8))  # a weight that weight_norm made without gradients can be copied

    def forward(self, x: Tensor, condition: Any = None) -> Tensor:
        return self.logits(self.network, x)


class Tutorial(Port):
    """The UvA course's, which takes levels."""

    def __init__(self) -> None:
        network = foreign_uva_tutorial.PixelCNN(1, CHANNELS, DILATIONS, DIGIT_LEVELS)
        super().__init__(network, "categorical", lambda port, x: port(self.indices(x)))

    def get_parameter(self, target: str) -> nn.Parameter:
        return super().get_parameter("network.conv_out.bias" if target == "out.bias" else target)


class PixelCNNpp(Port):
    """pixel-cnn-pp's."""

    def __init__(self) -> None:
        network = foreign_pixel_cnn_pp.PixelCNN(BLOCKS, WIDTH, MIXTURES, 1)
        super().__init__(network, "logistic_mixture", lambda port, x: port(x))


PAIRS: dict[str, dict[str, Callable[[], AutoregressiveModel]]] = {
    "Gated PixelCNN, 5 layers of 24 channels": {
        "ours": lambda: GatedPixelCNN(channels=CHANNELS, dilations=DILATIONS, levels=DIGIT_LEVELS),
        "port": Tutorial,
    },
    "PixelCNN++, 14 channels, 5 mixtures": {
        "ours": lambda: PixelCNNPlusPlus(
            1, channels=WIDTH, num_resnet=BLOCKS, mixtures=MIXTURES, levels=DIGIT_LEVELS, dropout=0.0
        ),
        "port": PixelCNNpp,
    },
}


def trained(make: Callable[[], AutoregressiveModel], seed: int, steps: int) -> float:
    """Bits a dimension of the held-out digits, by the moving average."""
    torch.manual_seed(seed)
    model, images = make(), load_digits("train").images
    if model.distribution == "categorical":
        begin_with_frequencies(model, images)
    trainer = AutoregressiveTrainer(model, AutoregressiveOptions(seed=seed, lr_decay_steps=steps, **OPTIONS), images)
    trainer.fit(steps)
    return mean_bits_per_dim(trainer.ema.model, load_digits("held_out").images)


def trivial() -> dict[str, float]:
    """Bits a dimension by what needs no network; each level counted once more than it is there."""
    levels = {split: ((load_digits(split).images + 1) * 8).round().long() for split in ("train", "held_out")}
    counts = torch.stack([(levels["train"] == k).sum((0, 1)) for k in range(DIGIT_LEVELS)]).double() + 1
    shares = (counts / counts.sum(0)).log2()  # [levels, 8, 8]
    return {
        f"{DIGIT_LEVELS} levels alike": math.log2(DIGIT_LEVELS),
        "the frequencies at each pixel": float(-shares.gather(0, levels["held_out"][:, 0]).mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    args = parser.parse_args()
    rows = [[name, f"{bits:.3f}", ""] for name, bits in trivial().items()]
    bar = tqdm(total=2 * len(PAIRS) * args.seeds, unit="training")
    for pair, makers in PAIRS.items():
        cells = []
        for make in makers.values():
            found = []
            for seed in range(args.seeds):
                found.append(trained(make, seed, args.steps))
                bar.update()
            cells.append(f"{sum(found) / len(found):.3f} ({', '.join(f'{bits:.3f}' for bits in found)})")
        rows.append([pair, *cells])
    text = table(["held-out digits, bits a dimension, without classes", "ours", "the port"], rows)
    if (args.steps, args.seeds) == (STEPS, SEEDS):
        replace_part("autoregressive.md", "likelihood", text)
    else:
        print(text)


if __name__ == "__main__":
    main()
