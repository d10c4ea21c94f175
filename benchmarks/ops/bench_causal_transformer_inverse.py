"""`causal_transformer_inverse`: one block of TarFlow from latent to image, beside the same in eager torch, token after token.

Eager torch is the published loop: modules, and keys and values put together for every token. The floor is the block's products, of
all tokens by the library's.
"""

import functools

import torch
from torch import Tensor

from fastgen.flows import CausalTransformerFlow
from fastgen.ops import causal_transformer_inverse

from ..cases import Case, Provider, Workload, random_tensor
from ..models.bench_tarflow import TOLERANCE, products, wide_floats
from ..models.plain_tarflow import Block
from ..verify import Values

# (T, D, channels, layers): of ml-tarflow's MNIST notebook; of 64x64 images in patches of 4; longer than it is wide.
SIZES = {"mnist": (49, 16, 128, 4), "small64": (256, 48, 256, 2), "long": (512, 12, 128, 2)}
BATCHES = (1, 16)


def cases(device: torch.device, full: bool) -> list[Case]:
    if device.type != "cpu":
        return []
    return [
        Case(
            "causal_transformer_inverse", mode, (batch, tokens, features), "fp32", functools.partial(build, mode, batch),
            f"{layers} layers of {channels} channels, {tokens} tokens", layout="NTD",
        )
        for mode, (tokens, features, channels, layers) in SIZES.items()
        for batch in BATCHES
    ]  # fmt: skip


def build(mode: str, batch: int, allow_compile: bool) -> Workload:
    tokens, features, channels, layers = SIZES[mode]
    torch.manual_seed(0)
    block = CausalTransformerFlow(features, tokens, channels, num_layers=layers).eval()
    torch.nn.init.normal_(block.proj_out.weight, std=0.01)
    plain, exact = (Block(features, tokens, channels, layers, None, False).eval() for _ in range(2))
    plain.load_state_dict(block.state_dict())
    exact.load_state_dict(block.state_dict())
    exact.double()
    z = random_tensor((batch, tokens, features), torch.device("cpu"), "fp32", seed=3)
    weights, parameters = block.tensors()

    def ours() -> Tensor:
        return causal_transformer_inverse(z, block.positions(), weights, parameters, heads=channels // 64)[0]

    def in_float64() -> tuple[Tensor]:
        with wide_floats(), torch.no_grad():
            return (exact.reverse(z.double(), None),)

    numbers = sum(weight.numel() for weight in weights)
    return Workload(
        [
            Provider("eager", lambda: plain.reverse(z, None)),
            Provider("fastgen", ours, "fastgen"),
            Provider("products", products([block], batch, tokens), "floor"),
        ],
        (Values(in_float64, tolerance=TOLERANCE),),
        min_bytes=4 * (numbers + 2 * z.numel()),
        flops=2 * numbers * (tokens - 1) * batch,
    )
