"""`AutoregressiveModel`: what every model of p(x) = prod_i p(x_i | x_<i) here promises to samplers and trainers, and its files.

The order is raster order, row by row; all channels of a pixel are drawn together, from logits that see the pixels before it alone.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import logistic_mixture
from ._configured import Configured, check_positive

Condition = Tensor | tuple[Tensor, Tensor]


class AutoregressiveModel(Configured):
    """The contract: ``model(x, condition=None)`` -> logits, of which those of a pixel depend on no pixel from it on.

    ``x`` is float [N, C, H, W] in [-1, 1]: level k of K is ``2 k / (K - 1) - 1``. ``condition`` is [N] integers below
    ``num_classes``, or a map [N, condition_channels, H, W], or the pair (integers, map) of a model with both; None for a model with
    neither. Nothing in ``forward`` depends on the values of ``x``, so that ``make_fx`` traces it.

    ======================  ====================================  ==========================================================
    ``distribution``        logits                                of a pixel
    ======================  ====================================  ==========================================================
    ``"categorical"``       [N, K, C, H, W]                       softmax over the K ``levels``, channel by channel
    ``"bernoulli"``         [N, C, H, W]                          sigmoid: the probability of the upper of two levels
    ``"logistic_mixture"``  [N, 3 M, H, W] or [N, 10 M, H, W]     M discretised logistics, of 1 or 3 channels
                                                                  (Salimans et al. 2017)
    ======================  ====================================  ==========================================================

    Args:
        config: the arguments of the class's constructor, ready for JSON; those above among them.
        distribution: one of the three.

    State dicts of the public ports that a class names load as they are: their keys are translated, masks and buffers dropped.
    """

    def __init__(self, config: Mapping[str, Any], distribution: str) -> None:
        _check_config(type(self).__name__, config, distribution)
        super().__init__(config)
        self.distribution = distribution
        self.in_channels: int = config["in_channels"]
        self.levels: int = config["levels"]
        self.num_classes: int | None = config["num_classes"]
        self.condition_channels: int | None = config["condition_channels"]

    def log_prob(self, x: Tensor, condition: Condition | None = None) -> Tensor:
        """log p(x | condition) in nats, [N]: the sum over all pixels and channels."""
        logits = self(x, condition)
        if self.distribution == "logistic_mixture":
            return -logistic_mixture(logits, x, levels=self.levels)
        if self.distribution == "bernoulli":
            nats = F.binary_cross_entropy_with_logits(logits, (x > 0).to(logits.dtype), reduction="none")
        else:
            by_level = logits.movedim(1, -1)  # channels-last logits lie so, and need no copy
            nats = F.cross_entropy(by_level.flatten(0, -2), self.indices(x).flatten(), reduction="none").view(x.shape)
        return -nats.flatten(1).sum(1)

    def bits_per_dim(self, x: Tensor, condition: Condition | None = None) -> Tensor:
        """-log2 p(x | condition) / (C H W), [N]."""
        return self.log_prob(x, condition) / (-math.log(2) * math.prod(x.shape[1:]))

    def indices(self, x: Tensor) -> Tensor:
        """The levels 0 to K - 1 of an image in [-1, 1], int64."""
        return ((x + 1) * ((self.levels - 1) / 2)).round().long()

    def adopted(self, name: str, ours: str, tensor: Tensor, shape: torch.Size | None) -> Tensor:
        """Kernels without what is masked, 1x1 kernels as such."""
        return _fitted(tensor, shape)

    def _check_input(self, x: Tensor, condition: Condition | None) -> None:
        """Raise ValueError where ``x`` or ``condition`` is not what the model takes."""
        name, n = type(self).__name__, len(x)
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"{name}: x must be [N, {self.in_channels}, H, W], got shape {tuple(x.shape)}")
        labels, area = split_condition(condition)
        if (labels is None) != (self.num_classes is None) or (area is None) != (self.condition_channels is None):
            parts = [f"[N] integers below {self.num_classes}"] if self.num_classes else []
            parts += [f"a map [N, {self.condition_channels}, H, W]"] if self.condition_channels else []
            wanted = " and ".join(parts) or "None (num_classes=None, condition_channels=None)"
            raise ValueError(f"{name}: condition must be {wanted}, got {_described(condition)}")
        if labels is not None and labels.shape != (n,):
            raise ValueError(f"{name}: labels in condition must be [N] = [{n}], got shape {tuple(labels.shape)}")
        expected = (n, self.condition_channels, *x.shape[2:])
        if area is not None and tuple(area.shape) != expected:
            raise ValueError(f"{name}: the map in condition must be {list(expected)}, got shape {tuple(area.shape)}")

    def _scaled(self, x: Tensor) -> Tensor:
        """What the network sees of ``x``."""
        return (x + 1) / 2 if self._config["unit_range"] else x

    def _logits(self, out: Tensor) -> Tensor:
        """Logits as the contract has them, of the channels that the last convolution gives."""
        return out if self.distribution == "bernoulli" else out.unflatten(1, (self.levels, self.in_channels))

    @property
    def _outputs(self) -> int:
        return self.in_channels * (1 if self.distribution == "bernoulli" else self.levels)


class Conditioning(nn.Module):
    """What a layer adds for the condition: a row of a table for the label, and a 1x1 convolution of the map.

    [N, C, 1, 1] or [N, C, H, W]; None where there is no condition. Both begin at 0, as a model without one.
    """

    def __init__(self, channels: int, num_classes: int | None, condition_channels: int | None) -> None:
        super().__init__()
        self.embedding = None if num_classes is None else nn.Embedding(num_classes, channels)
        self.conv = None if condition_channels is None else nn.Conv2d(condition_channels, channels, 1, bias=False)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, condition: Condition | None) -> Tensor | None:
        labels, area = split_condition(condition)
        row = None if self.embedding is None else self.embedding(labels)[:, :, None, None]
        if self.conv is None:
            return row
        return self.conv(area) if row is None else row + self.conv(area)


def added(x: Tensor, condition: Tensor | None) -> Tensor:
    """x + condition, where there is one."""
    return x if condition is None else x + condition


def channels_innermost(x: Tensor) -> Tensor:
    """``x``, channels-last on a CPU, whose kernels of small images read and write it so without turning it over."""
    return x.contiguous(memory_format=torch.channels_last) if x.is_cpu else x


def split_condition(condition: Condition | None) -> tuple[Tensor | None, Tensor | None]:
    """(labels, map), each None where it is not there."""
    if isinstance(condition, tuple):
        return condition
    if condition is None or condition.is_floating_point():
        return None, condition
    return condition, None


def outputs_config(state: Mapping[str, Tensor], last: str, in_channels: int) -> dict[str, Any]:
    """``distribution`` and ``levels``, by the number of outputs of the last convolution: one a channel is a logit of two levels."""
    levels = state[f"{last}.weight"].shape[0] // in_channels
    return (
        {"distribution": "bernoulli", "levels": 2} if levels == 1 else {"distribution": "categorical", "levels": levels}
    )


def conditioning_config(state: Mapping[str, Tensor], first: str) -> dict[str, int]:
    """``num_classes`` and ``condition_channels``, by the weights of the :class:`Conditioning` called ``first``."""
    found = {}
    if f"{first}.embedding.weight" in state:
        found["num_classes"] = state[f"{first}.embedding.weight"].shape[0]
    if f"{first}.conv.weight" in state:
        found["condition_channels"] = state[f"{first}.conv.weight"].shape[1]
    return found


def _fitted(tensor: Tensor, shape: torch.Size | None) -> Tensor:
    if shape is None or tensor.shape == shape:
        return tensor
    if tensor.dim() < len(shape) and tensor.numel() == shape.numel():  # a linear layer for a 1x1 convolution
        return tensor.view(shape)
    if tensor.dim() == len(shape) == 4:  # a kernel whose last rows or columns are masked
        return tensor[:, :, : shape[2], : shape[3]].contiguous()
    return tensor


def _described(condition: Condition | None) -> str:
    if condition is None:
        return "None"
    if isinstance(condition, tuple):
        return " and ".join(_described(part) for part in condition)
    return f"{condition.dtype} of shape {tuple(condition.shape)}"


def _check_config(name: str, config: Mapping[str, Any], distribution: str) -> None:
    known = ("categorical", "bernoulli", "logistic_mixture")
    if distribution not in known:
        raise ValueError(f"{name}: distribution must be one of {known}, got {distribution!r}")
    check_positive(name, config, "in_channels", "levels")
    check_positive(name, config, "num_classes", "condition_channels", optional=True)
    if config["levels"] < 2 or (distribution == "bernoulli" and config["levels"] != 2):
        wanted = "2" if distribution == "bernoulli" else "at least 2"
        raise ValueError(f"{name}: levels must be {wanted} for distribution={distribution!r}, got {config['levels']}")
