"""Arguments of `causal_transformer_inverse` for its tests: small transformers whose inverse stays near the latent."""

from typing import Any

import torch
from torch import Tensor

from fastgen.ops import causal_transformer_inverse
from fastgen.reference.causal_transformer_inverse import pack

from .families import OfTensors
from .numerics import randn

NO_GRADIENT = True
OWN_DTYPE = (1,)  # the log-determinant is of the arithmetic


def arguments(
    dtype: torch.dtype = torch.float64,
    *,
    images: int = 3,
    tokens: int = 5,
    features: int = 4,
    channels: int = 24,
    heads: int = 3,
    layers: int = 2,
    hidden: int = 40,
    scaled: bool = True,
    conditional: bool = True,
    guided: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Of the public op. Log-scales are a tenth: a token of many hundred, wrong by an ulp, would be wrong by many."""
    numbers = iter(range(1000 * seed, 1000 * seed + 1000))

    def some(*shape: int, scale: float = 1.0) -> Tensor:
        return (randn(*shape, seed=next(numbers)) * scale).to(dtype)

    def matrix(outputs: int, inputs: int, scale: float = 1.0) -> Tensor:
        return some(outputs, inputs, scale=scale / inputs**0.5)

    def norm() -> list[Tensor]:
        return [1 + some(channels, scale=0.3), some(channels, scale=0.3)]

    weights, parameters = [matrix(channels, features)], [some(channels)]
    for _ in range(layers):
        weights += [matrix(3 * channels, channels), matrix(channels, channels)]
        weights += [matrix(hidden, channels), matrix(channels, hidden)]
        parameters += [*norm(), some(3 * channels), some(channels), *norm(), some(hidden), some(channels)]
    outputs = (2 if scaled else 1) * features
    weights, parameters = [*weights, matrix(outputs, channels, 0.1)], [*parameters, some(outputs, scale=0.1)]
    return {
        "input": some(images, tokens, features),
        "position": some(tokens, channels),
        "weights": weights,
        "parameters": parameters,
        "heads": heads,
        "condition": some(images, channels) if conditional else None,
        "unconditional": some(channels) if conditional and guided else None,
        "guidance": some(tokens, 2).abs() if guided else None,
        "unconditional_temperature": 0.7 if guided else 1.0,
    }


def raw(named: dict[str, Any]) -> tuple[Any, ...]:
    """Arguments of the raw op."""
    dtype, guidance = named["input"].dtype, named["guidance"]
    return (
        *(named[name] for name in ("input", "position", "condition", "unconditional")),
        None if guidance is None else guidance.double(), [pack(w, dtype) for w in named["weights"]], named["parameters"],
        named["heads"], named.get("eps", 1e-5), named["unconditional_temperature"],
    )  # fmt: skip


def example(dtype: torch.dtype) -> dict[str, Any]:
    return arguments(dtype, guided=True)


UNSEEN = {"causal_transformer_inverse": lambda: raw(arguments(torch.float32, guided=True))}
REFUSED = [
    ("causal_transformer_inverse", {"heads": 0}, "heads must divide C = 24, got 0"),
    ("causal_transformer_inverse", {"heads": 5}, "heads must divide C = 24, got 5"),
    ("causal_transformer_inverse", {"weights": []}, "weights must be 2 . 4 L"),
    ("causal_transformer_inverse", {"parameters": []}, "parameters 2 . 8 L"),
    ("causal_transformer_inverse", {"unconditional_temperature": 0.0}, "unconditional_temperature must be positive"),
    ("causal_transformer_inverse", {"unconditional_temperature": float("nan")}, "unconditional_temperature must be"),
    ("causal_transformer_inverse", {"guidance": torch.zeros(5, 2)}, "guidance must"),
    ("causal_transformer_inverse", {"input": torch.zeros(3, 5, 4).bfloat16()}, "input must be float32 or float64"),
    ("causal_transformer_inverse", {"position": torch.zeros(24, 5).T}, "position must be contiguous"),
]


def harmless(op: str, name: str, how: str, arguments: dict[str, Any]) -> bool:
    return False


_SMALL = arguments(torch.float32, images=2, conditional=False, layers=1)
del _SMALL["input"]


def _inverse(input: Tensor) -> tuple[Tensor, Tensor]:
    return causal_transformer_inverse(input, **_SMALL)


# The sums do not depend on which samples go together. There are no gradients, so what is mapped are integers.
MAPPED = OfTensors(lambda z: _inverse(z.float() / 8), lambda k: [torch.arange(40).reshape(2, 5, 4) * (k + 1) % 17])
EXPORTED = {"causal_transformer_inverse": OfTensors(_inverse, lambda n: [randn(n, 5, 4, dtype=torch.float32)])}
