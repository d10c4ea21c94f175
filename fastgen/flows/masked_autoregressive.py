"""`MaskedAutoregressive`: each feature transformed by what the features before it say.

Papamakarios et al. 2017 (Masked autoregressive flow for density estimation), with affine maps; Durkan et al. 2019 (Neural spline
flows), with splines. Forward is one pass of the network; the inverse finds one feature after the other, each unit of the network
once where it can be planned.
"""

from functools import partial

import torch
from torch import Tensor, nn

from .. import ops
from ..ops.affine_coupling import SCALE_FNS, ScaleFn
from .autoregressive_conditioner import ConditionerPlan
from .autoregressive_inverse import AffineMap, AutoregressiveMap, InverseReport, SplineMap, invert
from .coupling import check_scale_fn
from .spline import Spline
from .transform import Context, Transform


class MaskedAutoregressive(Transform):
    """What autoregressive layers have in common; a subclass says how parameters act.

    Args:
        network: (x [N, D], or x and context) -> [N, D P], those of feature d side by side and dependent on the features before d:
            a :class:`~fastgen.flows.MADE`.
        features: D.
    """

    def __init__(self, network: nn.Module, features: int) -> None:
        super().__init__()
        self.network, self.features = network, features
        self.plan = ConditionerPlan()
        self.last_inverse: InverseReport | None = None

    def forward(self, input: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        return self._mapped(self._checked(input), self._given(input, context), inverse=False)

    def inverse(self, input: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        """As :func:`fastgen.flows.invert` says, whose report of the last call is ``last_inverse``."""
        if input.is_meta:  # shapes alone
            return self._mapped(self._checked(input), self._given(input, context), inverse=True)
        if isinstance(context, tuple):
            raise ValueError(f"{type(self).__name__}: context must be one tensor, got {len(context)}")
        x, log_det, self.last_inverse = invert(self.as_map(), self._checked(input), context)
        return x, log_det

    def as_map(self) -> AutoregressiveMap:
        """The layer as :func:`fastgen.flows.invert` takes it."""
        describe = getattr(self.network, "conditioner", None)
        plan = getattr(self.network, "plan", None) or self.plan
        wanted = torch.is_grad_enabled()
        parameters = [p for p in self.network.parameters() if p.requires_grad] if wanted else ()

        def mapped(values: Tensor, parameters: Tensor, features: object, *, inverse: bool) -> tuple[Tensor, Tensor]:
            return self._mapped(values, parameters, inverse=inverse)

        forward, inverse = partial(mapped, inverse=False), partial(mapped, inverse=True)
        return AutoregressiveMap(self._given, forward, inverse, plan, self._known(), describe, parameters)

    def _known(self) -> AffineMap | SplineMap | None:
        """The map of a feature, where it is one of these."""
        return None

    def _given(self, x: Tensor, context: Context) -> Tensor:
        return self.network(x) if context is None else self.network(x, context)

    def _mapped(self, input: Tensor, parameters: Tensor, *, inverse: bool) -> tuple[Tensor, Tensor]:
        """``input`` by the maps that the network's parameters are: (result, log-det)."""
        raise NotImplementedError(f"{type(self).__name__}: _mapped is not written")

    def _checked(self, input: Tensor) -> Tensor:
        if input.dim() != 2 or input.shape[1] != self.features:
            name = type(self).__name__
            raise ValueError(f"{name}: input must be [N, {self.features}], got shape {tuple(input.shape)}")
        return input


class AffineAutoregressive(MaskedAutoregressive):
    """y = x s + t with s and t of each feature by those before it.

    Args:
        network, features: as in :class:`MaskedAutoregressive`, with P = 2: raw scale and shift.
        scale_fn: as in :func:`fastgen.ops.affine_coupling`.

    Raises:
        ValueError: ``scale_fn`` is not known.
    """

    def __init__(self, network: nn.Module, features: int, *, scale_fn: str | ScaleFn = "soft_clip") -> None:
        super().__init__(network, features)
        check_scale_fn(type(self).__name__, scale_fn)
        self.scale_fn = scale_fn

    def _known(self) -> AffineMap | None:
        return AffineMap.of(SCALE_FNS[self.scale_fn] if isinstance(self.scale_fn, str) else self.scale_fn)

    def _mapped(self, input: Tensor, parameters: Tensor, *, inverse: bool) -> tuple[Tensor, Tensor]:
        return ops.affine_coupling(
            input, parameters, scale_fn=self.scale_fn, layout="interleaved_scale_first", inverse=inverse
        )

    def extra_repr(self) -> str:
        return f"{self.features}, scale_fn={self.scale_fn!r}"


class SplineAutoregressive(MaskedAutoregressive):
    """A monotone rational-quadratic spline of each feature, by those before it.

    Args:
        network, features: as in :class:`MaskedAutoregressive`, with P that of ``spline``.
        spline: what the splines have in common.
    """

    def __init__(self, network: nn.Module, features: int, *, spline: Spline | None = None) -> None:
        super().__init__(network, features)
        self.spline = spline or Spline()

    def _known(self) -> SplineMap:
        s = self.spline
        least = (s.min_bin_width, s.min_bin_height, s.min_derivative)
        return SplineMap(s.num_bins, s.tails, s.bound, *least, scale=s.scale)

    def _mapped(self, input: Tensor, parameters: Tensor, *, inverse: bool) -> tuple[Tensor, Tensor]:
        return self.spline(input, parameters, inverse=inverse)

    def extra_repr(self) -> str:
        return f"{self.features}, {self.spline}"
