"""`Transform`: an invertible function with the logarithm of its Jacobian determinant, and how transforms are put together.

``forward`` leads from data to the latent, ``inverse`` back, as in nflows. Change of variables, Rezende & Mohamed 2015 (Variational
inference with normalizing flows): log p(x) = log p(z) + log |det dz/dx| with z = forward(x).
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from .gradients import Gradients, detached, edges_of, leaf

Context = Tensor | tuple[Tensor, ...] | None


class Transform(nn.Module):
    """An invertible map of [N, *], sample by sample, perhaps given a context.

    A subclass writes :meth:`forward` and :meth:`inverse`; a cheaper :meth:`invert_with_grad` makes :func:`fastgen.flows.reversible`
    cost no more than checkpointing.
    """

    def forward(self, input: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        """Data [N, *] -> (latent, log |det d latent / d data|, [N], float32, or float64 for float64)."""
        raise NotImplementedError(f"{type(self).__name__}: forward is not written")

    def inverse(self, input: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        """Latent [N, *] -> (data, log |det d data / d latent|, [N])."""
        raise NotImplementedError(f"{type(self).__name__}: inverse is not written")

    def invert_with_grad(
        self, output: Tensor, grad_output: Tensor, grad_log_det: Tensor, context: Context, gradients: Gradients
    ) -> tuple[Tensor, Tensor]:
        """(input, its gradient) of ``output``, that of :meth:`forward`, and the gradients of both results.

        Gradients of parameters and of ``context`` go to ``gradients``. No graph is left behind.
        """
        input = self.inverse(output, detached(context))[0]
        x = leaf(input)
        with torch.enable_grad():
            results = edges_of(self.forward(x, context))
        (grad_input,) = gradients.backward(results, (grad_output, grad_log_det), (x,), self)
        return input, grad_input


class Compose(Transform):
    """One transform after the other; log-dets are summed.

    Args:
        transforms: in the order of :meth:`forward`.

    Raises:
        TypeError: one of them is no :class:`Transform`.
    """

    def __init__(self, transforms: Iterable[Transform]) -> None:
        super().__init__()
        self.transforms = nn.ModuleList(transforms)
        for i, transform in enumerate(self.transforms):
            if not isinstance(transform, Transform):
                name = f"{type(self).__name__}: transforms[{i}]"
                raise TypeError(f"{name} must be a fastgen.flows.Transform, got {type(transform).__name__}")

    @property
    def layers(self) -> list[Transform]:
        """The transforms, in the order of :meth:`forward`."""
        return list(self.transforms)  # type: ignore[arg-type]

    def forward(self, input: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        log_det = no_log_det(input)
        for transform in self.layers:
            input, term = transform(input, context)
            log_det = log_det + term
        return input, log_det

    def inverse(self, input: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        log_det = no_log_det(input)
        for transform in reversed(self.layers):
            input, term = transform.inverse(input, context)
            log_det = log_det + term
        return input, log_det

    def invert_with_grad(
        self, output: Tensor, grad_output: Tensor, grad_log_det: Tensor, context: Context, gradients: Gradients
    ) -> tuple[Tensor, Tensor]:
        for transform in reversed(self.layers):
            output, grad_output = transform.invert_with_grad(output, grad_output, grad_log_det, context, gradients)
        return output, grad_output


class Inverse(Transform):
    """``transform``, the other way round: its inverse is this one's forward."""

    def __init__(self, transform: Transform) -> None:
        super().__init__()
        self.transform = transform

    def forward(self, input: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        return self.transform.inverse(input, context)

    def inverse(self, input: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        return self.transform(input, context)


def no_log_det(input: Tensor) -> Tensor:
    """The log-det of a map that keeps volumes: zeros [N] in the dtype that log-dets of ``input`` have, on its device."""
    return torch.zeros(input.shape[0], dtype=log_det_dtype(input), device=input.device)


def log_det_dtype(input: Tensor) -> torch.dtype:
    """float64 for float64, otherwise float32."""
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def first_not_finite(transforms: Sequence[Transform], input: Tensor, context: Context = None) -> tuple[str, str] | None:
    """``("2 (AffineCoupling)", "overflows")`` for the first of ``transforms`` whose result or log-det is not finite, or
    ``"is singular"`` where the log-det is minus infinity and the result finite; None where all are."""
    for i, transform in enumerate(transforms):
        input, log_det = transform(input, context)
        if not (input.isfinite().all() and log_det.isfinite().all()):
            singular = input.isfinite().all() and (log_det.isfinite() | log_det.isneginf()).all()
            return f"{i} ({type(transform).__name__})", "is singular" if singular else "overflows"
    return None
