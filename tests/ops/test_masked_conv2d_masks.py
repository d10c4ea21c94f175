"""`masked_conv2d`: what an output sees, bit by bit, and the masks that say so."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastgen._schema import MASK_TYPES
from fastgen.ops import masked_conv2d, masked_conv2d_mask
from fastgen.reference import masked_conv2d as reference

from .masked_conv2d_cases import plain
from .numerics import LAYOUTS, laid_out, randn
from .test_schema import enumerators


def masked(x: Tensor, weight: Tensor, bias: None, mask_type: str) -> Tensor:
    return masked_conv2d(x, weight, bias, mask_type=mask_type)


@pytest.mark.isa
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MASK_TYPES)
def test_only_what_may_be_seen_is_seen(name, layout):
    """By gradients that are exactly 0, several layers deep, and by outputs that pixels that are not numbers leave as they were."""
    x = laid_out(randn(1, 4, 7, 6, dtype=torch.float32), layout)
    weights = [randn(c, k, 3, 3, seed=i, dtype=torch.float32) for i, (c, k) in enumerate(((9, 4), (9, 9), (9, 9)))]
    later = name.replace("A", "B")  # what follows a first layer
    masks = (name, later, later)

    def network(x: Tensor, layer: Callable[..., Tensor] = masked) -> Tensor:
        for w, kind in zip(weights, masks, strict=True):
            x = layer(x, w, None, kind)
        return x

    ys, xs = torch.meshgrid(torch.arange(7), torch.arange(6), indexing="ij")
    for y, x_of in ((0, 0), (3, 2), (6, 5), (4, 0), (2, 5)):
        seen = {
            "A": (ys < y) | ((ys == y) & (xs < x_of)), "B": (ys < y) | ((ys == y) & (xs <= x_of)),
            "vertical_A": ys < y, "vertical_B": ys <= y,
            "horizontal_A": (ys == y) & (xs < x_of), "horizontal_B": (ys == y) & (xs <= x_of),
            "down": ys <= y, "down_right": (ys <= y) & (xs <= x_of),
        }[name]  # fmt: skip
        leaf = x.clone().requires_grad_()
        by_x = torch.autograd.grad(network(leaf)[..., y, x_of].sum(), leaf)[0][0]
        assert (by_x[:, ~seen] == 0).all()
        wide = x.double().requires_grad_()
        by_wide = torch.autograd.grad(network(wide, plain)[..., y, x_of].sum(), wide)[0][0]
        assert torch.equal(by_x != 0, by_wide != 0)  # and all that may be seen so deep is
        with torch.no_grad():
            spoiled = torch.where(seen, x, math.nan)
            assert torch.equal(network(spoiled)[..., y, x_of], network(x)[..., y, x_of])


@pytest.mark.isa
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("names", [("A", "B", "B"), ("horizontal_A", "horizontal_B", "horizontal_B")])
def test_colors_are_seen_in_their_order(names, groups):
    """Red, green, blue of a pixel, three layers deep, one by one."""
    x = randn(1, 6, 4, 5, dtype=torch.float32)
    weights = [
        randn(k, c // groups, 3, 3, seed=i, dtype=torch.float32)
        for i, (k, c) in enumerate(((12, 6), (12, 12), (24, 12)))
    ]

    def network(x: Tensor) -> Tensor:
        for w, name in zip(weights, names, strict=True):
            x = masked_conv2d(x, w, mask_type=name, color_channels=3, groups=groups)
        return x

    for color in range(3):
        leaf = x.clone().requires_grad_()
        y = network(leaf).unflatten(1, (3, 8))[:, color, :, 2, 2]
        by_x = torch.autograd.grad(y.sum(), leaf)[0].unflatten(1, (3, 2))[0]
        assert (by_x[color:, :, 2, 2] == 0).all() and (by_x[..., 2, 3:] == 0).all() and (by_x[..., 3, :] == 0).all()
        assert groups > 1 or (by_x[:color, :, 2, 2] != 0).all()
        with torch.no_grad():
            spoiled = x.clone()
            spoiled.unflatten(1, (3, 2))[:, color:, :, 2, 2] = math.nan
            assert torch.equal(network(spoiled).unflatten(1, (3, 8))[:, color, :, 2, 2], y.detach())


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("name", MASK_TYPES)
def test_masks_by_loops(name, groups):
    colors = 3 if name[-2:] in ("A", "B", "_A", "_B") and not name.startswith("vertical") else 1
    for kernel in ((3, 3), (5, 3), (1, 7)):
        shape = (12, 12 // groups, *kernel)
        expected = torch.zeros(shape, dtype=torch.bool)
        cy, cx = kernel[0] // 2, kernel[1] // 2
        for o, i, y, x in itertools.product(*map(range, shape)):
            of_output, of_input = o // (12 // colors), (o // (12 // groups) * shape[1] + i) // (12 // colors)
            itself = of_input <= of_output if name.endswith("B") else of_input < of_output
            centre = (y, x) == (cy, cx) and itself
            expected[o, i, y, x] = {
                "A": y < cy or (y == cy and x < cx) or centre, "B": y < cy or (y == cy and x < cx) or centre,
                "vertical_A": y < cy, "vertical_B": y <= cy,
                "horizontal_A": (y == cy and x < cx) or centre, "horizontal_B": (y == cy and x < cx) or centre,
                "down": True, "down_right": True,
            }[name]  # fmt: skip
        assert torch.equal(masked_conv2d_mask(name, shape, groups=groups, color_channels=colors), expected)


def test_masks_of_the_papers():
    """Figure 2 of Pixel Recurrent Neural Networks; RGB as its section 3.4 orders it."""
    assert masked_conv2d_mask("A", (1, 1, 5, 5))[0, 0].int().tolist() == [
        [1] * 5,
        [1] * 5,
        [1, 1, 0, 0, 0],
        [0] * 5,
        [0] * 5,
    ]
    assert masked_conv2d_mask("B", (1, 1, 3, 3))[0, 0].int().tolist() == [[1] * 3, [1, 1, 0], [0] * 3]
    of_rgb = {name: masked_conv2d_mask(name, (3, 3, 1, 1), color_channels=3).flatten(1).int() for name in "AB"}
    assert of_rgb["A"].tolist() == [[0, 0, 0], [1, 0, 0], [1, 1, 0]]
    assert of_rgb["B"].tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert len(reference.taps(0, (7, 7))) == 24 and len(reference.taps(1, (3, 3))) == 5


def test_mask_types_of_the_cpu_kernels():
    assert enumerators("cpu/masked_conv2d.h", "MaskType") == [name.lower() for name in MASK_TYPES]
