"""`group_norm_affine`: group normalization as a scale and a shift a channel, for the op that reads the input next."""

from typing import Any

import torch
from torch import Tensor

from .. import _dispatch
from ..reference import group_norm_affine as reference
from ._check import check_floating, check_skip, fail, shape_of
from ._dtypes import foreign, in_float32
from ._moments import recall
from ._watchers import watched


def group_norm_affine(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    skip: Tensor | None = None,
    channel_bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""What :func:`group_norm` does to each channel of each sample, as one multiply-add.

    .. math:: \mathrm{GN}(input + channel\_bias) \cdot (1 + scale) + shift = input \cdot a + c

    With it :func:`conv2d` reads the input of a residual block once for norm, activation and convolution:

        a, c = group_norm_affine(x, 32, norm.weight, norm.bias)
        y = conv2d(x, weight, bias, padding=1, input_scale=a, input_shift=c, activation="silu")

    Where the convolution that made ``input`` has gathered its moments (``gather_moments`` of :func:`conv2d`), and that of ``skip``,
    and nothing has changed them since, they are not read.

    Its error is that of torch's own GroupNorm on the CPU, which multiplies and adds too: where the mean of a group is large
    beside its deviation, the digits that they share are lost, which :func:`group_norm` keeps.

    Args:
        input: [N, C, *spatial], any strides; float64, float32, bfloat16 or float16.
        num_groups: divides C.
        weight, bias: [C].
        eps: added to the variance.
        skip: [N, C', *spatial], a second input whose channels come after those of ``input``; C is then the channels of both.
        channel_bias, scale, shift: [N, C].

    Returns:
        (a, c), each [N, C] in float32 (float64 for float64 input). Differentiable in every tensor argument, through plain torch.

    Raises:
        TypeError: an argument is no tensor, or not of a floating-point dtype.
        ValueError: a shape or a device does not fit, or ``num_groups`` does not divide C.
    """
    check_floating("group_norm_affine", "input", input)
    if input.dim() < 2:
        fail("group_norm_affine", f"input must be [N, C, *spatial], got {shape_of(input)}")
    n, c = input.shape[:2]
    if skip is not None:
        input, skip = check_skip("group_norm_affine", input, skip)
        c += skip.shape[1]
    if num_groups < 1 or c % num_groups:
        given = f"num_groups={num_groups} and input of shape {(n, c, *input.shape[2:])}"
        fail("group_norm_affine", f"num_groups must divide channels, got {given}")
    params = (weight, bias, channel_bias, scale, shift)
    for name, param, shape in (
        ("weight", weight, (c,)), ("bias", bias, (c,)), ("channel_bias", channel_bias, (n, c)), ("scale", scale, (n, c)),
        ("shift", shift, (n, c)),
    ):  # fmt: skip
        if param is None:
            continue
        check_floating("group_norm_affine", name, param)
        if param.shape != shape:
            fail(
                "group_norm_affine",
                f"{name} must have shape {shape}, got {shape_of(param)} with input of {shape_of(input)}",
            )
        if param.device != input.device:
            fail("group_norm_affine", f"{name} must be on the device of input ({input.device}), got {param.device}")
    function: Any = reference.group_norm_affine if _dispatch.needs_grad(input, skip, *params) else _forward
    if foreign(input, skip, *params):
        function = in_float32("group_norm_affine", function)
    elif function is _forward and not watched():
        moments = recall(input)
        skip_moments = recall(skip) if skip is not None and moments is not None else None
        if moments is not None and (skip is None) == (skip_moments is None):
            return _known(input, skip, moments, skip_moments, num_groups, *params, eps)
    return function(input, skip, num_groups, *params, eps)


_forward: Any = torch.ops.fastgen.group_norm_affine.default
_known: Any = torch.ops.fastgen.group_norm_affine_known.default
