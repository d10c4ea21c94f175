"""`diffusion_loss`: what a diffusion model is trained on, forward and backward, without a tensor for the target."""

from typing import Any

import torch
from torch import Tensor

from .. import _dispatch
from .._schema import VLB_COLUMNS
from ._autograd import apply
from ._check import (
    TABLE_DTYPES,
    check_floating,
    check_like,
    check_main,
    check_table,
    check_timesteps,
    fail,
    kind_of,
    prediction_code,
    refuse_gradient,
    shape_of,
)
from ._dtypes import foreign, in_float32

__all__ = ["diffusion_loss"]

REDUCTIONS = ("mean", "sum", "none")


def diffusion_loss(
    model_output: Tensor,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    alphas: Tensor,
    sigmas: Tensor,
    *,
    prediction_type: str = "epsilon",
    weights: Tensor | None = None,
    vlb_table: Tensor | None = None,
    vlb_weight: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    r"""The squared error of a model's prediction of :math:`x_t = \alpha_{t_n} x_0 + \sigma_{t_n} \varepsilon`, sample by sample:

    .. math:: L_n = w_{t_n} \cdot \mathrm{mean}\big((model - target)^2\big)

    with the target :math:`\varepsilon` ("epsilon"), :math:`x_0` ("sample"), :math:`\alpha\varepsilon - \sigma x_0` ("v_prediction")
    or :math:`\varepsilon - x_0` ("flow_prediction"), computed inside and never stored; the mean is over all elements of the sample.

    With ``vlb_table`` it is the hybrid loss of a model with learned variance (guided-diffusion's ``learned_range``): the
    model's output has 2C channels, the prediction and v in [-1, 1], which interpolates between the log variances of the
    posterior and of the forward process. To the above comes ``vlb_weight`` times the variational bound in bits per dimension:

    .. math:: D_{KL}\big(q(x_{t-1} | x_t, x_0)\,\|\,p_\theta(x_{t-1} | x_t)\big),\; t > 0; \quad -\log p_\theta(x_0 | x_t),\; t = 0

    in which the mean is detached, so that only v learns from it; at t = 0 the likelihood is that of a Gaussian discretised to
    the 256 levels of an image in [-1, 1].

    Args:
        model_output: [N, C, *], or [N, 2C, *] with a ``vlb_table``; float64, float32, bfloat16 or float16 (others: float32
            copies). Contiguous and channels-last cost no other copy where ``x0`` and ``noise`` have the same layout.
        x0, noise: [N, C, *], any of the four dtypes. They are constants here.
        t: [N] int64, 0 <= t < T.
        alphas, sigmas: [T] float32 or float64 on the device of ``model_output``, as :func:`q_sample` takes them.
        prediction_type: one of the names above.
        weights: [T]: w, of the squared error alone. None is 1.
        vlb_table: [T, 3] float32 or float64, the columns :data:`VLB_COLUMNS`; :func:`fastgen.samplers.vlb_table` makes it.
        vlb_weight: lambda. T / 1000 is the published one (0.001 for the sum over T steps).
        reduction: over the samples: ``"mean"``, ``"sum"``, or ``"none"``, which returns [N].

    Returns:
        The loss, float32, or float64 for float64 ``model_output``; sums are in that precision, in an order that does not depend
        on the number of threads. Differentiable once, in ``model_output``; the backward keeps the inputs and nothing else.
        ``torch.vmap`` of ``torch.func.grad`` gives one gradient a sample.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape, device or combination does not fit, or an argument other than ``model_output`` requires a gradient.
        RuntimeError: a timestep is not in [0, T). On a GPU, where asking would wait for the device, such a sample is NaN.

    Sources: Ho et al. 2020, equations 13 and 14; Nichol and Dhariwal 2021, equations 15 and 16; Salimans and Ho 2022.
    """
    check_main("diffusion_loss", "model_output", model_output)
    check_floating("diffusion_loss", "x0", x0)
    if vlb_table is None:
        check_like("diffusion_loss", "x0", x0, model_output, "model_output")
    else:
        _check_hybrid(model_output, x0, vlb_table, alphas)
    check_like("diffusion_loss", "noise", noise, x0, "x0")
    check_timesteps("diffusion_loss", t, model_output, "model_output")
    check_table("diffusion_loss", "alphas", alphas, model_output, "model_output")
    check_table("diffusion_loss", "sigmas", sigmas, model_output, "model_output", alphas.shape[0])
    if weights is not None:
        check_table("diffusion_loss", "weights", weights, model_output, "model_output", alphas.shape[0])
    prediction = prediction_code("diffusion_loss", "prediction_type", prediction_type)
    if reduction not in REDUCTIONS:
        raise ValueError(f"diffusion_loss: reduction must be one of {REDUCTIONS}, got {reduction!r}")
    refuse_gradient("diffusion_loss", "x0", x0)
    refuse_gradient("diffusion_loss", "noise", noise)

    inputs = (model_output, x0, noise, t, alphas, sigmas, weights, vlb_table, prediction, float(vlb_weight))
    function = _differentiable if torch.is_grad_enabled() and _dispatch.needs_grad(model_output) else _forward
    if foreign(model_output, x0, noise):
        function = in_float32("diffusion_loss", function)
    losses = function(*inputs)
    if reduction == "none":
        return losses
    return losses.mean() if reduction == "mean" else losses.sum()


_forward: Any = torch.ops.fastgen.diffusion_loss_fwd.default
_backward: Any = torch.ops.fastgen.diffusion_loss_bwd.default


def _differentiable(*args: Any) -> Tensor:
    return apply(_DiffusionLoss, *args)


def _check_hybrid(model_output: Tensor, x0: Tensor, vlb_table: Tensor, alphas: Tensor) -> None:
    shape = x0.shape
    if x0.dim() < 2 or model_output.shape != (shape[0], 2 * shape[1], *shape[2:]):
        fail(
            "diffusion_loss",
            f"with a vlb_table model_output must be [N, 2C, *] for x0 [N, C, *], got {shape_of(model_output)} for x0 of "
            f"{shape_of(x0)}",
        )
    if x0.device != model_output.device:
        fail("diffusion_loss", f"x0 must be on the device of model_output ({model_output.device}), got {x0.device}")
    if not isinstance(vlb_table, Tensor) or vlb_table.dtype not in TABLE_DTYPES:
        raise TypeError(f"diffusion_loss: vlb_table must be a float32 or float64 tensor, got {kind_of(vlb_table)}")
    steps = len(alphas) if isinstance(alphas, Tensor) and alphas.dim() else 0
    if vlb_table.shape != (steps, len(VLB_COLUMNS)):
        fail(
            "diffusion_loss",
            f"vlb_table must be [T, {len(VLB_COLUMNS)}] with T = {steps}, the length of alphas, got {shape_of(vlb_table)}",
        )
    if vlb_table.device != model_output.device:
        fail(
            "diffusion_loss",
            f"vlb_table must be on the device of model_output ({model_output.device}), got {vlb_table.device}",
        )
    refuse_gradient("diffusion_loss", "vlb_table", vlb_table)


class _DiffusionLoss(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Tensor:
        return _forward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.prediction, ctx.vlb_weight = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _backward(grad, *ctx.saved_tensors, ctx.prediction, ctx.vlb_weight), *[None] * 9
