"""normflows: affine couplings, masked affine flows, spline couplings, masked autoregressive layers, Glow's layers."""

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..ops import ScaleFn, actnorm, affine_coupling, invertible_conv1x1, squeeze
from .flow_layers import (
    FlowLayer,
    SplineAutoregressive,
    SplineCDF,
    SplineCoupling,
    covered,
    worthwhile,
)
from .nflows import MaskedAffineAutoregressiveTransform
from .stand_in import bare, mixin_of

PROJECT = "normflows"
SCALES = {
    "exp": ScaleFn("exp"),
    "sigmoid": ScaleFn("sigmoid", offset=2.0, divide=True),
    "sigmoid_inv": ScaleFn("sigmoid", offset=2.0),
}


class AffineCoupling(FlowLayer):
    """Of a pair, the second part by parameters made of the first."""

    of, project, does = "AffineCoupling", PROJECT, "scale, shift and log-det in one pass"
    takes, has = ("z",), ("param_map", "scale", "scale_map")

    @classmethod
    def reasons(cls, module: Any) -> Iterator[str]:
        if not module.scale:
            yield "a shift alone, which is one pass already"
        elif module.scale_map not in SCALES:
            yield f"scale_map {module.scale_map!r}"

    @staticmethod
    def either(layer: Any, inverse: bool, z: Any) -> Any:
        if not layer.scale or layer.scale_map not in SCALES or not covered(*z):
            return None
        params = layer.param_map(z[0])
        y, log_det = coupled(layer, z[1], params, inverse)
        return [z[0], y], log_det


def coupled(layer: Any, z: Tensor, params: Tensor, inverse: bool, mask: Any = None) -> tuple[Tensor, Tensor]:
    """The op with shifts and raw scales in turn; of a network that made them in another dtype, as under autocast, in that of z."""
    y, log_det = affine_coupling(
        z, params, scale_fn=SCALES[layer.scale_map], layout="interleaved", mask=mask, inverse=inverse
    )
    return y, log_det


class AffineCouplingBlock(FlowLayer):
    of, project, does = "AffineCouplingBlock", PROJECT, "split, scale, shift, log-det and merge in one pass"
    takes, has = ("z",), ("flows",)

    @classmethod
    def concerns(cls, module: Any) -> bool:
        names = [type(each).__name__ for each in module.flows]
        return names == ["Split", "AffineCoupling", "Merge"] and module.flows[1].scale

    @classmethod
    def reasons(cls, module: Any) -> Iterator[str]:
        split, _, merge = module.flows
        if split.mode not in ("channel", "channel_inv") or merge.mode != split.mode:
            yield f"split {split.mode!r}, whose halves its network takes apart"

    @staticmethod
    def either(layer: Any, inverse: bool, z: Tensor) -> Any:
        flows = layer.flows
        if not AffineCouplingBlock.concerns(layer) or next(AffineCouplingBlock.reasons(layer), None):
            return None
        split, coupling, _ = flows
        if mixin_of(coupling) is not AffineCoupling or not bare(flows) or z.dim() < 2 or not covered(z):
            return None
        first, second = z.chunk(2, dim=1)
        if coupling.scale_map not in SCALES or first.shape != second.shape:
            return None
        channel = split.mode == "channel"
        params = coupling.param_map(first if channel else second)
        return coupled(coupling, z, params, inverse, "second_half" if channel else "first_half")


class MaskedAffineFlow(FlowLayer):
    of, project, does = "MaskedAffineFlow", PROJECT, "scale, shift, mask and log-det in one pass"
    takes, has = ("z",), ("b", "s", "t")

    @classmethod
    def reasons(cls, module: Any) -> Iterator[str]:
        if not bool(((module.b == 0) | (module.b == 1)).all()):
            yield "a mask of other numbers than 0 and 1"

    @staticmethod
    def either(layer: Any, inverse: bool, z: Tensor) -> Any:
        b = layer.b if layer.b.is_floating_point() else layer.b.to(z.dtype)
        if z.dim() != b.dim() or z.shape[1:] != b.shape[1:] or z.dim() < 2 or not covered(z, b):
            return None
        masked = b * z
        raw, shift = (where_transformed(t, b) for t in (layer.s(masked), layer.t(masked)))
        if raw.shape != z.shape or shift.shape != z.shape:
            return None
        return affine_coupling(z, raw, shift, inverse=inverse)


def where_transformed(t: Tensor, b: Tensor) -> Tensor:
    """``t`` where the mask is 0, and 0 where it is 1; NaN wherever it is not finite, as theirs is."""
    with torch.no_grad():
        nothing = t - t
    return torch.addcmul(t + nothing, t, b, value=-1)


