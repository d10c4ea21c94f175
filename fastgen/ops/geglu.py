"""`geglu`: the gated linear unit of a transformer's feed-forward, its linear, GELU and product in one."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _dispatch, _library
from .._schema import GELU_APPROXIMATIONS
from ..reference import geglu as reference
from . import _packed_weights
from ._autograd import apply
from ._check import check_floating, check_main, fail, shape_of
from ._dtypes import foreign, in_float32
from ._packed_weights import WEIGHTS
from ._watchers import autocast_active, watched

_CODE = {name: code for code, name in enumerate(GELU_APPROXIMATIONS)}
_PURPOSE, _DIRECT = "geglu", "geglu, direct"

# Variant -> the dtypes in which our product, in fp32 from packed weights, is faster than the library's of any size. avx2: EPYC 7xx3
# (Zen 3), where torch's bf16 takes six times as long as fp32. avx512 to amx: a Xeon with AMX, whose library was told to use no more
# than the variant does (1.05 to 1.3 times as fast in fp32 by avx512, 1.0 to 1.15 in fp16 by amx). In bf16 by avx512_bf16 ours is
# 1.7 times as fast there, but the library of an EPYC twice as fast as ours: left to it. What fusing can win is bounded by the
# product: with nothing after it eager torch takes 1.05 to 1.38 times as long as that in fp32 (a Xeon, 256 to 8,192 rows).
PACKED: dict[str, frozenset[torch.dtype]] = {
    "portable": frozenset(),
    "avx2": frozenset({torch.float32, torch.bfloat16, torch.float16}),
    "avx512": frozenset({torch.float32, torch.bfloat16, torch.float16}),
    "avx512_bf16": frozenset({torch.float16}),
    "amx": frozenset({torch.bfloat16, torch.float16}),
}
# Variants with a matrix unit, whose tiles of bfloat16 take that dtype.
TILED = frozenset({"amx"})


class GegluPlan(NamedTuple):
    """How :func:`fastgen.ops.geglu` computes a call: whether with ``packed`` weights, the ``reason``, in words, and their bytes."""

    packed: bool
    reason: str
    weight_bytes: int


def geglu(input: Tensor, weight: Tensor, bias: Tensor | None = None, *, approximate: str = "none") -> Tensor:
    r"""The GELU-gated linear unit with its linear.

    .. math:: output = h \cdot \mathrm{gelu}(gate), \quad (h, gate) = input\,weight^T + bias

    On the CPU, without gradients, the product is fused with what follows, so that the whole [*, 2 D] is never in memory: by weights
    packed in fp32, in bfloat16 where the processor has matrix tiles (AMX) by those, or by the library some rows at a time,
    whichever a table says is faster; :func:`geglu_plan` says which, and why. Packed weights are kept as those of
    :func:`fastgen.ops.conv2d`, under the same limit of memory. With gradients, under
    autocast and on a GPU the linear is the library's and the rest one kernel, forward and backward.

    Args:
        input: [*, C]; float64, float32, bfloat16 or float16.
        weight: [2 D, C]: the rows of h, then those of the gate, as diffusers has them; taken to the dtype of ``input``.
        bias: [2 D].
        approximate: ``"none"`` for GELU by the normal distribution, ``"tanh"`` for what `torch.nn.functional.gelu` calls so.

    Returns:
        [*, D] in the dtype of ``input``, or of autocast, contiguous. Differentiable once in every tensor argument.

    Raises:
        TypeError: an argument is no tensor, or not of a floating-point dtype.
        ValueError: a shape, a device or ``approximate`` does not fit; the message names the argument.

    Sources: Shazeer, "GLU Variants Improve Transformer", 2020; Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016.
    """
    code = _CODE.get(approximate)
    if code is None:
        fail("geglu", f"approximate must be one of {GELU_APPROXIMATIONS}, got {approximate!r}")
    _check(input, weight, bias)
    function: Any = in_float32("geglu", _call, input.dtype) if foreign(input, weight, bias) else _call
    output = function(input.reshape(-1, input.shape[-1]), weight, bias, code)
    return output if input.dim() == 2 else output.unflatten(0, input.shape[:-1]) if input.dim() > 1 else output[0]


def geglu_plan(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> GegluPlan:
    """How :func:`geglu` computes a call, as things are now (gradients, autocast, memory), and why.

    Raises:
        TypeError, ValueError: as :func:`geglu`.
    """
    _check(input, weight, bias)
    if why := _watched(input, weight, bias):
        return GegluPlan(False, why, 0)
    return _choose(input, weight, _purpose(input) in WEIGHTS.find(weight))


def _check(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_main("geglu", "input", input)
    check_floating("geglu", "weight", weight)
    if weight.dim() != 2 or weight.shape[1] != input.shape[-1] or weight.shape[0] % 2 or 0 in weight.shape:
        fail("geglu", f"weight must be [2 D, C], not empty, got {shape_of(weight)} with input of {shape_of(input)}")
    if bias is not None:
        check_floating("geglu", "bias", bias)
        if bias.shape != weight.shape[:1]:
            fail("geglu", f"bias must be [2 D] = {tuple(weight.shape[:1])}, got {shape_of(bias)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.device != input.device:
            fail("geglu", f"{name} must be on the device of input ({input.device}), got {tensor.device}")


def _call(input: Tensor, weight: Tensor, bias: Tensor | None, code: int) -> Tensor:
    """Of [M, C], by the raw op, or by the library's linear and the gate where autograd or autocast must see them."""
    if _watched(input, weight, bias):
        if not autocast_active(input.device):
            weight, bias = _in_dtype(input, weight, bias)
        return apply(_Gate, F.linear(input, weight, bias), code)
    if input.is_cpu and _library.ISA is not None and not watched():
        return _compute(input, weight, bias, code)
    return torch.ops.fastgen.geglu_fwd.default(input, weight, bias, code)


