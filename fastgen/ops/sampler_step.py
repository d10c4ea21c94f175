"""`sampler_step`: one step of any diffusion sampler, as one row of a coefficient table, in one pass over memory."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _dispatch
from .._schema import COLUMNS
from ..reference import sampler_step as _reference
from ._autograd import apply
from ._check import TABLE_DTYPES, check_floating, check_like, check_main, check_seeds, fail, kind_of, shape_of
from ._dtypes import foreign, in_float32
from ._watchers import transforms_active

__all__ = ["sampler_step"]


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
    threshold: Tensor | None = None,
    return_prediction: bool = False,
    return_corrected: bool = False,
    out: Tensor | Sequence[Tensor] | None = None,
) -> Tensor | tuple[Tensor, ...]:
    r"""Apply row ``step`` of a coefficient table to ``sample``.

    .. math::
        g &= uncond + w\,(model - uncond) \quad\text{(or the model output itself)} \\
        p &= \mathrm{clip}\big((p_x\,x + p_g\,g) / threshold\big) \\
        x' &= a\,x + b\,p + d\,g + \sum_k c_k h_k + s\,e^{l + m v}\,\varepsilon \\
        x' &\leftarrow mask\,x' + (1 - mask)(k\,known + k_\varepsilon\,known\_noise)

    The coefficients are those of :data:`COLUMNS` (in that order: a, b, d, s, p_x, p_g, clip bounds, w, ...), then c_0, c_1, ...
    Where d is zero, nothing of g is taken by it, not even an infinity that the clip has tamed; the same holds for ``output_model``.
    ``fastgen.samplers`` fills tables from noise schedules; a solver is nothing more.

    Args:
        sample: x, [N, *], float64, float32, bfloat16 or float16 (others: float32 copies); contiguous and channels-last cost
            no other copy.
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
        threshold: [N], divides the prediction of each sample before the clip: dynamic thresholding (Saharia et al. 2022).
        return_prediction: also return ``output_sample * x + output_prediction * p + output_model * g``.
        return_corrected: also return what a predictor-corrector starts its next step from, ``corrected_sample * x +
            corrected_prediction * p + corrected_model * g + sum_k e_k h_k``; the columns e_0, e_1, ... follow c_0, c_1, ...
        out: where to write, as many tensors as are returned, shape and dtype of ``sample``. One may hold the very elements of
            ``sample``, ``model_output`` or ``uncond``, which are read before they are written over; otherwise none may
            overlap an argument, another of them or itself (from its first address to its last). For loops without gradients:
            fresh memory of the size of a batch costs more than the step.

    Returns:
        x' in the shape, dtype and layout of ``sample``, or a tuple of it and the outputs asked for. Differentiable in sample,
        model_output, uncond, history, noise, variance, mask, known and known_noise (any number of times). Under ``torch.vmap``
        the kernel runs once a slice: put what can be a batch into the batch.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape, device or combination does not fit.
        IndexError: ``step`` is past the end of the table.
        RuntimeError: one of ``out`` overlaps what it must not.
    """
    check_main("sampler_step", "sample", sample)
    _check_table(table, step, sample, 2 * len(history) if return_corrected else len(history))
    check_like("sampler_step", "model_output", model_output, sample, "sample")
    if uncond is not None:
        check_like("sampler_step", "uncond", uncond, sample, "sample")
    for k, tensor in enumerate(history):
        check_like("sampler_step", f"history[{k}]", tensor, sample, "sample")
    if noise is not None:
        if seeds is not None:
            fail("sampler_step", "give noise or seeds, not both")
        check_like("sampler_step", "noise", noise, sample, "sample")
    if seeds is not None:
        seeds = check_seeds("sampler_step", seeds, sample.device)
        if seeds.shape[0] != sample.shape[0]:
            fail("sampler_step", f"seeds must be one per sample, got {seeds.shape[0]} for {shape_of(sample)}")
        if seeds.device != sample.device:
            fail("sampler_step", f"seeds must be on the device of sample ({sample.device}), got {seeds.device}")
    if variance is not None:
        check_like("sampler_step", "variance", variance, sample, "sample")
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

    if threshold is not None:
        _check_threshold(threshold, sample)
    inputs = (
        sample, model_output, table, step, uncond, list(history), noise, seeds, variance, mask, known, known_noise, threshold,
    )  # fmt: skip
    tensors = (sample, model_output, uncond, noise, variance, mask, known, known_noise, *history)
    differentiable = torch.is_grad_enabled() and _dispatch.needs_grad(*tensors)
    function = _differentiable if differentiable else _forward
    if foreign(*tensors, threshold):
        function = in_float32("sampler_step", function, sample.dtype)
    if out is not None:
        if differentiable:
            raise ValueError("sampler_step: out= has no gradient: call it under torch.no_grad()")
        return _into(out, function, inputs, return_prediction, return_corrected)
    x_next, prediction, corrected = function(*inputs, return_prediction, return_corrected)
    if not (return_prediction or return_corrected):
        return x_next
    return (x_next, *((prediction,) if return_prediction else ()), *((corrected,) if return_corrected else ()))


def _into(
    out: Tensor | Sequence[Tensor],
    function: Any,
    inputs: tuple[Any, ...],
    return_prediction: bool,
    return_corrected: bool,
) -> Tensor | tuple[Tensor, ...]:
    """The call with ``out``; by copies of what ``function`` returns under the compiler and the transforms of `torch.func`, which
    want no side effects, and where that is not the kernel itself."""
    sample = inputs[0]
    targets = (out,) if isinstance(out, Tensor) else tuple(out)
    wanted = 1 + return_prediction + return_corrected
    if len(targets) != wanted:
        fail("sampler_step", f"out must be {wanted} tensors, as many as are returned, got {len(targets)}")
    for i, target in enumerate(targets):
        check_like("sampler_step", f"out[{i}]", target, sample, "sample")
        if target.dtype != sample.dtype:
            raise TypeError(
                f"sampler_step: out[{i}] must have the dtype of sample ({sample.dtype}), got {target.dtype}"
            )
    prediction = targets[1] if return_prediction else None
    corrected = targets[-1] if return_corrected else None
    traced = torch.compiler.is_compiling() or transforms_active()
    if not traced and (function is not _forward or not sample.is_cpu):  # the CPU kernel asks by itself
        _reference.refuse_shared_memory(*inputs, targets[0], prediction, corrected)
    if traced or function is not _forward:
        results = function(*inputs, return_prediction, return_corrected)
        for written, result in zip((targets[0], prediction, corrected), results, strict=True):
            if written is not None:
                written.copy_(result)
    else:
        torch.ops.fastgen.sampler_step_out.default(*inputs, targets[0], prediction, corrected)
    return targets[0] if wanted == 1 else targets


_forward: Any = torch.ops.fastgen.sampler_step_fwd.default


def _expand(name: str, tensor: Tensor, sample: Tensor) -> Tensor:
    if isinstance(tensor, Tensor) and tensor.shape != sample.shape:
        try:
            tensor = tensor.expand(sample.shape)
        except RuntimeError:
            fail("sampler_step", f"{name} must broadcast to {shape_of(sample)} of sample, got {shape_of(tensor)}")
    check_like("sampler_step", name, tensor, sample, "sample")
    return tensor


def _check_threshold(threshold: Tensor, sample: Tensor) -> None:
    check_floating("sampler_step", "threshold", threshold)
    if threshold.shape != sample.shape[:1]:
        fail("sampler_step", f"threshold must be one per sample ({sample.shape[0]}), got {shape_of(threshold)}")
    if threshold.device != sample.device:
        fail("sampler_step", f"threshold must be on the device of sample ({sample.device}), got {threshold.device}")


def _check_table(table: Tensor, step: int, sample: Tensor, num_history: int) -> None:
    if not isinstance(table, Tensor) or table.dtype not in TABLE_DTYPES:
        raise TypeError(f"sampler_step: table must be a float32 or float64 tensor, got {kind_of(table)}")
    shape = table.shape
    if len(shape) != 2 or shape[1] < len(COLUMNS) + num_history:
        fail(
            "sampler_step",
            f"table must be [steps, >= {len(COLUMNS)} + {num_history} of the history], got {shape_of(table)}",
        )
    if table.device != sample.device:
        fail("sampler_step", f"table must be on the device of sample ({sample.device}), got {table.device}")
    if not 0 <= step < shape[0]:
        raise IndexError(f"sampler_step: step must be in [0, {shape[0]}), got {step}")


def _differentiable(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The same call as autograd sees it: a Function takes tensors one by one, so the history goes last, spread."""
    (
        sample,
        model,
        table,
        step,
        uncond,
        history,
        noise,
        seeds,
        variance,
        mask,
        known,
        known_noise,
        threshold,
        *wanted,
    ) = args
    tensors = (sample, model, uncond, noise, variance, mask, known, known_noise, *history)
    return apply(_SamplerStep, table, step, seeds, threshold, *wanted, *tensors)


