"""`SquareMatrix`: a square matrix over channels as parameters, direct or as P L U, with its inverse and their gradients."""

from typing import Any

import torch
from torch import Tensor, nn

from ..ops._watchers import transforms_active
from ..ops.invertible_conv1x1 import inverse_of

PARAMETRIZATIONS = ("direct", "plu")


class SquareMatrix(nn.Module):
    r"""What modules with a matrix W [C, C] share; the tensors are the module's own, under these names.

    ``"direct"``: ``weight``. ``"plu"``:

    .. math:: W = P L (U + \mathrm{diag}(sign \odot e^{s}))

    with the unit lower triangle of ``lower``, the strict upper triangle of ``upper``, s = ``log_diagonal``, and the buffers
    ``permutation`` (P, a matrix) and ``sign``.
    """

    parametrization: str

    def _make_matrix(self, channels: int, parametrization: str, **factory: Any) -> None:
        """The tensors, of which all but those on the meta device are drawn."""
        if parametrization not in PARAMETRIZATIONS:
            name = type(self).__name__
            raise ValueError(f"{name}: parametrization must be one of {PARAMETRIZATIONS}, got {parametrization!r}")
        self.channels, self.parametrization = channels, parametrization
        if parametrization == "direct":
            self.weight = nn.Parameter(torch.empty(channels, channels, **factory))
        else:
            self.lower, self.upper = (nn.Parameter(torch.empty(channels, channels, **factory)) for _ in range(2))
            self.log_diagonal = nn.Parameter(torch.empty(channels, **factory))
            self.register_buffer("permutation", torch.empty(channels, channels, **factory))
            self.register_buffer("sign", torch.empty(channels, **factory))
        self._inverse: tuple[list[Any], Tensor] | None = None  # of which tensors, and the matrix
        if self._tensors()[0].device.type != "meta":
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw a random rotation."""
        like = self._tensors()[0]
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
        if singular(weight):
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
        """W [C, C]; of three factors, multiplied in float64, in float32 or better."""
        if self.parametrization == "direct":
            return self.weight
        lower, upper = self._triangles()
        return (self.get_buffer("permutation").double() @ lower @ upper).to(self._dtype())

    def inverse_matrix(self) -> Tensor:
        """The inverse of W [C, C], found in float64, in float32 or better: of three factors, by triangular solves.

        Kept for as long as the tensors stay, where no gradient is wanted; on a CPU by their values, which a change of ``.data``
        shows in.

        Raises:
            ValueError: on a CPU, where W is singular; the message names the layer.
        """
        own = self._tensors()
        wanted = torch.is_grad_enabled() and any(p.requires_grad for p in own)
        passing = torch.compiler.is_compiling() or transforms_active() or torch.is_inference_mode_enabled()
        if wanted or passing or own[0].is_meta or own[0].is_inference():
            return self._inverted()
        if self._inverse is None or not _unchanged(self._inverse[0], own):
            self._inverse = [p.clone() if p.is_cpu else (p.data_ptr(), p._version) for p in own], self._inverted()
        return self._inverse[1]

    def matrix_gradients(
        self, grad_weight: Tensor, grad_log_det: Tensor, inverse: Tensor
    ) -> list[tuple[nn.Parameter, Tensor]]:
        """Each parameter with its gradient, of that of W [C, C] and that of log |det W|; ``inverse`` is W's."""
        if self.parametrization == "direct":
            return [(self.weight, grad_weight + grad_log_det * inverse.T)]
        with torch.no_grad():
            lower, upper = self._triangles()
            grad = self.get_buffer("permutation").double().T @ grad_weight.double()
            of_upper = lower.T @ grad
            of_diagonal = of_upper.diagonal() * upper.diagonal() + grad_log_det
            pairs = (
                (self.lower, (grad @ upper.T).tril(-1)), (self.upper, of_upper.triu(1)), (self.log_diagonal, of_diagonal),
            )  # fmt: skip
            return [(parameter, gradient.to(self._dtype())) for parameter, gradient in pairs]

    def _triangles(self) -> tuple[Tensor, Tensor]:
        """L and U with its diagonal, in float64, which no autocast looks at."""
        one = torch.eye(self.channels, dtype=torch.float64, device=self.lower.device)
        diagonal = self.get_buffer("sign").double() * self.log_diagonal.double().exp()
        return self.lower.double().tril(-1) + one, self.upper.double().triu(1) + diagonal.diag()

    def _inverted(self) -> Tensor:
        if self.parametrization == "direct":
            try:
                return inverse_of(self.weight)
            except ValueError as error:
                raise ValueError(f"{self._name()}: {error}") from None
        lower, upper = self._triangles()
        half = torch.linalg.solve_triangular(
            lower, self.get_buffer("permutation").double().T, upper=False, unitriangular=True
        )
        return torch.linalg.solve_triangular(upper, half, upper=True).to(self._dtype())

    def _tensors(self) -> list[Tensor]:
        """All that W is made of."""
        if self.parametrization == "direct":
            return [self.weight]
        return [self.lower, self.upper, self.log_diagonal, self.get_buffer("permutation"), self.get_buffer("sign")]

    def _dtype(self) -> torch.dtype:
        return torch.promote_types(self._tensors()[0].dtype, torch.float32)

    def _name(self) -> str:
        return f"{type(self).__name__}({self.channels})"

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._inverse = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_inverse": None}  # type: ignore[misc]

    def extra_repr(self) -> str:
        plu = f", parametrization={self.parametrization!r}" if self.parametrization != "direct" else ""
        return f"{self.channels}{plu}"


def _unchanged(kept: list[Any], own: list[Tensor]) -> bool:
    """Whether these are the tensors that were kept: on a CPU as their values, elsewhere, where to look is to wait, as versions."""
    for key, tensor in zip(kept, own, strict=True):
        same = (
            isinstance(key, Tensor) and key.dtype == tensor.dtype and torch.equal(key, tensor)
            if tensor.is_cpu
            else key == (tensor.data_ptr(), tensor._version)
        )
        if not same:
            return False
    return True


def singular(weight: Tensor) -> bool:
    """Whether no inverse can be found, in float64. Waits for the device."""
    return not bool(torch.linalg.slogdet(weight.detach().double()).logabsdet.isfinite())
