"""`MultiScale`: levels of an image flow, between which half of the channels is done and leaves for the latent.

Dinh et al. 2016 (Density estimation using real NVP), section 3.6; the conditional Gaussian of what leaves is that of Kingma &
Dhariwal 2018 (Glow).
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from .. import ops
from .conditioners import Conditioner, conditioned
from .transform import Context, Transform, first_not_finite, no_log_det

Shape = tuple[int, int, int]


class Squeeze(Transform):
    """[N, C, H, W] -> [N, factor^2 C, H / factor, W / factor]; :func:`fastgen.ops.squeeze`, which has the orders."""

    def __init__(self, factor: int = 2, order: str = "channel_major") -> None:
        super().__init__()
        self.factor, self.order = factor, order

    def forward(self, input: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        return ops.squeeze(input, self.factor, order=self.order), no_log_det(input)

    def inverse(self, input: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        return ops.squeeze(input, self.factor, order=self.order, inverse=True), no_log_det(input)

    def extra_repr(self) -> str:
        return f"factor={self.factor}, order={self.order!r}"


class Split(nn.Module):
    r"""The first ``keep`` of C channels go on; the others leave as :math:`\epsilon = (z - \mu) e^{-\log\sigma}`.

    Args:
        keep: channels that go on; 0 for the end of a flow.
        channels: C, of which C - keep leave.
        prior: a conditioner from what goes on (from the context alone, where nothing does) to mu and log sigma,
            [N, 2 (C - keep), H, W] or [N, 2 (C - keep), 1, 1]; None for mu = log sigma = 0.

    Raises:
        ValueError: that many channels cannot be split so.
    """

    def __init__(self, keep: int, channels: int, prior: Conditioner | None = None) -> None:
        super().__init__()
        if not 0 <= keep < channels:
            raise ValueError(f"Split: keep must be in [0, C) with C = {channels}, got {keep}")
        self.keep, self.channels, self.prior = keep, channels, prior

    def forward(self, h: Tensor, context: Context = None) -> tuple[Tensor, Tensor, Tensor]:
        """[N, C, H, W] -> (what goes on [N, keep, H, W], epsilon [N, C - keep, H, W], log-det [N])."""
        kept, z = self._parts(h)
        if self.prior is None:
            return kept, z, no_log_det(h)
        packed = self._statistics(kept, z, context)
        return kept, *ops.affine_coupling(z, packed, layout="shift_first", inverse=True)

    def inverse(self, kept: Tensor, epsilon: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        """Of :meth:`forward`: (h, its log-det)."""
        if self.prior is None:
            z, log_det = epsilon, no_log_det(epsilon)
        else:
            packed = self._statistics(kept, epsilon, context)
            z, log_det = ops.affine_coupling(epsilon, packed, layout="shift_first")
        return torch.cat([kept, z], 1) if self.keep else z, log_det

    def log_prob(self, h: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        """(what goes on, log N(z; mu, sigma^2) [N]): z is read once, epsilon is not made."""
        kept, z = self._parts(h)
        if self.prior is None:
            return kept, ops.gaussian_log_prob(z)
        return kept, ops.gaussian_log_prob(z, self._statistics(kept, z, context))

    def _parts(self, h: Tensor) -> tuple[Tensor, Tensor]:
        if h.dim() < 2 or h.shape[1] != self.channels:
            raise ValueError(f"Split: input must be [N, {self.channels}, *], got shape {tuple(h.shape)}")
        return h[:, : self.keep], h[:, self.keep :]

    def _statistics(self, kept: Tensor, z: Tensor, context: Context) -> Tensor:
        assert self.prior is not None
        packed = conditioned(self.prior, kept, context) if self.keep else self.prior(context)
        if packed.dim() != z.dim() or packed.shape[1] != 2 * z.shape[1]:
            raise ValueError(f"Split: prior must give [N, {2 * z.shape[1]}, *], got shape {tuple(packed.shape)}")
        return packed.expand(len(z), -1, *z.shape[2:])

    def extra_repr(self) -> str:
        return f"keep={self.keep}, channels={self.channels}"


class MultiScale(Transform):
    """Levels, each but the last followed by a :class:`Split`; the latent is [N, D], the parts in the order in which they left.

    A context that is a tuple has one tensor a level.

    Args:
        levels: transforms of images.
        splits: one after each level but the last; or one after each, whose last keeps 0 channels.
        shape: [C, H, W] of an image; None where :meth:`inverse` is told.

    Raises:
        ValueError: the numbers do not fit, or the shape cannot be squeezed and split so.
    """

    def __init__(
        self, levels: Iterable[Transform], splits: Iterable[Split], shape: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        self.levels, self.splits = nn.ModuleList(levels), nn.ModuleList(splits)
        if len(self.splits) not in (len(self.levels) - 1, len(self.levels)):
            raise ValueError(f"MultiScale: {len(self.levels)} levels and {len(self.splits)} splits do not alternate")
        self.shape = None if shape is None else _triple(shape)
        if self.shape is not None:
            self.shapes(self.shape)

    def forward(self, input: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        h, log_det, parts = input, no_log_det(input), []
        for i, (level, split) in enumerate(self.pairs()):
            own = _of_level(context, i)
            h, term = level(h, own)
            log_det = log_det + term
            if split is not None:
                h, epsilon, term = split(h, own)
                log_det = log_det + term
                parts.append(epsilon.flatten(1))
        if self._ends_with_level:
            parts.append(h.flatten(1))
        return torch.cat(parts, 1), log_det

    def inverse(
        self, input: Tensor, context: Context = None, *, shape: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """``shape`` [C, H, W] of the image, where it is not that of the constructor."""
        given = self.shape if shape is None else _triple(shape)
        if given is None:
            raise ValueError("MultiScale: inverse needs the shape of the image, which the constructor was not told")
        shapes = self.shapes(given)
        if input.dim() != 2 or input.shape[1] != math.prod(given):
            raise ValueError(f"MultiScale: latent must be [N, {math.prod(given)}], got shape {tuple(input.shape)}")
        parts = list(input.split([math.prod(shape) for shape in shapes], 1))
        pairs, log_det = list(enumerate(self.pairs())), no_log_det(input)
        h = parts.pop().view(-1, *shapes[-1]) if self._ends_with_level else input.new_empty(0)
        for i, (level, split) in reversed(pairs):
            own = _of_level(context, i)
            if split is not None:
                epsilon = parts.pop().view(-1, *shapes[i])
                h = h if split.keep else epsilon[:, :0]
                h, term = split.inverse(h, epsilon, own)
                log_det = log_det + term
            h, term = level.inverse(h, own)
            log_det = log_det + term
        return h, log_det

    def log_prob(self, input: Tensor, context: Context = None) -> Tensor:
        """log p of images whose epsilons are standard normal, [N]: as by :meth:`forward`, without making the latent."""
        h, nats = input, no_log_det(input)
        for i, (level, split) in enumerate(self.pairs()):
            own = _of_level(context, i)
            h, term = level(h, own)
            nats = nats + term
            if split is not None:
                h, term = split.log_prob(h, own)
                nats = nats + term
        return nats + ops.gaussian_log_prob(h) if self._ends_with_level else nats

    def shapes(self, shape: Sequence[int]) -> list[Shape]:
        """Of the parts of the latent of an image [C, H, W]. Raises ValueError where it cannot be squeezed or split."""
        parts, now = [], _triple(shape)
        for i, (level, split) in enumerate(self.pairs()):
            for layer in level.modules():
                if isinstance(layer, Squeeze):
                    now = _squeezed(now, layer.factor, i, tuple(shape))
            if split is None:
                parts.append(now)
                continue
            if split.channels != now[0]:
                raise ValueError(f"MultiScale: level {i} gives {now[0]} channels, its split takes {split.channels}")
            parts.append((now[0] - split.keep, *now[1:]))
            now = (split.keep, *now[1:])
        return parts

    def first_not_finite(self, input: Tensor, context: Context = None) -> tuple[str, str] | None:
        """As the function of this name: the level and the layer in it, and what it does."""
        h = input
        for i, (level, split) in enumerate(self.pairs()):
            own = _of_level(context, i)
            found = first_not_finite(list(getattr(level, "transforms", [level])), h, own)
            if found is not None:
                return f"{found[0]} of level {i}", found[1]
            h = level(h, own)[0]
            if split is not None:
                h, epsilon, term = split(h, own)
                if not (epsilon.isfinite().all() and term.isfinite().all()):
                    return f"Split of level {i}", "overflows"
        return None

    def pairs(self) -> list[tuple[Transform, Split | None]]:
        """Each level with the split after it; None where there is none."""
        splits = [*self.splits, *([None] if self._ends_with_level else [])]
        return list(zip(self.levels, splits, strict=True))  # type: ignore[arg-type]

    @property
    def _ends_with_level(self) -> bool:
        return len(self.splits) < len(self.levels)


def _of_level(context: Context, level: int) -> Context:
    return context[level] if isinstance(context, tuple) else context


def _triple(shape: Sequence[int]) -> Shape:
    if len(shape) != 3:
        raise ValueError(f"MultiScale: shape must be [C, H, W], got {tuple(shape)}")
    channels, height, width = shape
    return channels, height, width


def _squeezed(shape: Shape, factor: int, level: int, image: tuple[int, ...]) -> Shape:
    channels, height, width = shape
    if height % factor or width % factor:
        raise ValueError(
            f"MultiScale: level {level} cannot squeeze {height} x {width} by {factor}, for an image of shape {image}"
        )
    return channels * factor**2, height // factor, width // factor