def _call(function: Any, fixed: Sequence[Any], tensors: Sequence[Any]) -> tuple[Tensor, Tensor, Tensor]:
    """``function`` in the order of the schema; ``fixed`` and ``tensors`` as :class:`_SamplerStep` takes them."""
    table, step, seeds, threshold, *wanted = fixed
    sample, model, uncond, noise, variance, mask, known, known_noise, *history = tensors
    return function(
        sample,
        model,
        table,
        step,
        uncond,
        history,
        noise,
        seeds,
        variance,
        mask,
        known,
        known_noise,
        threshold,
        *wanted,
    )


_FIXED = 6  # arguments of _SamplerStep without gradient, before the tensors


class _SamplerStep(torch.autograd.Function):
    """Forward by the kernel, backward by the vector-Jacobian product of the reference, itself differentiable."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _call(_forward, args[:_FIXED], args[_FIXED:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        table, ctx.step, seeds, threshold, *ctx.wanted = inputs[:_FIXED]
        ctx.save_for_backward(table, seeds, threshold, *inputs[_FIXED:])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        table, seeds, threshold, *tensors = ctx.saved_tensors
        present = [i for i, t in enumerate(tensors) if t is not None and ctx.needs_input_grad[_FIXED + i]]

        def forward(*inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            given = dict(zip(present, inputs, strict=True))
            full = [given.get(i, tensor) for i, tensor in enumerate(tensors)]
            return _call(_reference.sampler_step_fwd, (table, ctx.step, seeds, threshold, *ctx.wanted), full)

        vjp: Any = torch.func.vjp(forward, *(tensors[i] for i in present))[1]
        grads = dict(zip(present, vjp(grad_outputs), strict=True))
        return (None,) * _FIXED + tuple(grads.get(i) for i in range(len(tensors)))
