"""How a pixel is drawn of its logits: what a model's outputs are, and one draw for every way of sampling.

The engine, the steps and the loops over the full network take the same uniforms, those of (seed, place of the pixel, color), so
that they draw the same pixels where they have the same logits.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .._schema import DRAWS
from ..ops import categorical_sample, logistic_mixture_sample
from ..reference import _sampling


@dataclass(frozen=True)
class Distribution:
    """The distribution of a pixel of ``colors`` numbers.

    Attributes:
        kind: ``"categorical"``, ``"bernoulli"`` or ``"logistic_mixture"``.
        values: what the network takes for each level, [K]; of a mixture empty.
        colors: of a pixel.
        levels_first: whether the logit of level k and color c is channel k * colors + c, else c * K + k.
        rounded: the number of levels in [-1, 1] to which the draw of a mixture is rounded, 0 for none.
    """

    kind: str
    values: Tensor
    colors: int
    levels_first: bool = True
    rounded: int = 0

    def to(self, device: torch.device) -> "Distribution":
        """The same, with its values on ``device``."""
        return replace(self, values=self.values.to(device))

    @property
    def count(self) -> int:
        """Levels of a categorical distribution."""
        return len(self.values) if self.kind == "categorical" else 1

    def row(self, channels: int, top_k: int | None) -> list[int]:
        """DRAW_COLUMNS of a network with so many logits."""
        mixture = self.kind == "logistic_mixture"
        count = channels // (3 if self.colors == 1 else 10) if mixture else self.count
        strides = (self.colors, 1) if self.levels_first else (1, self.count)
        return [DRAWS.index(self.kind), count, *((1, 1) if mixture else strides), top_k or 0, self.rounded, 0]

    def options(self, logits: Tensor) -> Tensor:
        """[N, K, H, W, C] of logits [N, O, H, W], not of a mixture."""
        if self.kind == "bernoulli":
            return torch.stack([torch.zeros_like(logits), logits], 1).movedim(2, -1)
        if self.levels_first:
            return logits.unflatten(1, (self.count, self.colors)).movedim(2, -1)
        return logits.unflatten(1, (self.colors, self.count)).movedim((1, 2), (-1, 1))

    def draw(
        self,
        logits: Tensor,
        seeds: Tensor,
        place: int = 0,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        colors: tuple[int, int] | None = None,
    ) -> Tensor:
        """Pixels [N, C, H, W] of logits [N, O, H, W], the first of which is number ``place`` in raster order.

        ``colors`` (first, last): of a single pixel these alone, [N, last - first, 1, 1].

        Raises:
            ValueError: logits are not finite.
        """
        if self.kind == "logistic_mixture":
            element = place * (self.colors + 1)
            rounded = self.rounded or None
            return logistic_mixture_sample(
                logits, seeds=seeds, channels=self.colors, element=element, levels=rounded, temperature=temperature
            )
        first, last = colors or (0, self.colors)
        drawn: Any = categorical_sample(
            self.options(logits)[..., first:last], seeds=seeds, element=place * self.colors + first,
            temperature=temperature, top_k=top_k, top_p=top_p,
        )  # fmt: skip
        return self.values[drawn].movedim(-1, 1).to(logits.dtype)

    def log_prob(self, logits: Tensor, image: Tensor) -> Tensor:
        """log p of each pixel, [N, H, W], of an image [N, C, H, W] under the logits as they are."""
        if self.kind == "logistic_mixture":
            return _sampling.log_prob_logistic_mixture(logits.movedim(1, -1), image.movedim(1, -1), self.rounded or 256)
        levels = (image[..., None] - self.values).abs().argmin(-1).movedim(1, -1)  # [N, H, W, C]
        return torch.gather(self.options(logits).log_softmax(1), 1, levels[:, None])[:, 0].sum(-1)


def level_values(levels: int) -> Tensor:
    """The values 2 k / (K - 1) - 1 of K levels in [-1, 1], in float64."""
    return (2 * torch.arange(levels, dtype=torch.float64) - (levels - 1)) / (levels - 1)


def distribution_of(
    model: Any,
    channels: int,
    levels_first: bool,
    named: bool,
    colors: int,
    *,
    kind: str | None = None,
    values: Sequence[float] | Tensor | None = None,
    levels: int | None = None,
) -> Distribution:
    """The distribution that a model's outputs stand for, by what the caller says, or else by its attributes or shapes.

    Args:
        model: may have ``distribution`` and ``levels``, as those of :mod:`fastgen.models` do.
        channels: logits of a pixel.
        levels_first, named: their order, and whether the model itself gives them as [N, K, C, H, W].
        colors: of a pixel.
        kind, values, levels: what the caller says.

    Raises:
        ValueError: it cannot be told, or does not fit the number of logits.
    """
    found = kind or getattr(model, "distribution", None)
    if found is None and channels == colors:
        found = "bernoulli"
    elif found is None and (named or values is not None):
        found = "categorical"
    if found is None:
        message = f"distribution must be given: {channels} logits a pixel could be those of levels or of a mixture"
        raise ValueError(f"sample: {message}")
    if found not in DRAWS:
        raise ValueError(f"sample: distribution must be one of {DRAWS}, got {found!r}")
    count = channels // colors
    wanted = {"categorical": count * colors, "bernoulli": colors, "logistic_mixture": channels // 10 * 10}[found]
    if found == "logistic_mixture" and colors == 1:
        wanted = channels // 3 * 3
    if wanted != channels or (found == "logistic_mixture" and colors not in (1, 3)):
        raise ValueError(f"sample: distribution {found!r} does not fit {channels} logits a pixel of {colors} colors")
    if levels is None:
        levels = getattr(model, "levels", None) if kind is None else None
    if found == "logistic_mixture":
        return Distribution(found, torch.empty(0), colors, levels_first, levels or 0)
    if values is None:
        scaled = getattr(model, "distribution", None) is not None
        if found == "categorical" and not scaled:
            raise ValueError(f"sample: values must be given: what the model takes for each of its {count} levels")
        values = level_values(count if found == "categorical" else 2) if scaled else (0.0, 1.0)
    table = torch.as_tensor(values, dtype=torch.float64).flatten()
    if len(table) != (count if found == "categorical" else 2):
        wanted = count if found == "categorical" else 2
        raise ValueError(f"sample: values must be one a level ({wanted}), got {len(table)}")
    return Distribution(found, table, colors, levels_first)
