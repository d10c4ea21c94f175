"""`masked_linear`: the linear of a masked autoencoder (MADE), and a whole network of such linears by a program."""

import itertools
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import _dispatch, _library
from ..reference import masked_linear as reference
from ..reference._layout import opmath_dtype
from . import _packed_weights
from ._autograd import apply
from ._check import check_floating, check_main, fail, kind_of, refuse_gradient, shape_of
from ._dtypes import foreign, in_float32
from ._masked_network import Layer, NetworkProgram, network_program, pack_units, pack_weights
from ._packed_weights import WEIGHTS, Seen
from ._watchers import autocast_active, in_autocast_dtype, profiler_active, watched

# Variants of which our product of packed, sorted weights is faster than the library's of masked ones, where at least this share
# of the weights is hidden: 1.5 to 2 times on an EPYC with AVX-512, inference, 256 x 512 x 512 to 4096 x 512 x 512.
PACKED: frozenset[str] = frozenset({"avx2", "avx512", "avx512_bf16", "amx"})
LEAST_HIDDEN, LEAST_WEIGHTS = 0.25, 2**15
PACKED_LINES = 16  # rows of a weight that are transposed at a time
# Of a weight's gradient over fewer samples the library's product is faster, all of it and then a mask: on a Xeon 2.5 ms beside
# 2.6 for 256 x 1024 x 1024, 0.51 beside 0.56 for 256 x 512 x 512, and 8.6 beside 8.4 for 4096 x 512 x 512.
MANY_SAMPLES = 1024
_WORDS = {torch.float32: torch.int32, torch.float64: torch.int64}


def masked_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    in_degrees: Tensor | None = None,
    out_degrees: Tensor | None = None,
    strict: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    r"""A linear of which a mask hides weights.

    .. math:: y_o = bias_o + \sum_i [mask_{oi}]\, weight_{oi}\, input_i, \qquad mask_{oi} = (d^{out}_o \ge d^{in}_i)

    On the CPU, without gradients, the weights are packed with units sorted by what they see, so that the masked half is not
    computed; they are kept until the weight or the mask changes, as those of :func:`fastgen.ops.conv2d` and under the same limit of
    memory. Whatever stands in the weight where the mask hides it has no part in the output, NaN included.

    Args:
        input: [*, C]; float64, float32, bfloat16 or float16.
        weight: [O, C].
        bias: [O].
        in_degrees: [C] integers, the degree of each input; with ``out_degrees`` they say what the mask is.
        out_degrees: [O] integers.
        strict: whether an output sees only inputs of smaller degree, as the last layer of a MADE does, or of its own too.
        mask: [O, C] boolean, in place of the degrees: True where the weight counts. Kept by the caller, so that what is made of it
            is.

    Returns:
        [*, O] in the dtype of ``input``, or of autocast. Differentiable once in ``input``, ``weight`` and ``bias``; the gradient of
        the weight is 0 where it is hidden.

    Raises:
        TypeError: an argument is no tensor, or not of its kind of dtype.
        ValueError: a shape or a device does not fit, or both or neither of mask and degrees are given; the message names it.

    Source: Germain et al., "MADE: Masked Autoencoder for Distribution Estimation", ICML 2015.
    """
    op = "masked_linear"
    check_main(op, "input", input)
    check_floating(op, "weight", weight)
    if weight.dim() != 2 or weight.shape[1] != input.shape[-1]:
        fail(op, f"weight must be [O, C] with C = {input.shape[-1]}, got {shape_of(weight)}")
    if bias is not None:
        check_floating(op, "bias", bias)
        if bias.shape != weight.shape[:1]:
            fail(op, f"bias must be [O] with O = {weight.shape[0]}, got {shape_of(bias)}")
    given = _mask(op, weight, in_degrees, out_degrees, strict, mask)
    for name, tensor in (("weight", weight), ("bias", bias), ("mask", given)):
        if tensor is not None and tensor.device != input.device:
            fail(op, f"{name} must be on the device of input ({input.device}), got {tensor.device}")
    rows = input.reshape(-1, input.shape[-1])
    if autocast_active(input.device):
        rows, weight = in_autocast_dtype(rows), in_autocast_dtype(weight)
        bias = None if bias is None else in_autocast_dtype(bias)
        with torch.autocast(input.device.type, enabled=False):
            output = _typed(rows, weight, bias, given)
    else:
        output = _typed(rows, weight, bias, given)
    return output if input.dim() == 2 else output.unflatten(0, input.shape[:-1]) if input.dim() > 1 else output[0]


