"""What a step of Glow reads and writes besides its convolutions."""

from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastgen.flows import AdditiveCoupling, AffineCoupling, ConvNet, GlowStep

from .layers import shown

# Raw ops that look at the shape of their input alone.
SHAPES_ALONE = {"fastgen::invertible_conv1x1_log_det"}
# The 1x1 convolution reads and writes an element, the coupling too, and reads scale and shift, or shift, of one in two.
WANTED = {"affine": 5, "additive": 4.5}


class Accesses(TorchDispatchMode):
    """Counts elements of images that ops are given and give, views aside, but for those under :meth:`apart`."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.count, self.of, self._apart = least, 0, [], False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        if not self._apart and not func.is_view and name not in SHAPES_ALONE:
            found = [t.numel() for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
            elements = sum(n for n in found if n >= self.least)
            self.count += elements
            self.of += [(name, elements)] if elements else []
        return result

    @contextmanager
    def apart(self):
        self._apart = True
        yield
        self._apart = False


class Apart(nn.Module):
    """A conditioner, whose accesses are not counted: its convolutions'."""

    def __init__(self, conditioner: nn.Module) -> None:
        super().__init__()
        self.conditioner, self.mode = conditioner, None

    def forward(self, *args):
        with self.mode.apart():
            return self.conditioner(*args)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("kind", WANTED)
@torch.no_grad()
def test_accesses_an_element(kind, inverse):
    channels = 12
    network = Apart(ConvNet(channels // 2, channels if kind == "affine" else channels // 2, hidden_channels=8))
    coupling = AffineCoupling(network, scale_fn="sigmoid") if kind == "affine" else AdditiveCoupling(network)
    step = shown(GlowStep(channels, coupling)).eval()
    x = torch.randn(4, channels, 16, 16, generator=torch.Generator().manual_seed(0))
    network.mode = Accesses(x.numel() // 2)
    with network.mode:
        (step.inverse if inverse else step)(x)
    assert network.mode.count == WANTED[kind] * x.numel(), network.mode.of
