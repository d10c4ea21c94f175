"""`capture`: an image-autoregressive module, anybody's, as a :class:`Network`.

The module runs once on an example image, and every ATen operation is seen as it is called. What does not depend on the image is
computed as ever, in place too; of what does, :mod:`._lowering` makes nodes.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ._builder import Builder
from ._recorder import Recorder, Refusal
from ._values import NotPlannable, Value, axis
from .network import Network
from .simplify import simplify

__all__ = ["Captured", "NotPlannable", "capture"]


@dataclass(frozen=True)
class Captured:
    """A network, and what its output's channels are. The output is read unshifted, of a node of the image's size.

    ``levels`` numbers for each of ``color_channels``, of level k and color c in channel k color_channels + c where ``levels_first``
    and in c levels + k otherwise: a module that returns [N, K, C, H, W] has levels first, and so, where it returns
    [N, K C, H, W], it is taken to be; of a mixture's parameters ``levels`` says nothing. ``rank`` of its images is 4, or 3 of
    [N, C, T]; ``named`` where the module itself tells levels and colors apart.
    """

    network: Network
    levels: int
    color_channels: int
    levels_first: bool
    rank: int = 4
    named: bool = False


def capture(model: nn.Module, shape: Sequence[int], *, condition: Any = None) -> Captured:
    """What ``model(image)``, or ``model(image, condition)``, computes of an image of ``shape`` [N, C, H, W] or [N, C, T].

    Raises :class:`NotPlannable`, naming the layer, where that cannot be told position by position.
    """
    if len(shape) not in (3, 4):
        raise ValueError(f"capture: shape must be (N, C, H, W) or (N, C, T), got {tuple(shape)}")
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    n, colors, *size = shape
    height, width = (1, *size)[-2:]
    builder = Builder(colors, height, width)
    example = torch.zeros(tuple(shape), **dtype_and_device(model))
    axes = (axis("N", n), axis("C", colors), *(axis(k, s) for k, s in zip("HW"[-len(size) :], size, strict=True)))
    recorder = Recorder(builder)
    recorder.enter(example, builder.value(0, axes))
    with evaluating(model), _names(model, builder), torch.no_grad(), recorder:
        output = model(example) if condition is None else model(example, condition)
    if not isinstance(output, Tensor):
        raise NotPlannable(f"the model returns a {type(output).__name__}, expected a tensor of logits")
    result = recorder.stands_for(output)
    if isinstance(result, Refusal):
        raise NotPlannable(result.reason)
    if isinstance(result, Tensor):
        result = _constant(builder, result, shape)
    return _captured(builder, result, output, shape)


def _constant(builder: Builder, output: Tensor, shape: Sequence[int]) -> Any:
    """Logits that depend on no pixel, as those of a single pixel do."""
    _, _, *size = shape
    inner = output.shape[1 : output.dim() - len(size)]
    if not inner or output.shape[0] != shape[0] or tuple(output.shape[-len(size) :]) != tuple(size):
        return output
    axes = (
        axis("N", shape[0]),
        *(axis("C", n) for n in inner),
        *(axis(k, s) for k, s in zip("HW"[-len(size) :], size, strict=True)),
    )
    height, width = (1, *size)[-2:]
    return builder.constant(output, replace(builder.value(0, axes[:1]), height=height, width=width, axes=axes))


def _captured(builder: Builder, result: Any, output: Tensor, shape: Sequence[int]) -> Captured:
    _, colors, *size = shape
    kinds = [[kind for kind, _ in axis] for axis in result.axes] if isinstance(result, Value) else []
    spatial = [list("HW"[-len(size) :][i]) if s > 1 else [] for i, s in enumerate(size)]
    rank, plain = len(shape), kinds[len(kinds) - len(size) :] == spatial and kinds[:1] in ([[]], [["N"]])
    if not plain or len(kinds) not in (rank, rank + 1) or tuple(output.shape[-len(size) :]) != tuple(size):
        expected = "[N, K, H, W] or [N, K, C, H, W]" if rank == 4 else "[N, K, T] or [N, K, C, T]"
        raise NotPlannable(f"the model returns {list(output.shape)} of an image {list(shape)}, expected {expected}")
    operand = builder.operand(result)
    last = builder.nodes[operand.node]
    if (operand.dy, operand.dx, last.height, last.width) != (0, 0, result.height, result.width):
        operand = builder.operand(builder.sum(result, [(result, 1.0)]))
    levels_first = len(kinds) == rank or result.shape[2] == colors
    if len(kinds) > rank and colors not in result.shape[1:3]:
        raise NotPlannable(
            f"the model returns {list(output.shape)}, of which no dimension is the image's {colors} channels"
        )
    network = simplify(Network(tuple(builder.nodes), operand))
    return Captured(network, operand.channels // colors, colors, levels_first, rank, len(kinds) > rank)


def dtype_and_device(model: nn.Module) -> dict[str, Any]:
    """Of the image that the model takes: those of its first parameter or buffer that has a fraction."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            return {"dtype": tensor.dtype, "device": tensor.device}
    return {}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In eval mode, every module back in its own afterwards; attention by operations that are known."""
    training = [module for module in model.modules() if module.training]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    if training:
        model.eval()
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for module in training:
            module.training = True


@contextmanager
def _names(model: nn.Module, builder: Builder) -> Iterator[None]:
    """Tells the builder which module is running."""
    running: list[str] = []
    hooks = []
    for name, module in model.named_modules():

        def enter(*_: Any, name: str = name) -> None:
            running.append(name)
            builder.layer = name

        def leave(*_: Any) -> None:
            running.pop()
            builder.layer = running[-1] if running else ""

        hooks.append(module.register_forward_pre_hook(enter))
        hooks.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
