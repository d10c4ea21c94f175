"""`q_sample`: the forward process of a diffusion model with each sample at its own timestep, and the target of its training."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _dispatch
from ..reference import q_sample as _reference
from ._autograd import apply
from ._check import check_like, check_main, check_seeds, check_table, check_timesteps, fail, prediction_code, shape_of
from ._dtypes import foreign, in_float32

__all__ = ["q_sample"]


def q_sample(
    x0: Tensor,
    t: Tensor,
    alphas: Tensor,
    sigmas: Tensor,
    noise: Tensor | None = None,
    *,
    seeds: Tensor | Sequence[int] | None = None,
    step: int = 0,
    return_target: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Noise every sample to its own timestep.

    .. math:: x_t = \alpha_{t_n} x_0 + \sigma_{t_n} \varepsilon

    and, where asked for, what a model is trained to predict of it, in the same pass: :math:`\varepsilon` ("epsilon"),
    :math:`x_0` ("sample"), :math:`v = \alpha\varepsilon - \sigma x_0` ("v_prediction") or :math:`\varepsilon - x_0`
    ("flow_prediction").

    Args:
        x0: [N, *], float64, float32, bfloat16 or float16 (others: float32 copies); contiguous and channels-last cost no
            other copy.
        t: [N] int64, 0 <= t < T.
        alphas, sigmas: [T] float32 or float64 on the device of ``x0``: the square roots of alpha_bar and 1 - alpha_bar, or
            1 - t and t for a flow (:func:`fastgen.samplers.noising_tables` makes the former).
        noise: epsilon, the shape of ``x0``, any of the four dtypes. Either ``noise`` or ``seeds`` is given.
        seeds: N integers: epsilon is drawn in the kernel, equal to ``philox_normal(seeds, x0.shape, step)``.
        step: the Philox step of noise from ``seeds``, -2^31 <= step < 2^32; another one every iteration of a training loop.
        return_target: a name above: also return that target.

    Returns:
        x_t in the shape, dtype and layout of ``x0``, or (x_t, target), alike. Arithmetic is in float32, or float64 for float64
        ``x0``. Differentiable in x0 and noise, any number of times.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape, device or combination does not fit.
        RuntimeError: a timestep is not in [0, T). On a GPU, where asking would wait for the device, such a sample is NaN.

    Sources: Ho et al. 2020, equation 4; Salimans and Ho 2022, section 4 (v); Liu et al. 2022 (flow).
    """
    check_main("q_sample", "x0", x0)
    check_timesteps("q_sample", t, x0, "x0")
    check_table("q_sample", "alphas", alphas, x0, "x0")
    check_table("q_sample", "sigmas", sigmas, x0, "x0", alphas.shape[0])
    if (noise is None) == (seeds is None):
        fail("q_sample", "give either noise or seeds")
    if noise is not None:
        check_like("q_sample", "noise", noise, x0, "x0")
    if seeds is not None:
        seeds = check_seeds("q_sample", seeds, x0.device)
        if seeds.shape[0] != x0.shape[0]:
            fail("q_sample", f"seeds must be one per sample, got {seeds.shape[0]} for {shape_of(x0)}")
        if seeds.device != x0.device:
            fail("q_sample", f"seeds must be on the device of x0 ({x0.device}), got {seeds.device}")
        if not -(2**31) <= step < 2**32:
            fail("q_sample", f"step must be in [-2^31, 2^32), got {step}")
    target = -1 if return_target is None else prediction_code("q_sample", "return_target", return_target)
    function = _differentiable if torch.is_grad_enabled() and _dispatch.needs_grad(x0, noise) else _forward
    if foreign(x0, noise):
        function = in_float32("q_sample", function, x0.dtype)
    x_t, second = function(x0, t, alphas, sigmas, noise, seeds, step, target)
    return x_t if return_target is None else (x_t, second)


_forward: Any = torch.ops.fastgen.q_sample_fwd.default
_backward: Any = torch.ops.fastgen.q_sample_bwd.default


def _differentiable(*args: Any) -> tuple[Tensor, Tensor]:
    return apply(_QSample, *args)


class _QSample(torch.autograd.Function):
    """A map linear in (x0, noise): the backward needs the tables and no tensor of the size of the batch."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return _forward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, t, alphas, sigmas, _, _, _, ctx.target = inputs
        ctx.set_materialize_grads(False)  # of the two outputs often one takes no part in the loss
        if ctx.target < 0:
            ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(t, alphas, sigmas)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_target: Tensor | None) -> tuple[Tensor | None, ...]:
        wants_x0, wants_noise = ctx.needs_input_grad[0], ctx.needs_input_grad[4]
        if ctx.target < 0:
            grad_target = None
        if grad is None and grad_target is None:
            return (None,) * 8
        # plain torch where gradients of these gradients may be asked for
        function: Any = _reference.adjoint if torch.is_grad_enabled() else _backward
        in_x0, in_noise = function(grad, grad_target, *ctx.saved_tensors, ctx.target, wants_x0, wants_noise)
        # autograd takes the gradient of the noise to its dtype
        return in_x0 if wants_x0 else None, None, None, None, in_noise if wants_noise else None, None, None, None