def _watched(input: Tensor, weight: Tensor, bias: Tensor | None) -> str:
    """Why the linear must be the library's; empty where neither autograd nor autocast must see the call."""
    if autocast_active(input.device):
        return "autocast chooses the dtypes of the library's linear"
    return "gradients go through the library's linear" if _dispatch.needs_grad(input, weight, bias) else ""


def _in_dtype(input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return weight.to(input.dtype), None if bias is None else bias.to(input.dtype)


def _purpose(input: Tensor) -> str:
    """What weights are packed for, if they are."""
    return _DIRECT if input.dtype == torch.bfloat16 and _library.ISA in TILED else _PURPOSE


def _choose(input: Tensor, weight: Tensor, kept: bool) -> GegluPlan:
    """``kept``: whether the packed weights are there."""
    isa = _library.ISA or "no"
    if input.dtype not in PACKED.get(isa, ()):
        return GegluPlan(False, f"the library's product of {input.dtype} is faster, by the table of {isa} kernels", 0)
    if unkept := _packed_weights.reasons(weight):
        return GegluPlan(False, unkept[0], 0)
    features, channels, tiled = weight.shape[0] // 2, weight.shape[1], _purpose(input) == _DIRECT
    size = 2 * -(-features // reference.PANEL) * reference.PANEL
    size *= 2 * -(-channels // reference.BLOCK) * reference.BLOCK if tiled else 4 * channels
    if not kept and size > WEIGHTS.limit - WEIGHTS.bytes:
        return GegluPlan(False, f"the packed weights ({size / 2**20:.1f} MiB) are past the memory limit", 0)
    way = "matrix tiles of bfloat16 are" if tiled else "our product is"
    return GegluPlan(True, f"{way} faster, by the table", size)


def _compute(input: Tensor, weight: Tensor, bias: Tensor | None, code: int) -> Tensor:
    """By the plan, made at each call, so that a compiled graph follows the weight."""
    purpose = _purpose(input)
    packed = WEIGHTS.find(weight).get(purpose)
    if not _choose(input, weight, packed is not None).packed:
        return torch.ops.fastgen.geglu_chunked.default(input, *_in_dtype(input, weight, bias), code)
    ops, tiled = torch.ops.fastgen, purpose == _DIRECT
    if packed is None:
        packed = WEIGHTS.make(weight, purpose, ops.geglu_direct_pack.default if tiled else ops.geglu_pack.default)
    run = ops.geglu_direct.default if tiled else ops.geglu_packed.default
    return run(input, packed, weight.shape[0] // 2, bias, code)


def _geglu_fwd(input: Tensor, weight: Tensor, bias: Tensor | None, approximate: int) -> Tensor:
    """The raw op on the CPU."""
    reference.geglu_fwd_check(input, weight, bias, approximate)
    return _compute(input, weight, bias, approximate)


if _library.ISA is not None:  # where no kernel is loaded the reference answers
    _library.implement("geglu_fwd", _geglu_fwd)


class _Gate(torch.autograd.Function):
    """h * gelu(gate) of [M, 2 D], which alone is kept for the backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(projected: Tensor, code: int) -> Tensor:
        return torch.ops.fastgen.geglu_gate.default(projected, code)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        projected, ctx.code = inputs
        ctx.save_for_backward(projected)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        (projected,) = ctx.saved_tensors
        return torch.ops.fastgen.geglu_gate_bwd.default(grad_output, projected, ctx.code), None
