"""3x3, ReLU, 1x1, ReLU, 3x3 as one node of the graph: nobody sees what lies between, and gradients pass the ReLUs in place.

A ReLU's backward pass into memory of its own is one allocation and one pass more over the widest tensors of a Glow, twice a step.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops._watchers import autocast_active, watched
from . import _conv_network_blocks as blocks


def applies(convs: tuple[nn.Module, ...], x: Tensor) -> bool:
    """Whether nobody looks at what lies between: plain convolutions without hooks, on a CPU, and a gradient is wanted."""
    if not x.is_cpu or not torch.is_grad_enabled() or watched() or autocast_active(x.device):
        return False
    if any(type(conv) is not nn.Conv2d or _hooked(conv) for conv in convs):
        return False
    tensors = [x, *(p for conv in convs for p in (conv.weight, conv.bias))]
    return all(t.dtype == x.dtype for t in tensors) and any(t.requires_grad for t in tensors)


def network(x: Tensor, added: Tensor | None, convs: tuple[nn.Module, ...]) -> Tensor:
    """The network's output; ``added`` [N, hidden] goes to the first convolution's."""
    first, middle, last = convs
    output: Tensor = _Network.apply(
        x.contiguous(memory_format=torch.channels_last), added, first.weight, first.bias, middle.weight, middle.bias,
        last.weight, last.bias,
    )  # fmt: skip
    return output


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _rows(image: Tensor) -> Tensor:
    """[positions, C] of a channels-last image."""
    return image.contiguous(memory_format=torch.channels_last).movedim(1, 3).flatten(0, 2)


def _image(rows: Tensor, like: Tensor) -> Tensor:
    n, _, height, width = like.shape
    return rows.view(n, height, width, rows.shape[1]).movedim(3, 1)


def _plain(x: Tensor, added: Tensor | None, w1: Tensor, b1: Any, w2: Tensor, b2: Any, w3: Tensor, b3: Any) -> Tensor:
    h = F.conv2d(x, w1, b1, padding=1)
    h = F.relu(h if added is None else h + added[:, :, None, None])
    return F.conv2d(F.relu(F.conv2d(h, w2, b2)), w3, b3, padding=1)


class _Network(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, added: Tensor | None, w1: Tensor, b1: Any, w2: Tensor, b2: Any, w3: Tensor, b3: Any
    ) -> Tensor:
        if blocks.applies(x, w3):
            output, rows = blocks.forward(x, added, w1, b1, w2, b2, w3, b3)
            ctx.save_for_backward(x, added, w1, b1, w2, b2, w3, b3, None, rows)
            return output
        h = F.conv2d(x, w1, b1, padding=1)
        if added is not None:
            h.add_(added[:, :, None, None])
        hidden = _rows(h.relu_())
        rows = F.linear(hidden, w2.flatten(1), b2).relu_()
        ctx.save_for_backward(x, added, w1, b1, w2, b2, w3, b3, hidden, rows)
        return F.conv2d(_image(rows, x), w3, b3, padding=1)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *inputs, hidden, rows = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        if torch.is_grad_enabled():  # a gradient of the gradient may be asked for
            leaves = [t for t, needed in zip(inputs, wanted, strict=True) if needed]
            found = iter(torch.autograd.grad(_plain(*inputs), leaves, grad_output, create_graph=True))
            return tuple(next(found) if needed else None for needed in wanted)
        if hidden is None:
            return blocks.backward(grad_output, rows, inputs, wanted)
        x, added, w1, _, w2, _, w3, _ = inputs
        below = any(wanted[:6])
        grad, d_w3, d_b3 = _conv_backward(grad_output, _image(rows, x), w3, (below, *wanted[6:]))
        if grad is None:
            return None, None, None, None, None, None, d_w3, d_b3
        grad_rows = _through_relu(_rows(grad), rows)
        d_w2 = (grad_rows.T @ hidden).view_as(w2) if wanted[4] else None
        d_b2 = grad_rows.sum(0) if wanted[5] else None
        if not any(wanted[:4]):
            return None, None, None, None, d_w2, d_b2, d_w3, d_b3
        grad = _image(_through_relu(grad_rows @ w2.flatten(1), hidden), x)
        d_added = grad.sum((2, 3)) if added is not None and wanted[1] else None
        d_x, d_w1, d_b1 = _conv_backward(grad, x, w1, (wanted[0], *wanted[2:4]))
        return d_x, d_added, d_w1, d_b1, d_w2, d_b2, d_w3, d_b3


def _conv_backward(grad: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """The gradients of a 3x3 convolution's input, weight and bias."""
    grad = grad.contiguous(memory_format=torch.channels_last)
    one = [1, 1]
    found: tuple[Tensor | None, ...] = torch.ops.aten.convolution_backward.default(
        grad, x, weight, [weight.shape[0]], one, one, one, False, [0, 0], 1, list(wanted)
    )
    return found


def _through_relu(grad: Tensor, output: Tensor) -> Tensor:
    """``grad`` where ``output`` is positive, in its own memory."""
    torch.ops.aten.threshold_backward.grad_input(grad, output, 0, grad_input=grad)
    return grad
