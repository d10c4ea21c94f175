"""What `causal_transformer_inverse` means, in plain torch, token after token with kept keys and values.

Zhai et al., "Normalizing Flows are Capable Generative Models", 2024.

And what its packed weights are: [panels, C, PANEL], PANEL outputs side by side, zeros beyond the last.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._check import check_floats, check_main, require

PANEL = 16  # outputs side by side in packed weights
_MATRICES, _PARAMETERS = 4, 8  # of a layer
_OP = "causal_transformer_inverse"


def pack(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[outputs, C] -> [panels, C, PANEL] in ``dtype``."""
    padded = F.pad(weight.to(dtype), (0, 0, 0, -weight.shape[0] % PANEL))
    return padded.unflatten(0, (-1, PANEL)).mT.contiguous()


class Linear(NamedTuple):
    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Layer(NamedTuple):
    norm1: tuple[Tensor, Tensor]
    qkv: Linear
    projection: Linear
    norm2: tuple[Tensor, Tensor]
    up: Linear
    down: Linear


def causal_transformer_inverse(
    input: Tensor,
    position: Tensor,
    condition: Tensor | None,
    unconditional: Tensor | None,
    guidance: Tensor | None,
    weights: Sequence[Tensor],
    parameters: Sequence[Tensor],
    heads: int,
    eps: float,
    unconditional_temperature: float,
) -> tuple[Tensor, Tensor]:
    """(x [N, T, D], the sum of the log scales [N])."""
    first, layers, last = _network(weights, parameters)
    count, tokens, features = input.shape
    output, log_det = input.clone(), input.new_zeros(count)
    added = [condition] if guidance is None else [condition, unconditional]
    temperatures = [1.0, unconditional_temperature]
    size = (len(added), len(layers), count, heads, tokens, position.shape[1] // heads)
    keys, values = input.new_empty(size), input.new_empty(size)
    for t in range(tokens - 1):
        said = []
        for stream, rows in enumerate(added):
            x = first(output[:, t]) + position[t] + (0 if rows is None else rows)
            for k, v, layer in zip(keys[stream], values[stream], layers, strict=True):
                x = _layer(layer, x, k, v, t, eps, temperatures[stream])
            said.append(last(x))
        both = said[0].new_zeros(count, 2 * features)
        both[:, -said[0].shape[1] :] = said[0]
        if guidance is not None:
            weight = guidance[t + 1].to(input.dtype).repeat_interleave(features)[-said[0].shape[1] :]
            both[:, -said[0].shape[1] :] += weight * (said[0] - said[1])
        log_scale, shift = both.chunk(2, 1)
        output[:, t + 1] = output[:, t + 1] * log_scale.exp() + shift
        log_det += log_scale.sum(1)
    return output, log_det


def _layer(layer: Layer, x: Tensor, keys: Tensor, values: Tensor, token: int, eps: float, temperature: float) -> Tensor:
    """[N, C] -> [N, C]; ``keys`` and ``values`` [N, H, T, E] are written at ``token`` and read up to it."""
    heads = keys.shape[1]
    normed = F.layer_norm(x, x.shape[1:], *layer.norm1, eps)
    query, key, value = layer.qkv(normed).unflatten(1, (3, heads, -1)).unbind(1)  # [N, H, E]
    keys[:, :, token], values[:, :, token] = key, value
    scores = torch.einsum("nhe,nhte->nht", query, keys[:, :, : token + 1]) / (query.shape[2] ** 0.5 * temperature)
    seen = torch.einsum("nht,nhte->nhe", scores.softmax(2), values[:, :, : token + 1])
    x = x + layer.projection(seen.flatten(1))
    return x + layer.down(F.gelu(layer.up(F.layer_norm(x, x.shape[1:], *layer.norm2, eps))))


def _network(weights: Sequence[Tensor], parameters: Sequence[Tensor]) -> tuple[Linear, list[Layer], Linear]:
    matrices, vectors = iter(weights), iter(parameters)

    def linear() -> Linear:
        bias = next(vectors)
        return Linear(next(matrices).mT.flatten(0, 1)[: bias.shape[0]], bias)

    def layer() -> Layer:
        norm1 = next(vectors), next(vectors)
        attention = linear(), linear()
        norm2 = next(vectors), next(vectors)
        return Layer(norm1, *attention, norm2, linear(), linear())

    first = linear()
    return first, [layer() for _ in range(len(weights) // _MATRICES)], linear()


def causal_transformer_inverse_check(
    input: Tensor,
    position: Tensor,
    condition: Tensor | None,
    unconditional: Tensor | None,
    guidance: Tensor | None,
    weights: Sequence[Tensor],
    parameters: Sequence[Tensor],
    heads: int,
    eps: float,
    unconditional_temperature: float,
) -> None:
    check_main(_OP, "input", input, 3)
    require(_OP, input.dim() == 3 and input.shape[2] >= 1, f"input must be [N, T, D] with D >= 1, got {_sizes(input)}")
    wide = input.dtype in (torch.float32, torch.float64)
    require(_OP, wide, f"input must be float32 or float64, got {input.dtype}")
    count, tokens, features = input.shape
    fits = position.dim() == 2 and position.shape[1] >= 1
    require(_OP, fits, f"position must be [T, C], got {_sizes(position)}")
    channels = position.shape[1]
    layers = (len(weights) - 2) // _MATRICES
    known = len(weights) == 2 + _MATRICES * layers >= 2 and len(parameters) == 2 + _PARAMETERS * layers
    require(
        _OP, known, f"weights must be 2 + 4 L tensors and parameters 2 + 8 L, got {len(weights)}, {len(parameters)}"
    )
    require(_OP, heads >= 1 and channels % heads == 0, f"heads must divide C = {channels}, got {heads}")
    warm = unconditional_temperature > 0
    require(_OP, warm, f"unconditional_temperature must be positive, got {unconditional_temperature}")
    like: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "position": (position, (tokens, channels)),
        "condition": (condition, (count, channels)),
        "unconditional": (unconditional, (channels,)),
    }
    lengths = _lengths(parameters, channels, layers)
    for i, (size, vector) in enumerate(zip(lengths, parameters, strict=True)):
        like[f"parameters[{i}]"] = (vector, (size,))
    for i, (shape, matrix) in enumerate(zip(_shapes(lengths, features, channels, layers), weights, strict=True)):
        like[f"weights[{i}]"] = (matrix, shape)
    for name, (tensor, shape) in like.items():
        check_floats(_OP, input, shape, **{name: tensor})
        same = tensor is None or (tensor.dtype == input.dtype and tensor.is_contiguous())
        require(_OP, same, f"{name} must be contiguous, in the dtype of input")
    check_floats(_OP, input, (tokens, 2), guidance=guidance)
    exact = guidance is None or (guidance.dtype == torch.float64 and guidance.is_contiguous())
    require(_OP, exact, "guidance must be contiguous, in float64")
    outputs = parameters[-1].shape[0]
    require(_OP, outputs in (features, 2 * features), f"the last matrix must give D or 2 D numbers, got {outputs}")


def _lengths(parameters: Sequence[Tensor], channels: int, layers: int) -> list[int]:
    """Of the parameters; those of hidden units and of the outputs say their own."""
    own = [p.shape[0] if p.dim() == 1 else -1 for p in parameters]
    sizes = [channels]
    for i in range(layers):
        sizes += [channels, channels, 3 * channels, channels, channels, channels, own[7 + 8 * i], channels]
    return [*sizes, own[-1]]


def _shapes(lengths: Sequence[int], features: int, channels: int, layers: int) -> list[tuple[int, ...]]:
    """Of the packed weights."""

    def packed(outputs: int, inputs: int) -> tuple[int, ...]:
        return -(-outputs // PANEL), inputs, PANEL

    shapes = [packed(channels, features)]
    for i in range(layers):
        hidden = lengths[7 + 8 * i]
        shapes += [packed(3 * channels, channels), packed(channels, channels)]
        shapes += [packed(hidden, channels), packed(channels, hidden)]
    return [*shapes, packed(lengths[-1], channels)]


def _sizes(t: Tensor) -> str:
    return f"shape {tuple(t.shape)}"


def causal_transformer_inverse_fake(
    input: Tensor,
    position: Tensor,
    condition: Tensor | None,
    unconditional: Tensor | None,
    guidance: Tensor | None,
    weights: Sequence[Tensor],
    parameters: Sequence[Tensor],
    heads: int,
    eps: float,
    unconditional_temperature: float,
) -> tuple[Tensor, Tensor]:
    return input.new_empty(input.shape), input.new_empty(input.shape[:1])
