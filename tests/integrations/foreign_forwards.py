"""Modules of nobody in particular, whose forwards have GroupNorm, SiLU and convolution in a row, or nearly so."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import silu

FLAG = False


class Base(nn.Module):
    def __init__(self, channels: int = 16, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(4, channels), nn.GroupNorm(2, channels)
        self.act, self.dropout = nn.SiLU(), nn.Dropout(dropout)
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))


class Nested(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(self.dropout(self.act(self.norm2(h))))


class OneAfterAnother(Base):
    """A docstring
    of several lines, indented.
    """

    def forward(self, x: Tensor, e: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
        """Another
        one."""
        h = self.norm1(x)
        h = self.act(h)
        h = self.conv1(h)
        if e is not None:
            h = h + e[:, :, None, None]
        h = self.norm2(h)
        h = torch.nn.functional.silu(h)
        h = self.dropout(h)
        h = self.conv2(h)
        return (x + h) * scale


class Returned(Base):
    def forward(self, x):
        for _ in range(2):
            x = self.norm1(x)
            x = silu(x)
        x = self.conv1(self.act(self.norm2(x)))
        x = self.norm1(x)
        return self.act(x)


class ByFlags(Base):
    """What a trace would have decided once."""

    activated = True

    def forward(self, x, kind="both"):
        h = self.norm1(x)
        if self.training or FLAG:
            return h
        if isinstance(kind, str) and kind == "norm":
            return self.conv1(h)
        if x.mean() > 0:
            h = h + 1
        h = self.norm2(h)
        if self.activated:
            h = self.act(h)
        return self.conv2(F.silu(self.norm1(h)))


class Between(Base):
    """The norm's output is read twice, kept, or changed before the activation."""

    def forward(self, x):
        h = self.norm1(x)
        kept = h
        h = self.act(h)
        g = self.norm2(h)
        out = self.act(g)
        y = self.norm1(out)
        y += 1
        y = self.act(y)
        z = self.norm2(y)
        z = self.act(x)
        z = self.times(self.conv2(F.silu(self.norm2(z))), factor=3)
        return h + kept + g * self.conv1(y) + z

    def times(self, x, factor=1):
        return factor * x


class InContainers(nn.Module):
    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(4, 16) for _ in range(2))
        self.blocks = nn.ModuleDict({"a": nn.Conv2d(16, 16, 3, padding=1)})
        self.act = nn.SiLU()

    def forward(self, x):
        return self.blocks["a"](self.act(self.norms[1](x)))


class WithSuper(Nested):
    def __init__(self, factor=0.5):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        h = self.norm1(super().forward(x) * self.factor)
        h = self.act(h)
        scaled = lambda t: t * self.factor  # noqa: E731
        return scaled(h)


def made_with(exponent):
    class Closed(Base):
        def forward(self, x):
            x = self.norm1(x**exponent)
            x = F.silu(x)
            return x / exponent

    return Closed


Closed = made_with(3)
Closed.__qualname__ = "Closed"


class Guarded(Base):
    """Half done where an exception is caught."""

    def forward(self, x):
        try:
            h = self.norm1(x)
            h = self.act(h)
            h = self.check(h)
        except RuntimeError:
            h = h + 1
        return self.conv1(F.silu(self.norm2(h)))

    def check(self, h):
        raise RuntimeError


class Captured(Base):
    """A name that an inner function reads, one that is another scope's, a `self` that is another."""

    def forward(self, x):
        x = self.norm2(x)
        x = self.act(x)
        h = self.norm1(x)
        h = self.act(h)
        seen = [self.act(self.norm2(t)) for t in (h, x)]

        def inner():
            return h - x

        return inner() + sum(seen) + self.conv1(F.silu(self.norm1(x)))


class Properties(Base):
    """An attribute that is another at each look."""

    looks = 0

    @property
    def next_norm(self):
        self.looks += 1
        return (self.norm1, self.norm2)[self.looks % 2]

    def swapped(self, x):
        self.act_now = nn.Tanh() if self.looks % 3 else self.act
        return x

    def forward(self, x):
        x = self.next_norm(x)
        x = self.swapped(x)
        x = self.act_now(x)
        return self.act(self.next_norm(self.act(self.norm1(x))))


class OtherActivation(Base):
    def __init__(self):
        super().__init__()
        self.act = nn.GELU()

    def forward(self, x):
        return self.conv1(self.act(self.norm1(x)))


class Decorated(Base):
    @torch.no_grad()
    def forward(self, x):
        return self.conv1(F.silu(self.norm1(x)))


class Private(Base):
    def __init__(self):
        super().__init__()
        self.__norm = nn.GroupNorm(4, 16)

    def forward(self, x):
        return self.conv1(F.silu(self.norm1(self.__norm(x))))


class Reassigned(Base):
    def forward(self, x):
        self = self.eval()
        return self.conv1(F.silu(self.norm1(x)))


class Shadowed(Base):
    def forward(self, x):
        F = nn
        return self.conv1(F.functional.silu(self.norm1(x)))


class Watched(Base):
    def __init_subclass__(cls):
        raise AssertionError("nobody asked for a subclass")

    def forward(self, x):
        return self.conv1(F.silu(self.norm1(x)))


class Reduced(Base):
    def __reduce__(self):
        return Reduced, ()

    def forward(self, x):
        return self.conv1(F.silu(self.norm1(x)))