def masked_linear_fits(weight: Tensor) -> bool:
    """Whether the op is faster than a product with ``weight`` masked at each call: on a CPU only from so many weights on."""
    return weight.numel() >= LEAST_WEIGHTS or not weight.is_cpu


def masked_linear_network(
    input: Tensor,
    program: Tensor,
    weights: Tensor,
    parameters: Tensor,
    constants: Tensor | None = None,
    *,
    outputs: int,
) -> Tensor:
    """The outputs of a network of masked linears, all layers in one: what is between them never leaves the cache.

    ``fastgen.flows`` makes the program, weights and parameters of a MADE.

    Args:
        input: [N, D].
        program: int64, on the device of ``input``.
        weights: packed, float32 or float64, which is the dtype of the arithmetic.
        parameters: biases, in the dtype of ``weights``.
        constants: [N, C] in the dtype of ``weights``: what layers add or multiply by, such as what they make of a context.
        outputs: how many the program makes.

    Returns:
        [N, outputs] in the dtype of ``input``. No gradients.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape or device does not fit, an argument requires a gradient, or the program is none.
    """
    op = "masked_linear_network"
    check_main(op, "input", input)
    if input.dim() != 2:
        fail(op, f"input must be [N, D], got {shape_of(input)}")
    for name, tensor in (("input", input), ("weights", weights), ("parameters", parameters), ("constants", constants)):
        if tensor is not None:
            check_floating(op, name, tensor)
            refuse_gradient(op, name, tensor)
    if not isinstance(program, Tensor) or program.dtype != torch.int64:
        raise TypeError(f"{op}: program must be an int64 tensor, got {kind_of(program)}")
    return _network(input, program, weights, parameters, constants, outputs)


def masked_linear_network_fits(input: Tensor) -> bool:
    """Whether a network is faster by :func:`masked_linear_network` than layer by layer: where kernels are loaded for ``input``."""
    return input.is_cpu and _library.ISA in PACKED and input.dtype in _dispatch.KERNEL_DTYPES


def _network(*args: Any) -> Tensor:
    """The raw op, whose complaints of its arguments are those of the public one."""
    function: Any = torch.ops.fastgen.masked_linear_network.default
    if torch.compiler.is_compiling():
        return function(*args)
    try:
        return function(*args)
    except RuntimeError as error:
        message = str(error).splitlines()[0]
        if not message.startswith("masked_linear_network: "):
            raise
        raise ValueError(message) from None


def _mask(
    op: str, weight: Tensor, in_degrees: Tensor | None, out_degrees: Tensor | None, strict: bool, mask: Tensor | None
) -> Tensor:
    if mask is not None:
        if in_degrees is not None or out_degrees is not None:
            fail(op, "mask stands in place of in_degrees and out_degrees: give one of them")
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"{op}: mask must be a boolean tensor, got {kind_of(mask)}")
        if mask.shape != weight.shape:
            fail(op, f"mask must have the shape of weight {tuple(weight.shape)}, got {shape_of(mask)}")
        return mask
    if in_degrees is None or out_degrees is None:
        fail(op, "in_degrees and out_degrees, or a mask, must say what an output sees")
    for name, degrees, count in (
        ("in_degrees", in_degrees, weight.shape[1]),
        ("out_degrees", out_degrees, weight.shape[0]),
    ):
        if not isinstance(degrees, Tensor) or degrees.is_floating_point() or degrees.is_complex():
            raise TypeError(f"{op}: {name} must be a tensor of integers, got {kind_of(degrees)}")
        if degrees.shape != (count,):
            fail(op, f"{name} must be [{count}], got {shape_of(degrees)}")
        if degrees.device != weight.device:
            fail(op, f"{name} must be on the device of weight ({weight.device}), got {degrees.device}")
    return degree_mask(in_degrees, out_degrees, strict)


_OF_DEGREES: dict[tuple[bytes, bytes, bool], Tensor] = {}  # the masks of the last calls with degrees on the CPU
_KEPT_MASKS = 32


