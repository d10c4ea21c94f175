"""Guidance by a classifier, or any other log probability with a gradient."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .base import ALONE, Call, Guidance, Model, of_means


class ClassifierGuidance(Guidance):
    r"""Dhariwal and Nichol 2021, section 4.2, for any prediction:
    :math:`\hat\varepsilon = \varepsilon - w\sigma\nabla_x\log p(y|x)`.

    With the score shifted by :math:`w\nabla\log p`, the clean sample moves by :math:`w\sigma^2/\alpha\,\nabla\log p`; the
    outputs move accordingly: epsilon by :math:`-\sigma`, v by :math:`-\sigma/\alpha` (for alpha^2 + sigma^2 = 1), the sample by
    :math:`\sigma^2/\alpha` and the flow by :math:`-\sigma/\alpha` times it.

    Args:
        model: called as ``model(x, t, **kwargs)``.
        log_prob: ``log_prob(x, t) -> [N]``, or a classifier ``classifier(x, t) -> logits [N, K]`` with ``labels`` [N].
        kwargs: of the model.
        guidance_scale: w.
        labels: [N], for a classifier.
    """

    def __init__(
        self,
        model: Model,
        log_prob: Callable[[Tensor, Tensor], Tensor],
        kwargs: Mapping[str, Any] | None = None,
        guidance_scale: float = 1.0,
        *,
        labels: Tensor | None = None,
    ) -> None:
        self.model, self.log_prob, self.kwargs = model, log_prob, dict(kwargs or {})
        self.guidance_scale, self.labels = guidance_scale, labels

    def __call__(self, x: Tensor, t: Tensor, call: Call = ALONE) -> tuple[Tensor, Tensor | None]:
        output = self.model(x, t, **self.kwargs)
        factor = self.guidance_scale * shift_of_output(call)
        gradient = self._gradient(x, t)
        return of_means(x, lambda mean: mean + factor * gradient.to(mean.dtype), output), None

    def _gradient(self, x: Tensor, t: Tensor) -> Tensor:
        with torch.enable_grad():
            inputs = x.detach().requires_grad_()
            values = self.log_prob(inputs, t)
            if self.labels is not None:
                if values.dim() != 2 or len(values) != len(x):
                    raise ValueError(f"a classifier must return logits [{len(x)}, K], got shape {tuple(values.shape)}")
                values = torch.log_softmax(values, 1).gather(1, self.labels.to(x.device)[:, None])[:, 0]
            elif values.shape != (len(x),):
                raise ValueError(f"log_prob must return [{len(x)}] without labels, got shape {tuple(values.shape)}")
            return torch.autograd.grad(values.sum(), inputs)[0]


def shift_of_output(call: Call) -> float:
    """What the model's output moves by when the score of x moves by 1."""
    alpha, sigma = call.alpha, call.sigma
    if call.prediction_type == "epsilon":
        return -sigma
    if call.prediction_type == "sample":
        return sigma**2 / alpha
    # v = alpha eps - sigma x0 and the flow eps - x0 move by -sigma alpha - sigma^3 / alpha and -sigma - sigma^2 / alpha
    return -sigma * alpha - sigma**3 / alpha if call.prediction_type == "v_prediction" else -sigma - sigma**2 / alpha
