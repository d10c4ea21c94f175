"""`causal_transformer_inverse`: the inverse of an autoregressive affine map whose parameters a causal transformer gives."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..reference.causal_transformer_inverse import pack
from . import _packed_weights
from ._check import check_floating, fail, kind_of, refuse_gradient, shape_of
from ._dtypes import foreign, in_float32
from ._packed_weights import WEIGHTS

_OP = "causal_transformer_inverse"


def causal_transformer_inverse(
    input: Tensor,
    position: Tensor,
    weights: Sequence[Tensor],
    parameters: Sequence[Tensor],
    *,
    heads: int,
    condition: Tensor | None = None,
    unconditional: Tensor | None = None,
    guidance: Tensor | None = None,
    unconditional_temperature: float = 1.0,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    r"""The inverse of one block of a transformer autoregressive flow, token after token.

    .. math:: x_0 = z_0, \quad x_{t+1} = z_{t+1} \odot e^{a_t} + b_t, \qquad (a_t, b_t) = \mathrm{transformer}(x_0, \dots, x_t)_t

    The transformer adds ``position`` and ``condition`` to a linear of the token; a layer is h + projection(attention(norm(h))),
    then h + down(gelu(up(norm(h)))). Keys and values are written to memory taken once, so nothing of an earlier token is computed
    or copied again. On the CPU one call does all tokens, layer norm to affine map, from packed weights, which are kept as those of
    :func:`fastgen.ops.conv2d`; elsewhere plain torch answers.

    With ``guidance`` the same runs with ``unconditional`` in the place of ``condition``, with keys and values of its own, and
    (a, b) + w (a - a', b - b') is taken for (a, b).

    Args:
        input: z, [N, T, D] in the order of turn; float64, float32, bfloat16 or float16. All is computed in float32, or in float64.
        position: [T, C].
        weights: 2 + 4 L matrices: in [C, D]; then of each layer qkv [3 C, C], the rows of all queries first, projection [C, C],
            up [H, C] and down [C, H]; out [2 D, C], the rows of a first, or [D, C] for a = 0.
        parameters: 2 + 8 L vectors: the bias of in; of each layer the weight and bias of its first norm, the biases of qkv and
            projection, weight and bias of the second norm, the biases of up and down; the bias of out.
        heads: of the attention; divides C.
        condition: [N, C].
        unconditional: [C], beside ``guidance``.
        guidance: [T, 2], w for a and for b of each token; the first row is not read.
        unconditional_temperature: divides the scores of attention of the unconditional transformer.
        eps: of the norms.

    Returns:
        (x [N, T, D] in the dtype of ``input``, the log-determinant sum_t a_t [N] in float32, or float64). No gradients.

    Raises:
        TypeError: an argument is no floating-point tensor.
        ValueError: a shape or a device does not fit, or a tensor requires a gradient.

    Source: Zhai et al., "Normalizing Flows are Capable Generative Models", 2024.
    """
    _check_tensors(input, position, condition, unconditional, guidance, weights, parameters)
    if input.dim() != 3 or 0 in input.shape[1:]:
        fail(_OP, f"input must be [N, T, D] with T and D at least 1, got {shape_of(input)}")
    tensors = (input, position, condition, unconditional, guidance)
    function: Any = _call
    if foreign(*tensors, *weights, *parameters):
        function = in_float32(_OP, _call)
    output, log_det = function(
        *tensors, list(weights), list(parameters), heads, float(eps), float(unconditional_temperature)
    )
    return output.to(input.dtype), log_det


def _call(
    input: Tensor,
    position: Tensor,
    condition: Tensor | None,
    unconditional: Tensor | None,
    guidance: Tensor | None,
    weights: list[Tensor],
    parameters: list[Tensor],
    *options: Any,
) -> tuple[Tensor, Tensor]:
    """The raw op of tensors as it wants them."""
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32

    def taken(t: Tensor | None, dtype: torch.dtype = dtype) -> Tensor | None:
        return None if t is None else t.to(dtype).contiguous()

    tensors = (taken(input), taken(position), taken(condition), taken(unconditional), taken(guidance, torch.float64))
    return _raw(*tensors, [_packed(w, dtype) for w in weights], [taken(p) for p in parameters], *options)


def _packed(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Kept where that is possible, and made for the call where not."""
    purpose = (_OP, dtype)
    if torch.compiler.is_compiling() or _packed_weights.reasons(weight):
        return pack(weight, dtype)
    kept = WEIGHTS.find(weight).get(purpose)
    if kept is not None:
        return kept
    if weight.numel() * dtype.itemsize > WEIGHTS.limit - WEIGHTS.bytes:
        return pack(weight, dtype)
    return WEIGHTS.make(weight, purpose, lambda w: pack(w, dtype))


def _raw(*args: Any) -> tuple[Tensor, Tensor]:
    """The raw op, whose complaints are those of the public one."""
    function: Any = torch.ops.fastgen.causal_transformer_inverse.default
    if torch.compiler.is_compiling():
        return function(*args)
    try:
        return function(*args)
    except RuntimeError as error:
        message = str(error).splitlines()[0]
        if not message.startswith(f"{_OP}: "):
            raise
        raise ValueError(message) from None


def _check_tensors(
    input: Tensor,
    position: Tensor,
    condition: Tensor | None,
    unconditional: Tensor | None,
    guidance: Tensor | None,
    weights: Sequence[Tensor],
    parameters: Sequence[Tensor],
) -> None:
    for name, given in (("weights", weights), ("parameters", parameters)):
        if not isinstance(given, Sequence):
            raise TypeError(f"{_OP}: {name} must be a sequence of tensors, got {kind_of(given)}")
    optional = {"condition": condition, "unconditional": unconditional, "guidance": guidance}
    named = {"input": input, "position": position, **{name: t for name, t in optional.items() if t is not None}}
    named |= {f"weights[{i}]": t for i, t in enumerate(weights)}
    named |= {f"parameters[{i}]": t for i, t in enumerate(parameters)}
    for name, t in named.items():
        check_floating(_OP, name, t)
        if t.device != input.device:
            fail(_OP, f"{name} must be on the device of input ({input.device}), got {t.device}")
        if name.startswith("weights") and t.dim() != 2:
            fail(_OP, f"{name} must be [outputs, inputs], got {shape_of(t)}")
        refuse_gradient(_OP, name, t)
