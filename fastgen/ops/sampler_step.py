"""`sampler_step`: one step of any diffusion sampler, as one row of a coefficient table, in one pass over memory."""

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from .. import _dispatch
from ..reference import sampler_step as _reference
from ..reference.sampler_step import COLUMNS
from ._autograd import apply
from ._check import fail, shape_of
from .philox_normal import check_seeds

__all__ = ["COLUMNS", "sampler_step"]


def sampler_step(
    sample: Tensor,
    model_output: Tensor,
    table: Tensor,
    step: int,
    *,
    uncond: Tensor | None = None,
    history: Sequence[Tensor] = (),
    noise: Tensor | None = None,
    seeds: Tensor | Sequence[int] | None = None,
    variance: Tensor | None = None,
    mask: Tensor | None = None,
    known: Tensor | None = None,
    known_noise: Tensor | None = None,
    return_prediction: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Apply row ``step`` of a coefficient table to ``sample``.

    .. math::
        g &= uncond + w\,(model - uncond) \quad\text{(or the model output itself)} \\
        p &= \mathrm{clip}(p_x\,x + p_g\,g) \\
        x' &= a\,x + b\,p + d\,g + \sum_k c_k h_k + s\,e^{l + m v}\,\varepsilon \\
        x' &\leftarrow mask\,x' + (1 - mask)(k\,known + k_\varepsilon\,known\_noise)

    The coefficients are those of :data:`COLUMNS` (in that order: a, b, d, s, p_x, p_g, clip bounds, w, ...), then c_0, c_1, ...
    Where d is zero, nothing of g is taken by it, not even an infinity that the clip has tamed; the same holds for ``output_model``.
    ``fastgen.samplers`` fills tables from noise schedules; a solver is nothing more.

    Args:
        sample: x, [N, *], float64, float32, bfloat16 or float16; contiguous and channels-last cost no copy.
        model_output: the shape of ``sample``, any of the four dtypes (conditional, where ``uncond`` is given).
        table: [steps, >= len(COLUMNS) + len(history)], float32 or float64, on the device of ``sample``.
        step: the row, 0 <= step < steps; also the Philox step of the noise drawn from ``seeds``.
        uncond: model output without the condition, for classifier-free guidance.
        history: tensors h_k like ``sample``, most recent first.
        noise: epsilon, given. At most one of ``noise`` and ``seeds``; without either, s is not used.
        seeds: N integers: epsilon is drawn in the kernel, equal to ``philox_normal(seeds, sample.shape, step)``.
        variance: v, like ``sample``: a learned (log-)variance that scales the noise.
        mask, known, known_noise: inpainting; broadcastable to ``sample`` (already of its shape costs no copy). ``mask`` 1 keeps
            x', 0 takes the known image; ``known`` comes with ``mask``, ``known_noise`` is optional.
        return_prediction: also return ``output_sample * x + output_prediction * p + output_model * g``.

    Returns:
        x' in the shape, dtype and layout of ``sample``; with ``return_prediction`` the pair (x', second output). Differentiable in
        sample, model_output, uncond, history, noise, variance, mask, known and known_noise (any number of times).

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape, device or combination does not fit.
        IndexError: ``step`` is past the end of the table.
    """
    if not isinstance(sample, Tensor) or sample.dtype not in _dispatch.KERNEL_DTYPES or sample.dim() < 1:
        _refuse_sample(sample)
    _check_table(table, step, sample, len(history))
    _check_like("model_output", model_output, sample)
    if uncond is not None:
        _check_like("uncond", uncond, sample)
    for k, tensor in enumerate(history):
        _check_like(f"history[{k}]", tensor, sample)
    if noise is not None:
        if seeds is not None:
            fail("sampler_step", "give noise or seeds, not both")
        _check_like("noise", noise, sample)
    if seeds is not None:
        seeds = check_seeds("sampler_step", seeds, sample.device)
        if seeds.shape[0] != sample.shape[0]:
            fail("sampler_step", f"seeds must be one per sample, got {seeds.shape[0]} for {shape_of(sample)}")
        if seeds.device != sample.device:
            fail("sampler_step", f"seeds must be on the device of sample ({sample.device}), got {seeds.device}")
    if variance is not None:
        _check_like("variance", variance, sample)
        if noise is None and seeds is None:
            fail("sampler_step", "variance scales the noise: give noise or seeds with it")
    if (mask is None) != (known is None):
        fail("sampler_step", "mask and known come together")
    if mask is not None and known is not None:
        mask, known = _expand("mask", mask, sample), _expand("known", known, sample)
    if known_noise is not None:
        if mask is None:
            fail("sampler_step", "known_noise comes with mask and known")
        known_noise = _expand("known_noise", known_noise, sample)

    function = _forward
    if torch.is_grad_enabled():
        tensors = (sample, model_output, uncond, noise, variance, mask, known, known_noise, *history)
        if _dispatch.needs_grad(*tensors):
            function = _differentiable
    x_next, prediction = function(
        sample, model_output, table, step, uncond, list(history), noise, seeds, variance, mask, known, known_noise,
        return_prediction,
    )  # fmt: skip
    return (x_next, prediction) if return_prediction else x_next


_forward: Any = torch.ops.fastgen.sampler_step_fwd.default


def _refuse_sample(sample: object) -> NoReturn:
    if not isinstance(sample, Tensor) or not sample.dtype.is_floating_point:
        raise TypeError(f"sampler_step: sample must be a floating-point tensor, got {_kind(sample)}")
    if sample.dim() < 1:
        fail("sampler_step", "sample must be [N, *], got a scalar")
    fail("sampler_step", f"sample must be float64, float32, bfloat16 or float16, got {sample.dtype}")


def _kind(value: object) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


def _check_like(name: str, tensor: Tensor, sample: Tensor) -> None:
    if not isinstance(tensor, Tensor) or not tensor.dtype.is_floating_point:
        raise TypeError(f"sampler_step: {name} must be a floating-point tensor, got {_kind(tensor)}")
    if tensor.shape != sample.shape:
        fail("sampler_step", f"{name} must have the shape of sample {tuple(sample.shape)}, got {shape_of(tensor)}")
    if tensor.device != sample.device:
        fail("sampler_step", f"{name} must be on the device of sample ({sample.device}), got {tensor.device}")


def _expand(name: str, tensor: Tensor, sample: Tensor) -> Tensor:
    if isinstance(tensor, Tensor) and tensor.shape != sample.shape:
        try:
            tensor = tensor.expand(sample.shape)
        except RuntimeError:
            fail("sampler_step", f"{name} must broadcast to {shape_of(sample)} of sample, got {shape_of(tensor)}")
    _check_like(name, tensor, sample)
    return tensor


def _check_table(table: Tensor, step: int, sample: Tensor, num_history: int) -> None:
    if not isinstance(table, Tensor) or table.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"sampler_step: table must be a float32 or float64 tensor, got {_kind(table)}")
    if table.dim() != 2 or table.shape[1] < len(COLUMNS) + num_history:
        fail(
            "sampler_step",
            f"table must be [steps, >= {len(COLUMNS)} + {num_history} of the history], got {shape_of(table)}",
        )
    if table.device != sample.device:
        fail("sampler_step", f"table must be on the device of sample ({sample.device}), got {table.device}")
    if not 0 <= step < table.shape[0]:
        raise IndexError(f"sampler_step: step must be in [0, {table.shape[0]}), got {step}")


def _differentiable(
    sample: Tensor,
    model_output: Tensor,
    table: Tensor,
    step: int,
    uncond: Tensor | None,
    history: list[Tensor],
    noise: Tensor | None,
    seeds: Tensor | None,
    variance: Tensor | None,
    mask: Tensor | None,
    known: Tensor | None,
    known_noise: Tensor | None,
    return_prediction: bool,
) -> tuple[Tensor, Tensor]:
    """The same call as autograd sees it: a Function takes tensors one by one, so the history goes last, spread."""
    tensors = (sample, model_output, uncond, noise, variance, mask, known, known_noise, *history)
    return apply(_SamplerStep, table, step, seeds, return_prediction, *tensors)


def _call(
    function: Any, table: Tensor, step: int, seeds: Tensor | None, return_prediction: bool, tensors: Sequence[Any]
) -> tuple[Tensor, Tensor]:
    sample, model_output, uncond, noise, variance, mask, known, known_noise, *history = tensors
    return function(
        sample, model_output, table, step, uncond, history, noise, seeds, variance, mask, known, known_noise,
        return_prediction,
    )  # fmt: skip


class _SamplerStep(torch.autograd.Function):
    """Forward by the kernel, backward by the vector-Jacobian product of the reference, itself differentiable."""

    @staticmethod
    def forward(
        table: Tensor, step: int, seeds: Tensor | None, return_prediction: bool, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        kernel = torch.ops.fastgen.sampler_step_fwd.default
        return _call(kernel, table, step, seeds, return_prediction, tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        table, ctx.step, seeds, ctx.return_prediction, *tensors = inputs
        ctx.save_for_backward(table, seeds, *tensors)

    @staticmethod
    def backward(ctx: Any, grad_next: Tensor, grad_second: Tensor) -> tuple[Tensor | None, ...]:
        table, seeds, *tensors = ctx.saved_tensors
        present = [i for i, tensor in enumerate(tensors) if tensor is not None and ctx.needs_input_grad[4 + i]]

        def forward(*inputs: Tensor) -> tuple[Tensor, Tensor]:
            given = dict(zip(present, inputs, strict=True))
            full = [given.get(i, tensor) for i, tensor in enumerate(tensors)]
            return _call(_reference.sampler_step_fwd, table, ctx.step, seeds, ctx.return_prediction, full)

        vjp: Any = torch.func.vjp(forward, *(tensors[i] for i in present))[1]
        grads = dict(zip(present, vjp((grad_next, grad_second)), strict=True))
        return None, None, None, None, *(grads.get(i) for i in range(len(tensors)))
