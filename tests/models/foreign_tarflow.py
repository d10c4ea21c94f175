"""TarFlow as ml-tarflow publishes it (Zhai et al. 2024), restated over a state dict with its names, in plain torch.

Every token's parameters come from the whole transformer, run anew: the mathematics of its cache, without it.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

State = Mapping[str, Tensor]


def make_state(
    in_channels: int = 1, image_size: int = 4, patch_size: int = 2, channels: int = 64, *, blocks: int = 2, layers: int = 1,
    nvp: bool = True, classes: int = 0, expansion: int = 4, seed: int = 0, dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:  # fmt: skip
    """Random weights by ml-tarflow's names, its masks among them."""
    generator = torch.Generator().manual_seed(seed)
    features, tokens, state = in_channels * patch_size**2, (image_size // patch_size) ** 2, {}

    def put(name: str, *shape: int, scale: float, mean: float = 0.0) -> None:
        state[name] = (torch.randn(shape, generator=generator, dtype=torch.float64) * scale + mean).to(dtype)

    def linear(name: str, outputs: int, inputs: int, scale: float = 1.0) -> None:
        put(f"{name}.weight", outputs, inputs, scale=scale / inputs**0.5)
        put(f"{name}.bias", outputs, scale=0.1)

    def norm(name: str) -> None:
        put(f"{name}.weight", channels, scale=0.2, mean=1.0)
        put(f"{name}.bias", channels, scale=0.2)

    for b in (f"blocks.{i}" for i in range(blocks)):
        put(f"{b}.pos_embed", tokens, channels, scale=0.5)
        if classes:
            put(f"{b}.class_embed", classes, 1, channels, scale=0.5)
        state[f"{b}.attn_mask"] = torch.ones(tokens, tokens).tril()
        linear(f"{b}.proj_in", channels, features)
        for a in (f"{b}.attn_blocks.{j}" for j in range(layers)):
            norm(f"{a}.attention.norm")
            linear(f"{a}.attention.qkv", 3 * channels, channels)
            linear(f"{a}.attention.proj", channels, channels)
            norm(f"{a}.mlp.norm")
            linear(f"{a}.mlp.main.0", expansion * channels, channels)
            linear(f"{a}.mlp.main.2", channels, expansion * channels)
        linear(f"{b}.proj_out", features * (2 if nvp else 1), channels, scale=0.1)
    put("var", tokens, features, scale=0.1, mean=1.0)
    return state


def to_patches(x: Tensor, size: int) -> Tensor:
    return F.unfold(x, size, stride=size).transpose(1, 2)


def to_image(z: Tensor, size: int) -> Tensor:
    side = size * math.isqrt(z.shape[1])
    return F.fold(z.transpose(1, 2), (side, side), size, stride=size)


def forward(state: State, x: Tensor, labels: Tensor | None, patch: int) -> tuple[list[Tensor], Tensor]:
    """The outputs of all blocks, and the log-det, the mean of a number [N]."""
    z, outputs, log_det = to_patches(x, patch), [], x.new_zeros(len(x))
    for i in range(_count(state)):
        z = _turned(z, i)
        a, b = _parameters(state, i, z, labels)
        a, b = (torch.cat([torch.zeros_like(p[:, :1]), p[:, :-1]], 1) for p in (a, b))
        z = _turned((z - b) * torch.exp(-a), i)
        log_det = log_det - a.mean((1, 2))
        outputs.append(z)
    return outputs, log_det


def loss(outputs: list[Tensor], log_det: Tensor) -> Tensor:
    return 0.5 * outputs[-1].pow(2).mean() - log_det.mean()


def reverse(
    state: State, noise: Tensor, labels: Tensor | None, patch: int, *, guidance: float = 0.0, guided: str = "ab",
    attention_temperature: float = 1.0, annealed: bool = False,
) -> Tensor:  # fmt: skip
    """Images of normal noise [N, T, D]."""
    x = noise * state["var"].sqrt()
    for i in reversed(range(_count(state))):
        x = _turned(x, i).clone()
        tokens = x.shape[1]
        for t in range(tokens - 1):
            a, b = (p[:, t] for p in _parameters(state, i, x, labels))
            if guidance > 0:
                a0, b0 = (p[:, t] for p in _parameters(state, i, x, None, attention_temperature))
                w = guidance * (t + 1) / (tokens - 1) if annealed else guidance
                a = a + w * (a - a0) * ("a" in guided)
                b = b + w * (b - b0) * ("b" in guided)
            x[:, t + 1] = x[:, t + 1] * a.exp() + b
        x = _turned(x, i)
    return to_image(x, patch)


def _count(state: State) -> int:
    return len({name.split(".")[1] for name in state if name.startswith("blocks.")})


def _turned(z: Tensor, block: int, dim: int = 1) -> Tensor:
    return z.flip(dim) if block % 2 else z


def _parameters(
    state: State, i: int, x: Tensor, labels: Tensor | None, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(a, b) that each token gives the next, of all tokens in turn."""
    own = {name.removeprefix(f"blocks.{i}."): t for name, t in state.items() if name.startswith(f"blocks.{i}.")}

    def linear(name: str, h: Tensor) -> Tensor:
        return F.linear(h, own[f"{name}.weight"], own[f"{name}.bias"])

    def norm(name: str, h: Tensor) -> Tensor:
        return F.layer_norm(h, h.shape[-1:], own[f"{name}.weight"], own[f"{name}.bias"])

    h = linear("proj_in", x) + _turned(own["pos_embed"], i, 0)
    if "class_embed" in own:
        mean = own["class_embed"].mean(0)
        if labels is None:
            h = h + mean
        else:
            h = h + torch.stack([mean if label < 0 else own["class_embed"][label] for label in labels.tolist()])
    later = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
    for a in sorted({name.split(".")[1] for name in own if name.startswith("attn_blocks")}, key=int):
        a = f"attn_blocks.{a}"
        qkv = linear(f"{a}.attention.qkv", norm(f"{a}.attention.norm", h))
        q, k, v = (part.unflatten(2, (-1, 64)).transpose(1, 2) for part in qkv.chunk(3, 2))
        scores = (q @ k.mT / (8 * temperature)).masked_fill(later, -torch.inf)
        h = h + linear(f"{a}.attention.proj", (scores.softmax(3) @ v).transpose(1, 2).flatten(2))
        h = h + linear(f"{a}.mlp.main.2", F.gelu(linear(f"{a}.mlp.main.0", norm(f"{a}.mlp.norm", h))))
    said = linear("proj_out", h)
    if said.shape[2] == x.shape[2]:
        return torch.zeros_like(x), said
    return tuple(said.chunk(2, 2))  # type: ignore[return-value]