def degree_mask(in_degrees: Tensor, out_degrees: Tensor, strict: bool) -> Tensor:
    """[O, C]: where an output sees an input. The same tensor for the same degrees, on the CPU, so that plans are found again."""

    def make() -> Tensor:
        outs, ins = out_degrees[:, None], in_degrees[None]
        return outs > ins if strict else outs >= ins

    if not in_degrees.is_cpu or watched():
        return make()
    key = (in_degrees.long().numpy().tobytes(), out_degrees.long().numpy().tobytes(), strict)
    mask = _OF_DEGREES.get(key)
    if mask is None:
        if len(_OF_DEGREES) >= _KEPT_MASKS:
            _OF_DEGREES.pop(next(iter(_OF_DEGREES)))
        mask = _OF_DEGREES[key] = make()
    return mask


def _typed(input: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor) -> Tensor:
    if foreign(input, weight, bias):
        return in_float32("masked_linear", _call, input.dtype)(input, weight, bias, mask)
    return _call(input, weight, bias, mask)


def _call(input: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor) -> Tensor:
    if _dispatch.needs_grad(input, weight, bias):
        output: Tensor = apply(_MaskedLinear, input, weight, bias, mask)
        return output
    return torch.ops.fastgen.masked_linear_fwd.default(input, weight, bias, mask)


