"""What stand-ins are made of: a norm, an activation and a convolution as one call of the ops, where nobody looks between them."""

import contextlib
import itertools
import math
import sys
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _dispatch, _library
from ..nn.conv2d import Conv2d, gathering, takes_norm
from ..nn.group_norm import GroupNorm
from ..ops import group_norm, layer_norm, upsample_conv2d
from ..ops._watchers import autocast_active, watched
from .stand_in import StandIn, bare

SWISH = ("SiLU", "Swish", "SiLU32")  # classes of x * sigmoid(x), torch's and those from before it had one
PLAIN = vars(nn.SiLU()).keys()  # what such a module has
END = object()  # behind the last of a row


def with_silu(norm: Any, activation: Any) -> bool:
    """Whether these two may be one call: of classes that the op knows, with no hooks."""
    return is_norm(norm) and is_silu(activation)


def is_norm(norm: Any) -> bool:
    """Whether a module is the op's GroupNorm alone, without an activation, and nobody looks at its calls."""
    known = isinstance(norm, GroupNorm) and (type(norm) is GroupNorm or isinstance(norm, StandIn))
    return known and norm.activation is None and bare((norm,))


def fusible(norm: nn.Module, activation: nn.Module, conv: nn.Module, *between: nn.Module) -> bool:
    """Whether norm, SiLU and convolution may be one call; ``between``: modules that do nothing now, which it leaves out."""
    return with_silu(norm, activation) and isinstance(conv, nn.Conv2d) and bare((conv, *between))


def idle(module: nn.Module) -> bool:
    """Whether a module passes on what it is given."""
    return type(module) is nn.Identity or (type(module) is nn.Dropout and not (module.training and module.p > 0))


def is_swish(activation: Any) -> bool:
    """Whether a module is one of them, with nothing of its own that could scale what it takes."""
    return type(activation) is nn.SiLU or (
        type(activation).__name__ in SWISH and vars(activation).keys() <= PLAIN and not activation._parameters
    )


def is_silu(activation: Any) -> bool:
    """Whether it is such a module, at whose calls nobody looks, or torch's function."""
    return activation is F.silu or (isinstance(activation, nn.Module) and is_swish(activation) and bare((activation,)))


def norm_silu(norm: Any, input: Tensor, **of_norm: Tensor | None) -> Tensor:
    """silu(norm(input)) in one pass; ``of_norm``: channel_bias, scale, shift [N, C], and skip, a second image."""
    return group_norm(input, norm.num_groups, norm.weight, norm.bias, norm.eps, activation="silu", **of_norm)


def norm_silu_conv(
    norm: Any,
    conv: Any,
    input: Tensor,
    *,
    skip: Tensor | None = None,
    residual: Tensor | None = None,
    output_scale: float = 1.0,
    gather_moments: bool = False,
    **of_norm: Tensor,
) -> Tensor:
    """(conv(silu(norm(input))) + residual) * output_scale: in the convolution where its kernels take it, else beside it.

    ``skip``: a second image, whose channels come after those of ``input``; ``gather_moments``: another such norm may read what is
    returned, which it then has less of to read.
    """
    if isinstance(conv, Conv2d) and takes_norm(conv, norm, input, skip):
        a, c = norm.affine_map(input, skip=skip, **of_norm)
        return conv(
            input, skip=skip, input_scale=a, input_shift=c, activation="silu", residual=residual, output_scale=output_scale,
            **gathering(conv, gather_moments),
        )  # fmt: skip
    y = conv(norm_silu(norm, input, **of_norm) if skip is None else norm_silu(norm, input, skip=skip, **of_norm))
    y = y if residual is None else residual + y
    return y if output_scale == 1.0 else y * output_scale


def upsampling(conv: Any) -> bool:
    """Whether nearest upsampling by two and this convolution may be one call."""
    return (
        isinstance(conv, Conv2d)
        and conv.kernel_size == (3, 3)
        and conv.stride == conv.dilation == (1, 1)
        and conv.padding in ((1, 1), "same")
        and conv.groups == 1
        and bare((conv,))
    )


def upsample_conv(conv: Any, input: Tensor, *, gather_moments: bool = False) -> Tensor:
    """conv(input upsampled by two), without the image between them; ``gather_moments`` as above."""
    return upsample_conv2d(input, conv.weight, conv.bias, gather_moments=gather_moments)


def is_nearest_by_two(module: Any) -> bool:
    return type(module) is nn.Upsample and module.mode == "nearest" and module.size is None and module.scale_factor == 2


