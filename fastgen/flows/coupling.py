"""Coupling layers: a part of the channels (or pixels) is transformed by what the other part says.

Dinh et al. 2014 (NICE), Dinh et al. 2016 (RealNVP), Durkan et al. 2019 (Neural spline flows). The conditioner sees what is kept,
and gives the parameters of all that is transformed.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import ops
from ..ops.affine_coupling import SCALE_FNS, ScaleFn
from .conditioners import Conditioner, conditioned
from .gradients import Gradients, add_into, edges_of, leaf
from .indices import Indices
from .spline import Spline
from .transform import Context, Transform, no_log_det

MASKS = ("first_half", "second_half", "checkerboard", "checkerboard_inverse")


class Coupling(Transform):
    """What coupling layers have in common; a subclass says how parameters act.

    Args:
        conditioner: a module of (what is kept [N, K, *], or that and the context) that gives the parameters.
        mask: what is transformed: ``"first_half"`` (C // 2) or ``"second_half"`` (C - C // 2) of the channels, a list of channels
            beside ``channels``, or ``"checkerboard"`` or ``"checkerboard_inverse"``: the pixels whose h + w is even or odd; the
            conditioner sees the image with these at 0, and gives parameters for all.
        channels: C, needed for a list.

    Raises:
        ValueError: ``mask`` is not known, or has channels that are not there; the message names the layer.
    """

    def __init__(
        self, conditioner: Conditioner, *, mask: str | Sequence[int] = "second_half", channels: int | None = None
    ) -> None:
        super().__init__()
        self.conditioner, self.mask = conditioner, mask if isinstance(mask, str) else "channels"
        self.transformed: Indices | None = None
        self.kept: Indices | None = None
        if not isinstance(mask, str):
            transformed, kept = _parts(type(self).__name__, mask, channels)
            self.transformed, self.kept = Indices(transformed), Indices(kept)
        elif mask not in MASKS:
            raise ValueError(f"{type(self).__name__}: mask must be one of {MASKS} or a list of channels, got {mask!r}")

    def forward(self, input: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        return self._coupled(input, conditioned(self.conditioner, self._kept(input), context), inverse=False)

    def inverse(self, input: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        return self._coupled(input, conditioned(self.conditioner, self._kept(input), context), inverse=True)

    def invert_with_grad(
        self, output: Tensor, grad_output: Tensor, grad_log_det: Tensor, context: Context, gradients: Gradients
    ) -> tuple[Tensor, Tensor]:
        """As in :class:`Transform`, with one run of the conditioner: what it sees is the same before and after the layer."""
        kept = leaf(self._kept(output))
        with torch.enable_grad():
            parameters = conditioned(self.conditioner, kept, context)
        input, _ = self._coupled(output, parameters.detach(), inverse=True)
        x = leaf(input)
        with torch.enable_grad():
            results = edges_of(self._coupled(x, parameters, inverse=False))
        del parameters
        grad_input, grad_kept = gradients.backward(results, (grad_output, grad_log_det), (x, kept), self)
        if self.mask.startswith("checkerboard"):
            grad_kept = grad_kept * self._checkerboard(grad_kept)
        return input, add_into(grad_input, self._kept_channels(output), grad_kept, unless=grad_output)

    def _coupled(self, input: Tensor, parameters: Tensor, *, inverse: bool) -> tuple[Tensor, Tensor]:
        """``input``, or the output of the layer where ``inverse``, with the conditioner's parameters: (result, log-det)."""
        raise NotImplementedError(f"{type(self).__name__}: _coupled is not written")

    def _kept(self, input: Tensor) -> Tensor:
        """What the conditioner sees."""
        if input.dim() < 2 or (input.shape[1] < 2 and not self.mask.startswith("checkerboard")):
            raise ValueError(f"{self._name}: input must be [N, C, *] with C >= 2, got shape {tuple(input.shape)}")
        if self.mask.startswith("checkerboard"):
            return input * self._checkerboard(input)
        channels = self._kept_channels(input)
        return input[:, channels] if isinstance(channels, slice) else input.index_select(1, channels)

    def _kept_channels(self, input: Tensor) -> slice | Tensor:
        half = input.shape[1] // 2
        if self.kept is not None:
            return self.kept.values
        return {"first_half": slice(half, None), "second_half": slice(0, half)}.get(self.mask, slice(None))

    def _checkerboard(self, like: Tensor) -> Tensor:
        """[H, W]: 1 where a pixel is kept."""
        if like.dim() != 4:
            raise ValueError(f"{self._name}: input must be [N, C, H, W] for {self.mask!r}, got {tuple(like.shape)}")
        rows, columns = (torch.arange(size, device=like.device) for size in like.shape[2:])
        odd = (rows[:, None] + columns) % 2
        return (odd if self.mask == "checkerboard" else 1 - odd).to(like.dtype)

    @property
    def _mask(self) -> str | Tensor:
        """As the ops take it."""
        return self.mask if self.transformed is None else self.transformed.values

    @property
    def _name(self) -> str:
        return type(self).__name__

    def extra_repr(self) -> str:
        return f"mask={self.mask!r}"


class AffineCoupling(Coupling):
    """y = x s + t (or (x + t) s) of what is transformed; s by ``scale_fn`` of what the conditioner gives.

    The conditioner gives [N, 2 C', *], raw scales and shifts in ``layout``, C' channels being transformed (all C for a
    checkerboard).

    Args:
        conditioner, mask, channels: as in :class:`Coupling`.
        scale_fn: as in :func:`fastgen.ops.affine_coupling`: its name, or a ``ScaleFn``.
        order: ``"scale_shift"`` or ``"shift_scale"``.
        layout: ``"scale_first"``, ``"shift_first"`` or ``"interleaved"``.
        scale_channels: C', for a learned weight [C'] of the scale; None for none.

    Raises:
        ValueError: an argument is not known; the message names the layer.

    Source: Dinh et al. 2016 (Density estimation using real NVP), equations 7 and 8.
    """

    def __init__(
        self,
        conditioner: Conditioner,
        *,
        mask: str | Sequence[int] = "second_half",
        channels: int | None = None,
        scale_fn: str | ScaleFn = "exp",
        order: str = "scale_shift",
        layout: str = "scale_first",
        scale_channels: int | None = None,
    ) -> None:
        super().__init__(conditioner, mask=mask, channels=channels)
        check_scale_fn(type(self).__name__, scale_fn)
        self.scale_fn, self.order, self.layout = scale_fn, order, layout
        self.scale_weight = None if scale_channels is None else nn.Parameter(torch.ones(scale_channels))

    def _coupled(self, input: Tensor, parameters: Tensor, *, inverse: bool) -> tuple[Tensor, Tensor]:
        return ops.affine_coupling(
            input, parameters, scale_fn=self.scale_fn, order=self.order, layout=self.layout, mask=self._mask,
            inverse=inverse, scale_weight=self.scale_weight,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"mask={self.mask!r}, scale_fn={self.scale_fn!r}, order={self.order!r}, layout={self.layout!r}"


class AdditiveCoupling(Coupling):
    """y = x + t of what is transformed; the log-det is 0. The conditioner gives t [N, C', *]. Dinh et al. 2014 (NICE)."""

    def _coupled(self, input: Tensor, parameters: Tensor, *, inverse: bool) -> tuple[Tensor, Tensor]:
        return ops.additive_coupling(input, parameters, mask=self._mask, inverse=inverse), no_log_det(input)


class SplineCoupling(Coupling):
    """A monotone rational-quadratic spline of what is transformed; Durkan et al. 2019 (Neural spline flows).

    The conditioner gives [N, C' P, *], side by side the P parameters of each channel that is transformed; see :class:`Spline`.

    Args:
        conditioner: as in :class:`Coupling`.
        channels: C.
        mask: as in :class:`Coupling`, but for the checkerboards.
        spline: what the splines have in common.

    Raises:
        ValueError: ``mask`` is not known, or has channels that are not there.
    """

    def __init__(
        self,
        conditioner: Conditioner,
        channels: int,
        *,
        mask: str | Sequence[int] = "second_half",
        spline: Spline | None = None,
    ) -> None:
        halves = {"first_half": range(channels // 2), "second_half": range(channels // 2, channels)}
        if isinstance(mask, str) and mask not in halves:
            raise ValueError(f"SplineCoupling: mask must be one of {tuple(halves)} or a list of channels, got {mask!r}")
        super().__init__(conditioner, mask=halves[mask] if isinstance(mask, str) else mask, channels=channels)
        self.channels, self.spline = channels, spline or Spline()

    def _coupled(self, input: Tensor, parameters: Tensor, *, inverse: bool) -> tuple[Tensor, Tensor]:
        mask = None if self.transformed is None else self.transformed.values
        return self.spline(input, parameters, mask=mask, inverse=inverse)

    def extra_repr(self) -> str:
        return f"{self.channels}, {self.spline}"


class AffineInjector(Transform):
    """y = x s + t of every channel, s and t by the context alone: the affine injector of Lugmayr et al. 2020 (SRFlow).

    Args:
        conditioner: a module of the context that gives [N, 2 C, *], raw scales first.
        scale_fn: as in :class:`AffineCoupling`.
    """

    def __init__(self, conditioner: nn.Module, *, scale_fn: str | ScaleFn = "exp") -> None:
        super().__init__()
        check_scale_fn(type(self).__name__, scale_fn)
        self.conditioner, self.scale_fn = conditioner, scale_fn

    def forward(self, input: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        return ops.affine_coupling(input, self.conditioner(context), scale_fn=self.scale_fn)

    def inverse(self, input: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        return ops.affine_coupling(input, self.conditioner(context), scale_fn=self.scale_fn, inverse=True)

    def invert_with_grad(
        self, output: Tensor, grad_output: Tensor, grad_log_det: Tensor, context: Context, gradients: Gradients
    ) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            parameters = self.conditioner(context)
        input, _ = ops.affine_coupling(output, parameters.detach(), scale_fn=self.scale_fn, inverse=True)
        x = leaf(input)
        with torch.enable_grad():
            results = edges_of(ops.affine_coupling(x, parameters, scale_fn=self.scale_fn))
        (grad_input,) = gradients.backward(results, (grad_output, grad_log_det), (x,), self)
        return input, grad_input

    def extra_repr(self) -> str:
        return f"scale_fn={self.scale_fn!r}"


def check_scale_fn(layer: str, scale_fn: str | ScaleFn) -> None:
    """Raise ValueError, with the name of the layer, for a scale function that is not known."""
    if not isinstance(scale_fn, ScaleFn) and scale_fn not in SCALE_FNS:
        raise ValueError(f"{layer}: scale_fn must be a ScaleFn or one of {tuple(SCALE_FNS)}, got {scale_fn!r}")


def _parts(layer: str, mask: Sequence[int], channels: int | None) -> tuple[list[int], list[int]]:
    """(transformed, kept), both rising."""
    if channels is None:
        raise ValueError(f"{layer}: a list as mask needs channels, how many there are")
    transformed = sorted({int(i) for i in mask})
    kept = sorted(set(range(channels)) - set(transformed))
    if (
        len(transformed) != len(mask)
        or not transformed
        or not kept
        or not 0 <= transformed[0] <= transformed[-1] < channels
    ):
        raise ValueError(f"{layer}: mask must name some, not all, of 0 to {channels - 1}, each once, got {list(mask)}")
    return transformed, kept
