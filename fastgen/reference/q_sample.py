"""What `q_sample` means, in plain torch: the forward process of a diffusion model, with the target of its training.

Ho et al. 2020, equation 4; v is that of Salimans and Ho 2022, section 4; the flow that of Liu et al. 2022 (rectified flow).
"""

import torch
from torch import Tensor

from .._schema import PREDICTION_TYPES
from ._check import check_floats, check_main, check_noising, check_per_sample, check_prediction, require
from ._layout import copy_like, empty_like_layout, opmath_dtype
from ._philox import normals
from ._timesteps import at_timesteps, check_range, per_sample, target_of


def q_sample_fwd(
    x0: Tensor,
    t: Tensor,
    alphas: Tensor,
    sigmas: Tensor,
    noise: Tensor | None,
    seeds: Tensor | None,
    step: int,
    target: int,
) -> tuple[Tensor, Tensor]:
    """Arithmetic in fp32, or fp64 for fp64 x0. Returns (x_t, target), both like x0; the second empty without a target."""
    check_range("q_sample", t, alphas.shape[0])
    dtype = opmath_dtype(x0.dtype)
    alpha, sigma = (per_sample(c, x0) for c in at_timesteps(t, dtype, alphas, sigmas))
    if seeds is not None:
        noise = normals(seeds, x0.shape, step)
    assert noise is not None
    x, epsilon = x0.to(dtype), noise.to(dtype)
    second = x0.new_empty(0)
    if target >= 0:
        second = copy_like(target_of(target, x, epsilon, alpha, sigma), x0)
    return copy_like(alpha * x + sigma * epsilon, x0), second


def q_sample_bwd(
    grad: Tensor | None,
    grad_target: Tensor | None,
    t: Tensor,
    alphas: Tensor,
    sigmas: Tensor,
    target: int,
    wants_x0: bool,
    wants_noise: bool,
) -> tuple[Tensor, Tensor]:
    """(alpha g + p h, sigma g + q h) for a target p x0 + q epsilon, g and h the gradients of x_t and of the target."""
    check_range("q_sample", t, alphas.shape[0])
    return adjoint(grad, grad_target, t, alphas, sigmas, target, wants_x0, wants_noise)


def adjoint(
    grad: Tensor | None,
    grad_target: Tensor | None,
    t: Tensor,
    alphas: Tensor,
    sigmas: Tensor,
    target: int,
    wants_x0: bool,
    wants_noise: bool,
) -> tuple[Tensor, Tensor]:
    """The same for timesteps that the forward has found in range: nothing here asks for a value, so transforms can follow."""
    like = grad if grad is not None else grad_target
    assert like is not None
    dtype = opmath_dtype(like.dtype)
    alpha, sigma = (per_sample(c, like) for c in at_timesteps(t, dtype, alphas, sigmas))
    in_x0, in_noise = torch.zeros_like(like, dtype=dtype), torch.zeros_like(like, dtype=dtype)
    if grad is not None:
        in_x0, in_noise = in_x0 + alpha * grad.to(dtype), in_noise + sigma * grad.to(dtype)
    if grad_target is not None:
        h, name = grad_target.to(dtype), PREDICTION_TYPES[target]
        if name != "epsilon":
            in_x0 = in_x0 + {"sample": h, "v_prediction": -sigma * h, "flow_prediction": -h}[name]
        if name != "sample":
            in_noise = in_noise + (alpha * h if name == "v_prediction" else h)
    grads = [
        copy_like(value, like) if wanted else like.new_empty(0)
        for value, wanted in ((in_x0, wants_x0), (in_noise, wants_noise))
    ]
    return grads[0], grads[1]


def q_sample_fwd_check(
    x0: Tensor,
    t: Tensor,
    alphas: Tensor,
    sigmas: Tensor,
    noise: Tensor | None,
    seeds: Tensor | None,
    step: int,
    target: int,
) -> None:
    check_main("q_sample", "x0", x0)
    require("q_sample", (noise is None) != (seeds is None), "give either noise or seeds")
    check_floats("q_sample", x0, tuple(x0.shape), noise=noise)
    if seeds is not None:
        check_per_sample("q_sample", "seeds", seeds, x0)
    check_noising("q_sample", x0, t, alphas, sigmas=sigmas)
    check_prediction("q_sample", "target", target, least=-1)


def q_sample_bwd_check(
    grad: Tensor | None,
    grad_target: Tensor | None,
    t: Tensor,
    alphas: Tensor,
    sigmas: Tensor,
    target: int,
    wants_x0: bool,
    wants_noise: bool,
) -> None:
    like = grad if grad is not None else grad_target
    if like is None:
        raise RuntimeError("q_sample: there is no gradient to take back")
    check_main("q_sample", "grad", like)
    check_floats("q_sample", like, tuple(like.shape), grad=grad, grad_target=grad_target)
    check_noising("q_sample", like, t, alphas, sigmas=sigmas)
    check_prediction("q_sample", "target", target, least=-1)


def q_sample_fwd_fake(
    x0: Tensor,
    t: Tensor,
    alphas: Tensor,
    sigmas: Tensor,
    noise: Tensor | None,
    seeds: Tensor | None,
    step: int,
    target: int,
) -> tuple[Tensor, Tensor]:
    return empty_like_layout(x0), empty_like_layout(x0) if target >= 0 else x0.new_empty(0)


def q_sample_bwd_fake(
    grad: Tensor | None,
    grad_target: Tensor | None,
    t: Tensor,
    alphas: Tensor,
    sigmas: Tensor,
    target: int,
    wants_x0: bool,
    wants_noise: bool,
) -> tuple[Tensor, Tensor]:
    like = grad if grad is not None else grad_target
    assert like is not None
    grads = [empty_like_layout(like) if wanted else like.new_empty(0) for wanted in (wants_x0, wants_noise)]
    return grads[0], grads[1]
