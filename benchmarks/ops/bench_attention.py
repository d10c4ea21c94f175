"""`attention` at the sizes of U-Nets, inference and training: self-attention by head dimension, d = 8, and 77 keys of a text.

Queries, keys and values are views of packed projections, [N, L, 3 H E] for self-attention, as models make them; torch's
`scaled_dot_product_attention` beside it, eager and compiled. The floor is the two matrix products alone, on dense copies.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.ops import attention

from ..cases import Case, Provider, Workload, compiled, random_tensor
from ..verify import Values

# (N, H, L, S, E): heads of Stable Diffusion's U-Nets, guided-diffusion's 64 channels a head, 8 of diffusers' UNet2DModel.
SELF = tuple(
    (batch, 8, length, length, depth)
    for depth in (40, 64, 80, 160)
    for batch, length in ((4, 256), (2, 1024), (1, 4096))
)
SHAPES = {
    "self": SELF,
    "d8": ((4, 32, 256, 256, 8), (1, 64, 1024, 1024, 8)),
    "keys77": ((2, 8, 4096, 77, 40), (2, 8, 1024, 77, 80), (2, 8, 256, 77, 160)),
    "backward": tuple(shape for shape in SELF if shape[2] < 4096),
}
GROUP_OF = {
    "self": "attention, d = 40 to 160",
    "d8": "attention, d = 8",
    "keys77": "attention, 77 keys",
    "backward": "attention, forward and backward",
}
LAYOUT = "NLHE"


def cases(device: torch.device, full: bool) -> list[Case]:
    """21 shapes and modes x dtypes, the smallest first."""
    dtypes = ("fp32", "bf16", "fp16") if device.type == "cuda" and full else ("fp32", "bf16")
    return [
        Case(
            "attention", mode, shape, dtype, functools.partial(build, mode, shape, dtype, device), GROUP_OF[mode], layout=LAYOUT
        )
        for mode, shapes in SHAPES.items()
        for shape in shapes
        for dtype in dtypes
    ]  # fmt: skip


def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value)


def build(mode: str, shape: tuple[int, ...], dtype: str, device: torch.device, allow_compile: bool) -> Workload:
    n, heads, rows, keys, depth = shape
    grad = mode == "backward"
    if rows == keys:
        qkv = random_tensor((n, rows, 3, heads, depth), device, dtype, seed=0).permute(2, 0, 3, 1, 4)
        inputs = list(qkv)
    else:
        pair = random_tensor((n, keys, 2, heads, depth), device, dtype, seed=1).permute(2, 0, 3, 1, 4)
        inputs = [random_tensor((n, rows, heads, depth), device, dtype, seed=0).transpose(1, 2), *pair]
    grad_output = random_tensor((n, rows, heads, depth), device, dtype, seed=9).transpose(1, 2)
    if grad:
        inputs = [t.detach().requires_grad_() for t in inputs]

    functions: dict[str, Callable[..., Tensor]] = {"eager": plain}
    notes: list[str] = []
    if function := compiled(plain, inputs, allow_compile, notes, grad=grad):
        functions["compile"] = function
    functions["fastgen"] = attention

    def prepare(
        function: Callable[..., Tensor], grad_output: Tensor = grad_output
    ) -> Callable[..., tuple[Tensor, ...]]:
        def forward_and_backward(*args: Tensor) -> tuple[Tensor, ...]:
            output = function(*args)
            return output, *torch.autograd.grad(output, args, grad_output)

        return forward_and_backward if grad else lambda *args: (function(*args),)

    def expected() -> tuple[Tensor, ...]:
        wide = [t.detach().double().requires_grad_(grad) for t in inputs]
        return prepare(plain, grad_output.double())(*wide)

    providers = [
        Provider(name, functools.partial(prepare(f), *inputs), "fastgen" if name == "fastgen" else "baseline")
        for name, f in functions.items()
    ]
    dense = [t.detach().contiguous() for t in inputs]
    providers.append(Provider("products", lambda: dense[0] @ dense[1].mT @ dense[2], "floor"))
    products = 7 if grad else 2  # five of the backward, two of the forward
    return Workload(
        providers,
        (Values(expected, yardstick="eager"),),
        min_bytes=sum(t.nbytes for t in inputs) * (3 if grad else 1) + grad_output.nbytes,
        flops=products * 2 * n * heads * rows * keys * depth,
        grad=grad,
        notes=notes,
    )
