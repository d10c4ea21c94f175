"""Rules of fastgen's own ops, as a module that is watched calls them."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .._schema import GATED_ACTIVATIONS
from ..reference._masked_taps import mask, origin
from ._arithmetic import add, negative
from ._builder import Builder
from ._convolution import as_image, dense
from ._layout import split
from ._rules import RULES, rule
from ._values import NotPlannable, Value, joined
from .network import Product, Tap


@rule("fastgen.concat_elu_fwd")
def _concat_elu(b: Builder, x: Value) -> Value:
    both = joined([x, negative(b, x)], 1)
    return b.sum(both, [(both, 1.0)], activation="elu")


@rule("fastgen.gated_activation_fwd")
def _gated_activation(b: Builder, x: Any, condition: Any, activation: int) -> Value:
    if condition is not None:
        if isinstance(condition, Tensor):  # else it depends on the image, and has its positions
            missing = len(x.shape) - len(condition.shape)  # [N, 2 C] goes to every position
            condition = condition.reshape(*condition.shape, *[1] * missing)
        x = add(b, x, condition)
    first, second = split(b, x, x.shape[1] // 2, 1)
    name = "tanh" if GATED_ACTIVATIONS[activation] == "tanh" else "none"
    return b.node(Product, first, a=b.operand(first), b=b.operand(second), activation=name, gate="sigmoid")


@rule("fastgen.conv2d_fwd")
def _conv2d(
    b: Builder, x: Any, weight: Any, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int,
    bias: Any, *fused: Any,
) -> Value:  # fmt: skip
    if fused != (
        None,
        None,
        0,
        None,
        None,
        1.0,
        None,
    ):  # a norm before it, which averages over the image, and what is added after
        raise NotPlannable("a convolution with other layers in it")
    made: Value = RULES["aten.convolution"](
        b, x, weight, bias, stride, padding, dilation, False, [0] * len(stride), groups
    )
    return made


@rule("fastgen.masked_conv2d_fwd")
def _masked_conv2d(
    b: Builder,
    x: Any,
    weight: Any,
    bias: Any,
    mask_type: int,
    dilation: Sequence[int],
    groups: int,
    color_channels: int,
) -> Value:
    if isinstance(weight, Value) or isinstance(bias, Value):
        raise NotPlannable("its weights depend on the image")
    as_image(x)
    full = dense(weight * mask(mask_type, weight.shape, groups, color_channels, weight.device), groups, False)
    y, x0 = origin(mask_type, weight.shape[2:])
    weights = {
        Tap((ky - y) * dilation[0], (kx - x0) * dilation[1]): full[:, :, ky, kx]
        for ky in range(weight.shape[2]) for kx in range(weight.shape[3])
    }  # fmt: skip
    return b.image(b.convolution(x, weights, bias, (x.height, x.width), 1, 1), x)
