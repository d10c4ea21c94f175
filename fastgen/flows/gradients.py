"""`Gradients`: what a backward pass through a stack of layers gathers for parameters and context, layer by layer."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge


class Gradients:
    """Sums of gradients, by tensor.

    Args:
        context: tensors beside the input that take a gradient where they require one.
    """

    def __init__(self, context: Sequence[Tensor] = ()) -> None:
        self.context = [x for x in context if x.requires_grad]
        self._sums: dict[Tensor, Tensor] = {}

    def backward(
        self,
        outputs: Sequence[GradientEdge | None],
        grad_outputs: Sequence[Tensor],
        inputs: Sequence[Tensor],
        layer: nn.Module,
    ) -> tuple[Tensor, ...]:
        """The gradients of ``inputs``, zeros where nothing depends on one; those of ``layer``'s parameters go to the sums.

        ``outputs`` are :func:`edges_of` the outputs themselves, whose memory is free by now.
        """
        tensors = [*inputs, *self.context, *(p for p in parameters_of(layer) if p.requires_grad)]
        used = [(edge, dy) for edge, dy in zip(outputs, grad_outputs, strict=True) if edge is not None]
        found = torch.autograd.grad([e for e, _ in used], tensors, [dy for _, dy in used], allow_unused=True)
        for tensor, gradient in zip(tensors[len(inputs) :], found[len(inputs) :], strict=True):
            if gradient is not None:
                self.add(tensor, gradient)
        own = zip(inputs, found, strict=False)
        return tuple(torch.zeros_like(x) if gradient is None else gradient for x, gradient in own)

    def add(self, tensor: Tensor, gradient: Tensor) -> None:
        """Add to the sum for ``tensor``."""
        before = self._sums.get(tensor)
        self._sums[tensor] = gradient.to(tensor.dtype) if before is None else before + gradient

    def of(self, tensor: Tensor) -> Tensor | None:
        """The sum for ``tensor``; None where nothing was added."""
        return self._sums.get(tensor)


def parameters_of(module: nn.Module) -> Iterator[nn.Parameter]:
    """As ``module.parameters()``, which costs more than a small layer does; one that is there twice comes twice."""
    for parameter in module._parameters.values():
        if parameter is not None:
            yield parameter
    for child in module._modules.values():
        if child is not None:
            yield from parameters_of(child)


def edges_of(outputs: Sequence[Tensor]) -> list[GradientEdge | None]:
    """Where the graphs of ``outputs`` begin, without the outputs; None for one that has no graph."""
    return [get_gradient_edge(y) if y.requires_grad else None for y in outputs]


def leaf(tensor: Tensor) -> Tensor:
    """``tensor`` without its history, as the beginning of a graph."""
    return tensor.detach().requires_grad_()


def detached(context: Tensor | tuple[Tensor, ...] | None) -> Tensor | tuple[Tensor, ...] | None:
    """A context without its history."""
    if isinstance(context, tuple):
        return tuple(x.detach() for x in context)
    return None if context is None else context.detach()


def add_into(total: Tensor, indices: slice | Tensor, part: Tensor, *, unless: Tensor) -> Tensor:
    """``total`` with ``part`` added to channels ``indices``, in place where ``total`` is not the memory of ``unless``."""
    if total.untyped_storage().data_ptr() == unless.untyped_storage().data_ptr():
        total = total.clone()
    if isinstance(indices, slice):
        total[:, indices].add_(part)
        return total
    return total.index_add_(1, indices, part.to(total.dtype))