class _MaskedLinear(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Tensor:
        if _at_once(*args):
            return _forward(*args, keep=False)  # the next step changes the weight
        output: Tensor = torch.ops.fastgen.masked_linear_fwd.default(*args)
        return output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, weight, bias, mask = inputs
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(input, weight, mask)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, mask = ctx.saved_tensors
        in_input, in_weight, in_bias = ctx.needs_input_grad[:3]
        by_input, by_weight = None, None
        if in_input or in_weight:
            call = _backward if _at_once(grad_output, input, weight) else torch.ops.fastgen.masked_linear_bwd.default
            by_input, by_weight = call(grad_output, input, weight, mask, in_input, in_weight)
        by_bias = grad_output.sum(0, dtype=ctx.bias_dtype) if in_bias else None
        return by_input if in_input else None, by_weight if in_weight else None, by_bias, None


# ---- packed weights on the CPU -------------------------------------------------------------------------------------------------


class _Plan(NamedTuple):
    """What is made of a mask: programs of y = W x and of its transpose, and a name for what is packed by them."""

    serial: int
    forward: NetworkProgram
    backward: NetworkProgram
    rows: Tensor  # of masked_linear_weight_bwd
    columns: Tensor
    known: Tensor
    hidden: float  # share of the weights that is not stored
    bits: dict[torch.dtype, Tensor]  # the mask as words, all bits of what is shown, by the dtype they are laid over


_PLANS: dict[int, tuple[Seen, _Plan]] = {}  # id of the mask
_SERIALS = itertools.count()


def _plan(mask: Tensor) -> _Plan:
    kept = _PLANS.get(id(mask))
    if kept is not None and kept[0].fits(mask):
        return kept[1]
    key = id(mask)

    def died(reference: "weakref.ref[Tensor]") -> None:
        entry = _PLANS.get(key)
        if entry is not None and entry[0].weight is reference:
            _PLANS.pop(key, None)

    seen = Seen(mask, died)
    forward, backward = (
        network_program([Layer(m, bias=biased)], m.shape[1], 1, None, stepwise=False)
        for m, biased in ((mask, True), (mask.T, False))
    )
    index, outputs = (
        backward.gather[0],
        max(mask.shape[0], 1),
    )  # into the transposed weight; the weight itself is gathered from
    transposed = index % outputs * mask.shape[1] + torch.div(index, outputs, rounding_mode="floor")
    backward = backward._replace(gather=[torch.where(index < 0, -1, transposed).to(torch.int32)])
    stored = sum(index.numel() for index in forward.gather)
    rows, columns = forward.units[0], torch.tensor(forward.levels[0], dtype=torch.int64)
    reads = mask[rows][:, columns] * torch.arange(1, mask.shape[1] + 1)
    known = reads.amax(1) if mask.shape[1] else reads.sum(1)
    plan = _Plan(next(_SERIALS), forward, backward, rows, columns, known, 1 - stored / max(mask.numel(), 1), {})
    _PLANS[key] = (seen, plan)
    return plan


def _kept(weight: Tensor, purpose: tuple[Any, ...], make: Any) -> Tensor:
    if _packed_weights.reasons(weight):
        made: Tensor = make(weight)
        return made
    found = WEIGHTS.find(weight).get(purpose)
    return found if found is not None else WEIGHTS.make(weight, purpose, make)


def _planned(input: Tensor, weight: Tensor, mask: Tensor) -> _Plan | None:
    """The plan, where our products are faster than the library's."""
    if _library.ISA not in PACKED or weight.numel() < LEAST_WEIGHTS or not input.numel():
        return None
    plan = _plan(mask)
    return plan if plan.hidden >= LEAST_HIDDEN else None


def _at_once(*tensors: Tensor | None) -> bool:
    """Whether a step of training may leave the dispatcher out, which with a second check costs what a small product does."""
    if _library.ISA is None or watched() or profiler_active():
        return False
    return all(t is None or (type(t) in (Tensor, nn.Parameter) and t.is_cpu) for t in tensors)


def _masked_linear_fwd(input: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor) -> Tensor:
    """The raw op on the CPU."""
    reference.masked_linear_fwd_check(input, weight, bias, mask)
    return _forward(input, weight, bias, mask, keep=True)


def _forward(input: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, *, keep: bool) -> Tensor:
    plan = _planned(input, weight, mask)
    if plan is None:
        return reference.masked_linear_fwd(input, weight, bias, mask)
    wide = opmath_dtype(input.dtype)
    purpose = ("masked_linear", plan.serial, wide)
    if keep:
        packed = _kept(weight, purpose, lambda w: pack_weights(plan.forward, [w], wide))
    else:
        packed = pack_weights(plan.forward, [weight], wide)
    if bias is None:
        biases = input.new_zeros(weight.shape[0], dtype=wide)
    elif not keep:
        biases = pack_units(plan.forward, [bias], wide, bias.device)
    else:
        biases = _kept(bias, purpose, lambda b: pack_units(plan.forward, [b], wide, b.device))
    program = plan.forward.program
    return torch.ops.fastgen.masked_linear_network.default(input, program, packed, biases, None, weight.shape[0])


def _masked_linear_bwd(
    grad_output: Tensor, input: Tensor, weight: Tensor, mask: Tensor, wants_input: bool, wants_weight: bool
) -> tuple[Tensor, Tensor]:
    """The raw op on the CPU."""
    args = (grad_output, input, weight, mask, wants_input, wants_weight)
    reference.masked_linear_bwd_check(*args)
    return _backward(*args)


def _backward(
    grad_output: Tensor, input: Tensor, weight: Tensor, mask: Tensor, wants_input: bool, wants_weight: bool
) -> tuple[Tensor, Tensor]:
    """The weights are packed anew: a step of training changes them."""
    args = (grad_output, input, weight, mask, wants_input, wants_weight)
    plan = _planned(input, weight, mask)
    if plan is None:
        return reference.masked_linear_bwd(*args)
    grad, wide = grad_output.to(input.dtype), opmath_dtype(input.dtype)
    by_input, by_weight = input.new_empty(0), weight.new_empty(0)
    ops: Any = torch.ops.fastgen
    if wants_input:
        packed, nothing = (
            pack_weights(plan.backward, [weight], wide, block=PACKED_LINES),
            input.new_empty(0, dtype=wide),
        )
        program = plan.backward.program
        by_input = ops.masked_linear_network.default(grad, program, packed, nothing, None, input.shape[1])
    if wants_weight and input.shape[0] < MANY_SAMPLES:
        by_weight = torch.mm(grad.to(wide).t(), input.to(wide))
        bits = plan.bits.get(wide)
        if bits is None:
            bits = plan.bits[wide] = -mask.to(_WORDS[wide])
        by_weight.view(_WORDS[wide]).bitwise_and_(bits)
    elif wants_weight:
        by_weight = ops.masked_linear_weight_bwd.default(grad, input, mask, plan.rows, plan.columns, plan.known)
    return by_input, by_weight.to(weight.dtype)


if _library.ISA is not None:  # where no kernel is loaded the reference answers
    _library.implement("masked_linear_fwd", _masked_linear_fwd)
    _library.implement("masked_linear_bwd", _masked_linear_bwd)