class MaskedAffineAutoregressive(MaskedAffineAutoregressiveTransform):
    of, project = "MaskedAffineAutoregressive", PROJECT


class PiecewiseRationalQuadraticCoupling(SplineCoupling):
    of, project = "PiecewiseRationalQuadraticCoupling", PROJECT


class PiecewiseRationalQuadraticCDF(SplineCDF):
    of, project = "PiecewiseRationalQuadraticCDF", PROJECT


class MaskedPiecewiseRationalQuadraticAutoregressive(SplineAutoregressive):
    of, project = "MaskedPiecewiseRationalQuadraticAutoregressive", PROJECT


class AffineConstFlow(FlowLayer):
    of, project, does = "AffineConstFlow", PROJECT, "scale and shift in one pass"
    takes = ("z",)
    has: ClassVar[tuple[str, ...]] = ("s", "t")

    @classmethod
    def reasons(cls, module: Any) -> Iterator[str]:
        if not per_channel(module):
            yield f"a scale of its own for each position, {tuple(module.s.shape)}"

    @staticmethod
    def either(layer: Any, inverse: bool, z: Tensor) -> Any:
        s, t = layer.s, layer.t
        if not per_channel(layer) or z.dim() != s.dim() or z.shape[1] != s.shape[1] or not covered(z, s, t):
            return None
        if not worthwhile(z) or not getattr(layer, "data_dep_init_done", True):
            return None  # the first batch says what they are
        sign, positions = (-1 if inverse else 1), z[0, :1].numel() if len(z) else 0
        y, _ = actnorm(z, s.flatten(), t.flatten(), log_scale=True, inverse=inverse)
        return y, sign * positions * s.sum()


def per_channel(layer: Any) -> bool:
    s, t = layer.s, layer.t
    return s.dim() >= 2 and s.numel() == s.shape[1] and t.shape == s.shape


class ActNorm(AffineConstFlow):
    of = "ActNorm"
    has = ("s", "t", "data_dep_init_done")


class Invertible1x1Conv(FlowLayer):
    of, project, does = "Invertible1x1Conv", PROJECT, "one product"
    takes, has = ("z",), ("num_channels", "use_lu")
    relies_on = ("inverse", "_assemble_W")

    @staticmethod
    def either(layer: Any, inverse: bool, z: Tensor) -> Any:
        """``inverse`` multiplies by their matrix, ``forward`` by its inverse."""
        if z.dim() != 4 or not worthwhile(z):
            return None
        if z.shape[1] != layer.num_channels or not covered(z, layer.log_S if layer.use_lu else layer.W):
            return None
        if layer.use_lu:
            weight, log_det = layer._assemble_W(inverse=not inverse), layer.log_S.sum()
            outputs = invertible_conv1x1(z, weight)
        else:
            weight, log_det = layer.W, torch.slogdet(layer.W)[1]
            outputs = invertible_conv1x1(z, weight, inverse=not inverse)
        return outputs, (log_det if inverse else -log_det) * z.size(2) * z.size(3)


class Permute(FlowLayer):
    of, project, does = "Permute", PROJECT, "a copy that leaves samples contiguous"
    takes, has = ("z",), ("mode", "num_channels")

    @classmethod
    def reasons(cls, module: Any) -> Iterator[str]:
        if module.mode != "shuffle":
            yield f"mode {module.mode!r}, which is one copy already"

    @staticmethod
    def either(layer: Any, inverse: bool, z: Tensor, context: Tensor | None = None) -> Any:
        if layer.mode != "shuffle" or z.dim() < 2:
            return None
        log_det = torch.zeros(len(z), device=z.device)
        return z.index_select(1, layer.inv_perm if inverse else layer.perm), log_det


class Squeeze(FlowLayer):
    of, project, does = "Squeeze", PROJECT, "one copy"
    takes = ("z",)

    @classmethod
    def concerns(cls, module: Any) -> bool:
        return hasattr(type(module), "inverse")

    @staticmethod
    def either(layer: Any, inverse: bool, z: Tensor) -> Any:
        if z.dim() != 4 or not covered(z):
            return None
        _, c, h, w = z.shape
        if (h % 2 or w % 2) if inverse else c % 4:
            return None
        return squeeze(z, 2, inverse=not inverse), 0


STAND_INS = (
    AffineCoupling, AffineCouplingBlock, MaskedAffineFlow, MaskedAffineAutoregressive, PiecewiseRationalQuadraticCoupling,
    PiecewiseRationalQuadraticCDF, MaskedPiecewiseRationalQuadraticAutoregressive, AffineConstFlow, ActNorm,
    Invertible1x1Conv, Permute, Squeeze,
)  # fmt: skip
