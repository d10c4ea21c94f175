"""`InvertibleConv1x1`: a square matrix over the channels with its log-determinant and its inverse, direct or as P L U (Glow)."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import invertible_conv1x1, invertible_conv1x1_log_det
from .actnorm import ActNorm

_PARAMETRIZATIONS = ("direct", "plu")


class InvertibleConv1x1(nn.Module):
    r"""y = W x over the channels of each position; W begins as a random rotation.

    ``"direct"`` has the parameter ``weight``; its log-determinant costs a decomposition, in float64, of the small matrix.
    ``"plu"`` has

    .. math:: W = P L (U + \mathrm{diag}(sign \odot e^{s}))

    with the unit lower triangle of ``lower``, the strict upper triangle of ``upper``, s = ``log_diagonal``, and P and the signs
    fixed: never singular, and its log-determinant is the sum of s.

    The inverse matrix is found in float64, and kept for as long as the parameters stay where no gradient is wanted. An actnorm
    before it is taken in the same pass: ``conv(x, actnorm=norm)`` is ``conv(norm(x))`` with both log-determinants.

    Args:
        channels: C of the input [N, C, *].
        parametrization: ``"direct"`` or ``"plu"``.
        device, dtype: of the parameters.

    Raises:
        ValueError: ``parametrization`` is not known. From :meth:`inverse` and from :meth:`set_weight`, where the matrix is
            singular; a state dict with a singular matrix on the CPU is refused by ``load_state_dict``, which names the layer.
    """

    def __init__(self, channels: int, *, parametrization: str = "direct", **factory: Any) -> None:
        super().__init__()
        if parametrization not in _PARAMETRIZATIONS:
            raise ValueError(
                f"InvertibleConv1x1: parametrization must be one of {_PARAMETRIZATIONS}, got {parametrization!r}"
            )
        self.channels, self.parametrization = channels, parametrization
        if parametrization == "direct":
            self.weight = nn.Parameter(torch.empty(channels, channels, **factory))
        else:
            self.lower, self.upper = (nn.Parameter(torch.empty(channels, channels, **factory)) for _ in range(2))
            self.log_diagonal = nn.Parameter(torch.empty(channels, **factory))
            self.register_buffer("permutation", torch.empty(channels, channels, **factory))
            self.register_buffer("sign", torch.empty(channels, **factory))
        self._inverse: tuple[Any, Tensor] | None = None  # of which parameters, and the matrix
        if self._parameter().device.type != "meta":
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw a random rotation."""
        like = self._parameter()
        draw = torch.randn(self.channels, self.channels, dtype=torch.float64, device=like.device)
        self.set_weight(torch.linalg.qr(draw)[0])

    @torch.no_grad()
    def set_weight(self, weight: Tensor) -> None:
        """Make W ``weight`` [C, C].

        Raises:
            ValueError: it is of another shape, or singular.
        """
        if weight.shape != (self.channels, self.channels):
            raise ValueError(
                f"{self._name()}: weight must be [C, C] with C = {self.channels}, got shape {tuple(weight.shape)}"
            )
        if _singular(weight):
            raise ValueError(f"{self._name()}: weight is singular")
        if self.parametrization == "direct":
            self.weight.copy_(weight)
            return
        permutation, lower, upper = torch.linalg.lu(weight.double())
        diagonal = upper.diagonal()
        self.get_buffer("permutation").copy_(permutation)
        self.get_buffer("sign").copy_(diagonal.sign())
        self.lower.copy_(lower.tril(-1))
        self.upper.copy_(upper.triu(1))
        self.log_diagonal.copy_(diagonal.abs().log())

    def matrix(self) -> Tensor:
        """W [C, C]."""
        if self.parametrization == "direct":
            return self.weight
        lower = self.lower.tril(-1) + torch.eye(self.channels, dtype=self.lower.dtype, device=self.lower.device)
        diagonal = self.get_buffer("sign") * self.log_diagonal.exp()
        return self.get_buffer("permutation") @ lower @ (self.upper.triu(1) + diagonal.diag())

    def forward(
        self, input: Tensor, context: Tensor | None = None, *, actnorm: ActNorm | None = None
    ) -> tuple[Tensor, Tensor]:
        """``input`` [N, C, *]. Returns (output, log_det [N]), after ``actnorm`` where one is given; ``context`` is not used. Raises
        what :func:`fastgen.ops.invertible_conv1x1` raises."""
        weight = self.matrix()
        if actnorm is None:
            return invertible_conv1x1(input, weight), self._log_det(input, weight, None)
        actnorm.prepare(input)
        output = invertible_conv1x1(input, weight, actnorm.log_scale, actnorm.shift, log_scale=True)
        return output, self._log_det(input, weight, actnorm)

    def inverse(
        self, input: Tensor, context: Tensor | None = None, *, actnorm: ActNorm | None = None
    ) -> tuple[Tensor, Tensor]:
        """The way back, through ``actnorm`` too where one is given, and the log-determinant of the inverse."""
        weight = self.matrix()
        log_det = -self._log_det(input, weight, actnorm)
        logs, shift = (None, None) if actnorm is None else (actnorm.log_scale, actnorm.shift)
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (weight, logs)):
            try:
                return invertible_conv1x1(input, weight, logs, shift, log_scale=True, inverse=True), log_det
            except ValueError as error:
                raise ValueError(f"{self._name()}: {error}") from None
        inverse = self._inverse_matrix(weight)
        if logs is None or shift is None:
            return invertible_conv1x1(input, inverse), log_det
        slope = torch.exp(-logs.to(inverse.dtype))
        return invertible_conv1x1(input, inverse * slope[:, None], bias=-shift * slope), log_det

    def _log_det(self, input: Tensor, weight: Tensor, actnorm: ActNorm | None) -> Tensor:
        if self.parametrization == "direct":
            logs = None if actnorm is None else actnorm.log_scale
            return invertible_conv1x1_log_det(input, weight, logs, log_scale=True)
        dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
        total = self.log_diagonal.to(dtype).sum()
        if actnorm is not None:
            total = total + actnorm.log_scale.to(dtype).sum()
        return (math.prod(input.shape[2:]) * total).expand(input.shape[0])

    def _inverse_matrix(self, weight: Tensor) -> Tensor:
        """The inverse of ``weight``, computed when the parameters have changed."""
        own = list(self.parameters())
        key = None if any(p.is_inference() for p in own) else [(p.data_ptr(), p._version) for p in own]
        if key is None or self._inverse is None or self._inverse[0] != key:
            if weight.device.type != "meta" and _singular(weight):
                raise ValueError(f"{self._name()}: weight is singular: it has no inverse")
            inverse = torch.linalg.inv(weight.detach().double())
            self._inverse = key, inverse.to(torch.promote_types(weight.dtype, torch.float32))
        return self._inverse[1]

    def _parameter(self) -> Tensor:
        return self.weight if self.parametrization == "direct" else self.lower

    def _name(self) -> str:
        return f"InvertibleConv1x1({self.channels})"

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._inverse = None
        weight, errors = state_dict.get(f"{prefix}weight"), args[-1]
        on_cpu = isinstance(weight, Tensor) and weight.device.type == "cpu"
        if on_cpu and weight.shape == (self.channels,) * 2 and _singular(weight):
            errors.append(f"{self._name()}: {prefix}weight is singular")

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_inverse": None}  # type: ignore[misc]

    def extra_repr(self) -> str:
        plu = f", parametrization={self.parametrization!r}" if self.parametrization != "direct" else ""
        return f"{self.channels}{plu}"


def _singular(weight: Tensor) -> bool:
    """Whether no inverse can be found, in float64. Waits for the device."""
    return not bool(torch.linalg.slogdet(weight.detach().double()).logabsdet.isfinite())
