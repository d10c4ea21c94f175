"""What stand-ins of flow layers are made of: both directions said once, couplings that gather and scatter nothing, splines,
autoregressive layers, and which of the op's scales a function is, by numbers."""

import functools
import math
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..flows import AffineMap, SplineMap
from ..ops import ScaleFn, affine_coupling, rational_quadratic_spline
from .conditioners import inverted, made, manner
from .stand_in import StandIn, mixin_of

WHOLE = (torch.float32, torch.float64)  # in half precision their log-dets are rounded as their tensors are
LEAST = (
    1 << 16
)  # elements from which on a layer of two or three light calls of torch gains by one of ours (AMD EPYC, one thread)
COUPLING = ("identity_features", "transform_features", "transform_net", "unconditional_transform", "features")
SPLINE = ("num_bins", "tails", "tail_bound", "min_bin_width", "min_bin_height", "min_derivative")
CDF = ("unnormalized_widths", "unnormalized_heights", "unnormalized_derivatives", *SPLINE[1:])


class FlowLayer(StandIn):
    """A layer with ``forward`` and ``inverse``.

    What is fused says ``either``, of the layer, whether it is the inverse, and the arguments: what the method returns; or None, and
    their own code runs.
    """

    relies_on: ClassVar[tuple[str, ...]] = ("inverse",)
    either: ClassVar[Callable[..., Any]]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = fused_of(self)(self, False, *args, **kwargs)
        return self.theirs(*args, **kwargs) if found is None else found

    def inverse(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = fused_of(self)(self, True, *args, **kwargs)
        return self.of_theirs("inverse")(*args, **kwargs) if found is None else found


def fused_of(layer: Any) -> Callable[..., Any]:
    mixin: Any = mixin_of(layer)
    return mixin.either  # type: ignore[no-any-return]


def covered(*tensors: Tensor) -> bool:
    """Whether these are of one dtype in which the ops give what plain torch gives, to rounding."""
    return tensors[0].dtype in WHOLE and all(t.dtype == tensors[0].dtype for t in tensors)


def worthwhile(x: Tensor) -> bool:
    """Whether a layer a channel, such as an actnorm, is large enough that it gains."""
    return x.numel() >= LEAST


class Coupling(FlowLayer):
    """A coupling as nflows and normflows write it: the features ``transform_features`` of dim 1 by parameters that
    ``transform_net`` makes of the others, which ``unconditional_transform``, where there is one, transforms first or last.

    ``fused``, of the layer, the input, the parameters and the direction: the op, which copies what is no feature.
    """

    takes: ClassVar[tuple[str, ...]] = ("inputs", "context")
    has: ClassVar[tuple[str, ...]] = COUPLING
    relies_on: ClassVar[tuple[str, ...]] = ("inverse", "_coupling_transform_forward", "_coupling_transform_inverse")
    fused: ClassVar[Callable[..., tuple[Tensor, Tensor]]]

    @staticmethod
    def either(layer: Any, inverse: bool, inputs: Tensor, context: Tensor | None = None) -> Any:
        mixin: Any = mixin_of(layer)
        if inputs.dim() not in (2, 4) or inputs.shape[1] != layer.features or not covered(inputs):
            return None
        if next(mixin.reasons(layer), None) or outside(layer, inputs, layer.transform_features):
            return None
        unconditional, log_det = layer.unconditional_transform, None
        identity = inputs.index_select(1, layer.identity_features)
        if inverse and unconditional is not None:
            identity, log_det = unconditional.inverse(identity, context)
        params = layer.transform_net(identity, context)
        if covered(inputs, params):
            outputs, of_features = mixin.fused(layer, inputs, params, inverse)
        else:  # as under autocast
            transform = layer._coupling_transform_inverse if inverse else layer._coupling_transform_forward
            part, of_features = transform(
                inputs=inputs.index_select(1, layer.transform_features), transform_params=params
            )
            outputs = inputs.index_copy(1, layer.transform_features, part.to(inputs.dtype))
        if unconditional is not None:
            if not inverse:
                identity, log_det = unconditional(identity, context)
            outputs = outputs.index_copy(1, layer.identity_features, identity)
        return outputs, of_features if log_det is None else of_features + log_det


class SplineCoupling(Coupling):
    does = "split, spline, log-det and merge in one pass"
    has = (*COUPLING, *SPLINE)
    relies_on = (*Coupling.relies_on, "_coupling_transform", "_piecewise_cdf")

    @classmethod
    def reasons(cls, module: Any) -> Iterator[str]:
        yield from unsplinable(module)

    @staticmethod
    def fused(layer: Any, x: Tensor, params: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        return spline(layer, x, params, inverse, layer.transform_features, root_of(layer.transform_net, warn=True))


class SplineCDF(FlowLayer):
    """A spline an element, the same for all samples."""

    does = "spline and log-det in one pass"
    takes, has = ("inputs", "context"), CDF
    relies_on = ("inverse", "_spline")

    @classmethod
    def reasons(cls, module: Any) -> Iterator[str]:
        yield from unsplinable(module)

    @staticmethod
    def either(layer: Any, inverse: bool, inputs: Tensor, context: Tensor | None = None) -> Any:
        shared = (layer.unnormalized_widths, layer.unnormalized_heights, layer.unnormalized_derivatives)
        if next(unsplinable(layer), None) or outside(layer, inputs) or not covered(inputs, *shared):
            return None
        if inputs.dim() < 2 or inputs.shape[1:] != shared[0].shape[:-1]:
            return None
        packed = torch.cat(shared, dim=-1).expand(len(inputs), *[-1] * inputs.dim())
        return splined(layer, inputs, packed, inverse, bins=bins_of(layer))


class Autoregressive(StandIn):
    """A layer of elements with parameters by a masked network of those before them, as nflows and normflows write it.

    ``either``, of the layer, whether it is the inverse, the input [N, F], the parameters [N, F * M], and which features they are
    where they are not all: the op. ``known``: the same as the inverse takes it, where it does.
    """

    method = "_elementwise_forward"
    takes = ("inputs", "autoregressive_params")
    relies_on: ClassVar[tuple[str, ...]] = ("forward", "inverse", "_elementwise_inverse")
    either: ClassVar[Callable[..., Any]]

    @classmethod
    def says(cls, module: Any) -> str:
        return f"{cls.does}; {manner(module.autoregressive_net, functools.partial(made, module.autoregressive_net))}"

    @classmethod
    def known(cls, layer: Any) -> AffineMap | SplineMap | None:
        return None

    def _elementwise_forward(self: Any, inputs: Tensor, autoregressive_params: Tensor) -> Any:
        found = fused_of(self)(self, False, inputs, autoregressive_params)
        return self.theirs(inputs, autoregressive_params) if found is None else found

    def _elementwise_inverse(self: Any, inputs: Tensor, autoregressive_params: Tensor) -> Any:
        found = fused_of(self)(self, True, inputs, autoregressive_params)
        return self.of_theirs("_elementwise_inverse")(inputs, autoregressive_params) if found is None else found

    def inverse(self: Any, inputs: Tensor, context: Tensor | None = None) -> Any:
        mixin: Any = mixin_of(self)
        net, found = self.autoregressive_net, None

        def elements(values: Tensor, params: Tensor, inverse: bool, features: Sequence[int]) -> Any:
            return mixin.either(self, inverse, values, params, features)

        flat = isinstance(getattr(self, "tails", None), (list, tuple))  # outside its box, where no slope says what came
        grads = flat and torch.is_grad_enabled() and any(t.requires_grad for t in (inputs, *net.parameters()))
        if inputs.dim() == 2 and not next(mixin.reasons(self), None) and not outside(self, inputs) and not grads:
            describe = functools.partial(made, net)
            found = inverted(net, describe, lambda *args: args, elements, mixin.known(self), inputs, context)
        return self.of_theirs("inverse")(inputs, context) if found is None else found


class SplineAutoregressive(Autoregressive):
    does = "spline and log-det in one pass"
    has = ("autoregressive_net", *SPLINE)
    relies_on = (*Autoregressive.relies_on, "_elementwise")

    @classmethod
    def reasons(cls, module: Any) -> Iterator[str]:
        yield from unsplinable(module)

    @classmethod
    def known(cls, layer: Any) -> SplineMap | None:
        one_box = layer.tails is None or not isinstance(layer.tail_bound, Tensor)
        if isinstance(layer.tails, (list, tuple)) or not one_box:
            return None
        least = (layer.min_bin_width, layer.min_bin_height, layer.min_derivative)
        box = (0.0, 1.0, 0.0, 1.0) if layer.tails is None else layer.tail_bound
        scale = 1 / root_of(layer.autoregressive_net, channels=False)
        return SplineMap(layer.num_bins, layer.tails, box, *least, scale=scale)

    @staticmethod
    def either(layer: Any, inverse: bool, inputs: Tensor, params: Tensor, features: Sequence[int] | None = None) -> Any:
        if inputs.dim() != 2 or next(unsplinable(layer), None) or outside(layer, inputs) or not covered(inputs, params):
            return None
        root = root_of(layer.autoregressive_net, channels=False)
        return spline(layer if features is None else part_of(layer, features), inputs, params, inverse, None, root)


def part_of(layer: Any, features: Sequence[int]) -> Any:
    """The numbers of a layer's splines as those of some features."""
    numbers = {name: getattr(layer, name) for name in SPLINE}
    if isinstance(layer.tails, (list, tuple)):
        numbers["tails"] = [layer.tails[feature] for feature in features]
    if isinstance(layer.tail_bound, Tensor):
        numbers["tail_bound"] = layer.tail_bound[list(features)]
    return types.SimpleNamespace(**numbers)


def spline(
    layer: Any, x: Tensor, params: Tensor, inverse: bool, features: Tensor | None, root: float
) -> tuple[Tensor, Tensor]:
    """The spline of a layer whose network made ``params`` [N, C' * M, *]: of each feature the widths, heights and derivatives, of
    which it divides the first two by ``root``."""
    count = x.shape[1] if features is None else len(features)
    packed = params.unflatten(1, (count, -1)).movedim(2, -1)  # [N, C', *, M]
    return splined(layer, x, packed, inverse, features, 1 / root, layer.num_bins)


def splined(
    layer: Any,
    x: Tensor,
    packed: Tensor,
    inverse: bool,
    features: Tensor | None = None,
    scale: float = 1.0,
    bins: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The op with the numbers of a layer."""
    box: Any = {"bound": (0.0, 1.0, 0.0, 1.0) if layer.tails is None else layer.tail_bound}
    least = {name: getattr(layer, name) for name in SPLINE[3:]}
    call: Any = functools.partial(rational_quadratic_spline, num_bins=bins, inverse=inverse, scale=scale, **least)
    if not isinstance(layer.tails, (list, tuple)):
        return call(x, packed, tails=layer.tails, mask=features, **box)
    part = x if features is None else x.index_select(1, features)
    y, log_det = part, x.new_zeros(len(x))
    for tails in ("linear", "circular"):
        chosen = torch.tensor(
            [i for i, kind in enumerate(layer.tails) if kind == tails], dtype=torch.int64, device=x.device
        )
        if len(chosen):
            if isinstance(layer.tail_bound, Tensor):
                box["bound"] = layer.tail_bound[chosen]
            y, of_these = call(y, packed[:, chosen], tails=tails, mask=chosen, **box)
            log_det = log_det + of_these
    y = torch.where(
        part.abs() <= layer.tail_bound, y, 0
    )  # what normflows makes of what lies outside, of a list of tails
    return y if features is None else x.index_copy(1, features, y), log_det


def root_of(net: Any, channels: bool = True, warn: bool = False) -> float:
    """By what nflows and normflows divide widths and heights: the root of the hidden size of the network that makes them."""
    hidden = getattr(net, "hidden_features", None)
    if hidden is None and channels:
        hidden = getattr(net, "hidden_channels", None)
    if hidden is None and warn:
        warnings.warn("Inputs to the softmax are not scaled down: initialization might be bad.", stacklevel=2)
    return math.sqrt(hidden) if hidden else 1.0


def unsplinable(layer: Any) -> Iterator[str]:
    """Why this layer's spline is nothing for the op, sentences for the report."""
    of_each = layer.tails if isinstance(layer.tails, (list, tuple)) else (layer.tails or "linear",)
    if unknown := [tails for tails in of_each if tails not in ("linear", "circular")]:
        yield f"tails {unknown[0]!r}"
    if any(getattr(layer, name) * bins_of(layer) > 1 for name in SPLINE[3:5]):
        yield "a least bin too large for the number of bins"


def bins_of(layer: Any) -> int:
    return layer.num_bins if hasattr(layer, "num_bins") else layer.unnormalized_widths.shape[-1]  # type: ignore[no-any-return]


def outside(layer: Any, inputs: Tensor, features: Tensor | None = None) -> bool:
    """Whether a spline without tails is asked of something that is not in [0, 1], or one of many tails of images: their own code
    answers that."""
    tails = getattr(layer, "tails", "linear")
    if tails is not None:
        return isinstance(tails, (list, tuple)) and inputs.dim() != 2
    x = inputs if features is None else inputs[:, features]
    return x.numel() == 0 or not bool(((x >= 0) & (x <= 1)).all())


_KNOWN: "WeakKeyDictionary[Callable[..., Any], ScaleFn | None]" = WeakKeyDictionary()


def scale_fn_of(
    key: Callable[..., Any], function: Callable[[Tensor], Any], forms: tuple[ScaleFn, ...]
) -> ScaleFn | None:
    """Which of ``forms`` a function from raw scales [R, 1] to scales [R, 1] is; None where it is none of them.

    ``key``: what decides that, under which the answer is kept.
    """
    if key not in _KNOWN:
        raw = torch.linspace(-9, 9, 37, dtype=torch.float64)[:, None]
        with torch.no_grad():
            try:
                found = function(raw.clone())
            except Exception:  # whatever it is, it takes something else
                found = None
            _KNOWN[key] = next((form for form in forms if _is(form, raw, found)), None)
    return _KNOWN[key]


def _is(form: ScaleFn, raw: Tensor, scales: Any) -> bool:
    ours = affine_coupling(torch.ones_like(raw), raw, torch.zeros_like(raw), scale_fn=form)[0]
    return isinstance(scales, Tensor) and scales.shape == ours.shape and torch.allclose(scales, ours, rtol=1e-9, atol=0)