def in_a_row(calls: Iterable[Any], input: Any) -> Any:
    """``input`` through modules and functions, one after another; GroupNorm, SiLU and a convolution, or the first two, and
    upsampling and a convolution as one call.

    ``calls`` is asked for the next not before all until then are done, but behind a norm and SiLU, which change nothing.
    """
    left = iter(calls)
    ahead: list[Any] = []

    def at(i: int) -> Any:
        while len(ahead) <= i:
            ahead.append(next(left, END))
        return ahead[i]

    while at(0) is not END:
        first, done = at(0), 1
        if is_nearest_by_two(first) and bare((first,)) and upsampling(at(1)):
            input, done = upsample_conv(at(1), input), 2
        elif is_norm(first) and is_silu(at(1)):
            done = 2
            while isinstance(at(done), nn.Module) and idle(at(done)) and bare((at(done),)):
                done += 1
            if isinstance(at(done), nn.Conv2d) and bare((at(done),)):
                input, done = norm_silu_conv(first, at(done), input), done + 1
            else:
                input, done = norm_silu(first, input), 2
        else:
            input = first(input)
        del ahead[:done]
    return input


def linear(module: Any) -> bool:
    """Whether a module is torch's own linear, which a call may do without asking."""
    return type(module) is nn.Linear and bare((module,))


def projects(layer: Any) -> bool:
    """Whether a layer is a linear one or a 1x1 convolution of the op's, with a bias, and that alone."""
    convolves = isinstance(layer, Conv2d) and type(layer).forward is Conv2d.forward
    single = convolves and layer.kernel_size == layer.stride == (1, 1) and layer.groups == 1
    return (linear(layer) or (single and bare((layer,)))) and layer.bias is not None


def layer_norms(modules: Iterable[Any]) -> bool:
    """Whether modules are torch's own layer norms, which a call may do without asking."""
    modules = tuple(modules)
    return all(type(module) is nn.LayerNorm for module in modules) and bare(modules)


def normed_sum(norm: Any, y: Tensor, x: Tensor) -> Any:
    """(norm(y + x), y + x)."""
    return layer_norm(y, norm.normalized_shape, norm.weight, norm.bias, norm.eps, residual=x)


# Variant -> kind of U-Net -> dtypes in which its blocks are faster for an image that lies channels-last. amx: a Xeon with AMX,
# whose tiles read channels together. In float32 that of DDPM on CIFAR-10, whose attention leaves its output so, took 0.90 to 0.96
# of the time, as every skip can be read where it lies; that of Stable Diffusion at half its width 1.02 to 1.05.
CHANNELS_LAST: dict[str, dict[str, frozenset[torch.dtype]]] = {
    "amx": {
        "UNet2DModel": frozenset({torch.float32, torch.bfloat16}),
        "UNet2DConditionModel": frozenset({torch.bfloat16}),
    }
}


def better_channels_last(kind: str, conv: Any, image: Any) -> bool:
    """Whether a U-Net of this ``kind`` that begins with ``conv`` is faster if ``image``, which lies channel by channel, is turned
    before it, and its output back: both are small beside what lies between. Nobody trains or compiles, and the convolutions are
    the op's."""
    return (
        isinstance(image, Tensor)
        and isinstance(conv, Conv2d)
        and image.is_cpu
        and image.dtype in CHANNELS_LAST.get(_library.ISA or "", {}).get(kind, ())
        and image.dim() == 4
        and image.is_contiguous()
        and not image.is_contiguous(memory_format=torch.channels_last)
        and not watched()
        and not _dispatch.needs_grad(image, conv.weight)
        and not autocast_active(image.device)
    )


def agrees(mixin: type[StandIn], module: Any, *shape: int) -> bool:
    """Whether a module of parameters or buffers alone gives what its stand-in gives, to rounding, for an input of ``shape`` with
    samples of different sizes, so that an epsilon shows: projects have norms of one name and one look that are not the same."""
    parameter = next(itertools.chain(module.parameters(), module.buffers()), None)
    if parameter is None or not parameter.is_floating_point():
        return False
    whole = parameter.dtype in (torch.float32, torch.float64)
    sizes = torch.logspace(0, -4 if whole else 0, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    x = (torch.arange(1.0, math.prod(shape) + 1).sin().reshape(shape) * sizes).to(parameter)
    compiler = "torch._dynamo" in sys.modules
    with torch.no_grad(), torch.compiler.set_stance("force_eager") if compiler else contextlib.nullcontext():
        try:
            outputs = [each.forward(module, x) for each in (mixin, type(module))]  # type: ignore[union-attr]
        except Exception:  # whatever it is, it takes something else
            return False
    if outputs[0].shape != outputs[1].shape or outputs[0].dtype != outputs[1].dtype:
        return False
    ours, theirs = (y.double().flatten(1) for y in outputs)
    bound = 64 * torch.finfo(parameter.dtype).eps * theirs.norm(dim=1)
    return bool(((ours - theirs).norm(dim=1) <= bound).all())
