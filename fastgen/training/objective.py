"""`Objective`: the loss of a model as the forward of a module, and its gradient as the mean over the ranks.

DistributedDataParallel and FSDP2 watch one module's forward, and what is learned from is a method of ours, or of the model's: bits
a dimension, a log-density. So these are wrapped, and the model inside keeps the names of its weights.
"""

import contextlib
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class Objective(nn.Module):
    """``loss`` as a forward pass.

    Args:
        model: whose parameters are learned.
        loss: of a batch, by way of ``model``; a scalar.
    """

    def __init__(self, model: nn.Module, loss: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.model = model
        self._loss = loss

    def forward(self, batch: Any) -> Tensor:
        return self._loss(batch)


def replicated(objective: Objective, example: Any) -> DistributedDataParallel:
    """``objective`` on each rank, with the mean of the gradients of all; ``example``: a batch, to see which weights take part.

    What no loss depends on (the vertical stack of a PixelCNN's last layer) has no gradient to wait for, and to look for such at
    each step costs a walk through the graph.
    """
    unused = len(_reached(objective(example))) < sum(p.requires_grad for p in objective.parameters())
    # nothing writes to buffers; the second name is that of torch before 2.13
    names = inspect.signature(DistributedDataParallel).parameters
    buffers: dict[str, Any] = {
        "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers": False
    }
    return DistributedDataParallel(objective, gradient_as_bucket_view=True, find_unused_parameters=unused, **buffers)


def gradients_later(objective: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """While a micro-batch that is not the last of a step is computed: no gradients are exchanged yet.

    With FSDP2 they are, after each, for a sum of whole gradients would take the memory that it saves.
    """
    return objective.no_sync() if isinstance(objective, DistributedDataParallel) else contextlib.nullcontext()


def _reached(loss: Tensor) -> set[Tensor]:
    """The leaves that ``loss`` has a gradient for."""
    found: set[Tensor] = set()
    seen: set[Any] = set()
    waiting = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):  # of a leaf
            found.add(node.variable)
        waiting += [following for following, _ in node.next_functions]
    return found
