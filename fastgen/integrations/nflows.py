"""nflows: affine, additive and spline couplings, masked autoregressive layers, Glow's layers, the standard normal."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..flows import AffineMap
from ..ops import ScaleFn, actnorm, additive_coupling, affine_coupling, gaussian_log_prob, invertible_conv1x1, squeeze
from .flow_layers import (
    Autoregressive,
    Coupling,
    FlowLayer,
    SplineAutoregressive,
    SplineCDF,
    SplineCoupling,
    covered,
    scale_fn_of,
    worthwhile,
)
from .stand_in import StandIn, bare

PROJECT = "nflows"
SCALES = (  # of AffineCouplingTransform, by default and GENERAL_SCALE_ACTIVATION; of MaskedAffineAutoregressiveTransform
    ScaleFn("sigmoid", offset=2.0, eps=1e-3),
    ScaleFn("softplus", eps=1e-3, bound=3.0),
    ScaleFn("softplus", eps=1e-3),
)


class AffineCouplingTransform(Coupling):
    of, project, does = "AffineCouplingTransform", PROJECT, "split, scale, shift, log-det and merge in one pass"
    relies_on = (*Coupling.relies_on, "_scale_and_shift")

    @classmethod
    def reasons(cls, module: Any) -> Iterator[str]:
        if coupling_scale(module) is None:
            yield "a scale other than sigmoid(s + 2) + 1e-3, softplus(s) + 1e-3 or the least of that and 3"

    @staticmethod
    def fused(layer: Any, x: Tensor, params: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        scale_fn: Any = coupling_scale(layer)
        features = layer.transform_features
        return affine_coupling(x, params, scale_fn=scale_fn, layout="shift_first", mask=features, inverse=inverse)


def coupling_scale(layer: Any) -> ScaleFn | None:
    def scale(raw: Tensor) -> Any:
        return layer._scale_and_shift(raw.expand(-1, 2 * layer.num_transform_features))[0][:, :1]

    return scale_fn_of(getattr(layer, "scale_activation", type(layer)._scale_and_shift), scale, SCALES)


class AdditiveCouplingTransform(Coupling):
    of, project, does = "AdditiveCouplingTransform", PROJECT, "split, shift and merge in one pass"
    relies_on = AffineCouplingTransform.relies_on

    @staticmethod
    def fused(layer: Any, x: Tensor, params: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        return additive_coupling(x, params, mask=layer.transform_features, inverse=inverse), x.new_zeros(len(x))


class PiecewiseRationalQuadraticCouplingTransform(SplineCoupling):
    of, project = "PiecewiseRationalQuadraticCouplingTransform", PROJECT


class PiecewiseRationalQuadraticCDF(SplineCDF):
    of, project = "PiecewiseRationalQuadraticCDF", PROJECT


class MaskedAffineAutoregressiveTransform(Autoregressive):
    of, project, does = "MaskedAffineAutoregressiveTransform", PROJECT, "scale, shift and log-det in one pass"
    has = ("autoregressive_net", "features")
    relies_on = (*Autoregressive.relies_on, "_unconstrained_scale_and_shift")

    @classmethod
    def reasons(cls, module: Any) -> Iterator[str]:
        if elements_scale(module) is None:
            yield "a scale other than softplus(s) + 1e-3 or sigmoid(s + 2) + 1e-3"

    @classmethod
    def known(cls, layer: Any) -> AffineMap | None:
        scale_fn = elements_scale(layer)
        return None if scale_fn is None else AffineMap.of(scale_fn)

    @staticmethod
    def either(layer: Any, inverse: bool, inputs: Tensor, params: Tensor, features: Sequence[int] | None = None) -> Any:
        scale_fn = elements_scale(layer)
        if scale_fn is None or inputs.dim() != 2 or not covered(inputs, params):
            return None
        if params.shape != (inputs.shape[0], 2 * inputs.shape[1]):
            return None
        return affine_coupling(inputs, params, scale_fn=scale_fn, layout="interleaved_scale_first", inverse=inverse)


def elements_scale(layer: Any) -> ScaleFn | None:
    """Of an affine autoregressive layer of nflows or normflows, whose parameters are a raw scale and a shift of each feature."""
    theirs = getattr(layer, "parent_class", type(layer))._elementwise_forward

    def scale(raw: Tensor) -> Any:
        x, params = raw.new_ones(len(raw), layer.features), raw.repeat(1, 2 * layer.features)
        return (theirs(layer, x, params)[0] - theirs(layer, 0 * x, params)[0])[:, :1]

    return scale_fn_of(theirs, scale, SCALES)


class MaskedPiecewiseRationalQuadraticAutoregressiveTransform(SplineAutoregressive):
    of, project = "MaskedPiecewiseRationalQuadraticAutoregressiveTransform", PROJECT


class ActNorm(FlowLayer):
    of, project, does = "ActNorm", PROJECT, "scale, shift and log-det in one pass"
    takes, has = ("inputs", "context"), ("initialized", "log_scale", "shift")
    relies_on = ("inverse", "scale", "_broadcastable_scale_shift", "_initialize")

    @staticmethod
    def either(layer: Any, inverse: bool, inputs: Tensor, context: Tensor | None = None) -> Any:
        log_scale, shift = layer.log_scale, layer.shift
        if inputs.dim() not in (2, 4) or inputs.shape[1] != len(log_scale) or not covered(inputs, log_scale, shift):
            return None
        if not worthwhile(inputs):
            return None
        if not inverse and layer.training and not layer.initialized:
            layer._initialize(inputs)
            log_scale, shift = layer.log_scale, layer.shift
        return actnorm(inputs, log_scale, shift, log_scale=True, inverse=inverse)


class OneByOneConvolution(FlowLayer):
    of, project, does = (
        "OneByOneConvolution",
        PROJECT,
        "permutation, both triangles and bias as one product, no transposed copies",
    )
    takes, has = ("inputs", "context"), ("permutation", "bias", "using_cache", "cache", "lower_entries")
    relies_on = (
        "inverse", "_lu_forward_inverse", "weight", "logabsdet", "_create_lower_upper", "_check_forward_cache",
        "_check_inverse_cache",
    )  # fmt: skip

    @staticmethod
    def either(layer: Any, inverse: bool, inputs: Tensor, context: Tensor | None = None) -> Any:
        order = getattr(layer.permutation, "_permutation", None)
        if inputs.dim() != 4 or order is None or inputs.shape[1] != len(order) or not covered(inputs, layer.bias):
            return None
        if not bare((layer.permutation,)) or getattr(layer.permutation, "_dim", 1) != 1:
            return None
        position = torch.argsort(order)
        cached = layer.using_cache and not layer.training
        if cached and inverse:
            layer._check_inverse_cache()
            weight = layer.cache.inverse[position]
            outputs = invertible_conv1x1(inputs, weight, None, -layer.bias)
        else:
            if cached:
                layer._check_forward_cache()
            weight = (layer.cache.weight if cached else layer.weight())[:, position]
            outputs = invertible_conv1x1(inputs, weight, bias=layer.bias, inverse=inverse)
        log_det = layer.cache.logabsdet if cached else layer.logabsdet()
        pixels = inputs.shape[2] * inputs.shape[3] * (-1 if inverse else 1)
        return outputs, (pixels * log_det).repeat(len(inputs))


class SqueezeTransform(FlowLayer):
    of, project, does = "SqueezeTransform", PROJECT, "one copy"
    takes, has = ("inputs", "context"), ("factor",)

    @staticmethod
    def either(layer: Any, inverse: bool, inputs: Tensor, context: Tensor | None = None) -> Any:
        if inputs.dim() != 4 or not covered(inputs):
            return None
        _, c, h, w = inputs.shape
        if (c < 4 or c % 4 or c % layer.factor**2) if inverse else (h % layer.factor or w % layer.factor):
            return None
        return squeeze(inputs, layer.factor, inverse=inverse), inputs.new_zeros(len(inputs))


class StandardNormal(StandIn):
    of, project, does = "StandardNormal", PROJECT, "log_prob() in one pass"
    method, takes, has = "_log_prob", ("inputs", "context"), ("_shape", "_log_z")

    def _log_prob(self: Any, inputs: Tensor, context: Tensor | None) -> Tensor:
        if inputs.dim() < 2 or inputs.shape[1:] != self._shape or not covered(inputs):
            return self.theirs(inputs, context)
        return gaussian_log_prob(inputs)


STAND_INS = (
    AffineCouplingTransform, AdditiveCouplingTransform, PiecewiseRationalQuadraticCouplingTransform,
    PiecewiseRationalQuadraticCDF, MaskedAffineAutoregressiveTransform,
    MaskedPiecewiseRationalQuadraticAutoregressiveTransform, ActNorm, OneByOneConvolution, SqueezeTransform, StandardNormal,
)  # fmt: skip
