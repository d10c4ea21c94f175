"""`reversible`: layers that train in the memory of one of them.

The backward pass knows the output of the stack alone: each layer's input is had back from its output by its inverse, then its
gradient from one local forward; Gomez et al. 2017 (The reversible residual network). A stack of any depth so stores its output,
where autograd stores every activation, and costs one more run of each conditioner, as checkpointing does.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .._uncompiled import uncompiled
from .gradients import Gradients, leaf, parameters_of
from .multi_scale import MultiScale
from .transform import Compose, Context, Transform, no_log_det

# Layers whose second run is not their first.
RANDOM = (nn.modules.dropout._DropoutNd, nn.RReLU, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d)


class Reversible(Compose):
    """:class:`Compose` whose backward pass recomputes what it needs; its state dict is that of Compose.

    Gradients equal those of stored activations up to the rounding of the inverses. Parameters, inputs and contexts get theirs; all
    parameters' gradients are there when the last layer is done, so that DDP reduces them together. Autocast is as it was in the
    forward pass. No second derivatives.

    What draws random numbers by a functional call, of which no module tells, must not stand in a layer.

    Args:
        transforms: in the order of :meth:`forward`.
        keep_last: whether the last layer keeps its activations, which would be computed again at once: one run of one conditioner
            less, and no more memory than that of a layer. Where several stacks follow each other they had better not.
    """

    def __init__(self, transforms: Iterable[Transform], *, keep_last: bool = True) -> None:
        super().__init__(transforms)
        self.keep_last = keep_last

    def forward(self, input: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        """As :meth:`Compose.forward`.

        Raises:
            ValueError: a gradient is wanted, and a layer draws random numbers or keeps statistics (batch norm) as it trains.
        """
        contexts = context if isinstance(context, tuple) else () if context is None else (context,)
        wanted = any(x.requires_grad for x in (input, *contexts, *parameters_of(self)))
        if not torch.is_grad_enabled() or not wanted or not self.transforms:
            return super().forward(input, context)
        self._refuse_random_layers()
        layers = _leaves(self)
        if not self.keep_last:
            return _run(layers, input, isinstance(context, tuple), contexts)
        *first, last = layers
        if not first:
            return last(input, context)
        input, log_det = _run(first, input, isinstance(context, tuple), contexts)
        output, term = last(input, context)
        return output, log_det + term

    def _refuse_random_layers(self) -> None:
        if not any(_unrepeatable(module) for module in _modules(self)):
            return
        name, module = next((name, module) for name, module in self.named_modules() if _unrepeatable(module))
        layer = f"reversible: {name} ({type(module).__name__})"
        if isinstance(module, RANDOM):
            raise ValueError(
                f"{layer} draws random numbers, which a second run would not repeat; "
                "put it in evaluation mode or leave it out"
            )
        raise ValueError(
            f"{layer} would count every batch twice in training; "
            "put it in evaluation mode or use a norm without statistics"
        )


def reversible(layers: Transform | Iterable[Transform]) -> Transform:
    """A transform of the same layers, parameters shared, that trains in the memory of one of them; see :class:`Reversible`.

    Args:
        layers: transforms in the order of ``forward``, or one transform. A Compose is taken apart, down to its smallest layers;
            of a MultiScale, each level is made reversible.

    Raises:
        TypeError: ``layers`` holds what is no :class:`Transform`.

    Example::

        flow = Flow(reversible([AffineCoupling(...) for _ in range(32)]), StandardNormal((64,)))
        (-flow.log_prob(x).mean()).backward()
    """
    if isinstance(layers, MultiScale):
        levels = [Reversible([level], keep_last=False) for level, _ in layers.pairs()]
        return MultiScale(levels, layers.splits, layers.shape)  # type: ignore[arg-type]
    if isinstance(layers, Compose):
        return layers if isinstance(layers, Reversible) else Reversible(layers.layers)
    return Reversible([layers] if isinstance(layers, Transform) else layers)


def _leaves(transform: Transform) -> list[Transform]:
    """The smallest layers of ``transform``: those of a Compose, and of one in it."""
    if not isinstance(transform, Compose) or type(transform).forward not in (Compose.forward, Reversible.forward):
        return [transform]
    return [leaf for layer in transform.layers for leaf in _leaves(layer)]


@uncompiled
def _run(layers: list[Transform], input: Tensor, is_tuple: bool, contexts: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    parameters = dict.fromkeys(p for layer in layers for p in parameters_of(layer) if p.requires_grad)
    return _Stack.apply(layers, is_tuple, len(contexts), input, *contexts, *parameters)


class _Stack(torch.autograd.Function):
    """A whole stack as one node; parameters are inputs, so that whoever waits for their gradients sees them."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, layers: list[Transform], is_tuple: bool, num_contexts: int, input: Tensor, *others: Tensor
    ) -> tuple[Tensor, Tensor]:
        contexts, parameters = others[:num_contexts], others[num_contexts:]
        ctx.layers, ctx.is_tuple, ctx.num_contexts = layers, is_tuple, num_contexts
        ctx.autocast = _autocast(input.device.type)
        output, log_det, context = input, no_log_det(input), _context(contexts, is_tuple)
        with ctx.autocast():
            for layer in layers:
                output, term = layer(output, context)
                log_det = log_det + term
        ctx.save_for_backward(output, *contexts, *parameters)
        return output, log_det

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor, grad_log_det: Tensor) -> tuple[Any, ...]:
        output, *others = ctx.saved_tensors
        contexts, parameters = others[: ctx.num_contexts], others[ctx.num_contexts :]
        needed = ctx.needs_input_grad[4 : 4 + ctx.num_contexts]
        leaves = tuple(leaf(x) if wanted else x.detach() for x, wanted in zip(contexts, needed, strict=True))
        gradients, context = Gradients(leaves), _context(leaves, ctx.is_tuple)
        with ctx.autocast():
            for layer in reversed(ctx.layers):
                output, grad_output = layer.invert_with_grad(output, grad_output, grad_log_det, context, gradients)
        return None, None, None, grad_output, *map(gradients.of, leaves), *map(gradients.of, parameters)


def _unrepeatable(module: nn.Module) -> bool:
    return module.training and isinstance(module, (*RANDOM, nn.modules.batchnorm._BatchNorm))


def _modules(module: nn.Module) -> Iterator[nn.Module]:
    """As ``module.modules()``, without its names."""
    yield module
    for child in module._modules.values():
        if child is not None:
            yield from _modules(child)


def _context(contexts: tuple[Tensor, ...], is_tuple: bool) -> Context:
    return contexts if is_tuple else (contexts[0] if contexts else None)


def _autocast(device_type: str) -> Callable[[], AbstractContextManager[Any]]:
    """A maker of contexts with the autocast that is on now.

    Without its cache: casts of weights that a pass without a graph made would be found by those that need one, and their
    gradients lost.
    """
    if not torch.amp.is_autocast_available(device_type) or not torch.is_autocast_enabled(device_type):
        return nullcontext
    dtype = torch.get_autocast_dtype(device_type)
    return lambda: torch.autocast(device_type, dtype=dtype, enabled=True, cache_enabled=False)
