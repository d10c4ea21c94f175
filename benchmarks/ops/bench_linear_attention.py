"""`linear_attention` at the sizes of denoising-diffusion-pytorch's U-Net, inference and training, beside its own formula.

Four heads of 32 channels with four memories; queries, keys and values are slices of a convolution's output. The floor is the two
matrix products alone, on dense copies.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from fastgen.ops import linear_attention

from ..cases import Case, Provider, Workload, compiled, random_tensor
from ..verify import Values

HEADS, CHANNELS, MEMORIES = 4, 32, 4
# [N, C, H, W] of the output.
SHAPES = {
    "inference": tuple(
        (n, HEADS * CHANNELS, side, side) for n, side in ((1, 16), (4, 16), (1, 32), (4, 32), (1, 64), (1, 128))
    ),
    "backward": tuple((n, HEADS * CHANNELS, side, side) for n, side in ((4, 16), (4, 32), (1, 64), (1, 128))),
}
GROUP_OF = {"inference": "linear attention", "backward": "linear attention, forward and backward"}


def cases(device: torch.device, full: bool) -> list[Case]:
    """10 shapes and modes x dtypes, the smallest first; channels-last too on request."""
    dtypes = ("fp32", "bf16", "fp16") if device.type == "cuda" and full else ("fp32", "bf16")
    return [
        Case(
            "linear_attention", mode, shape, dtype, functools.partial(build, mode, shape, layout, dtype, device), GROUP_OF[mode],
            layout=layout,
        )
        for mode, shapes in SHAPES.items()
        for shape in shapes
        for layout in (("NCHW", "NHWC") if full else ("NCHW",))
        for dtype in dtypes
    ]  # fmt: skip


def plain(q: Tensor, k: Tensor, v: Tensor, memory_key: Tensor, memory_value: Tensor) -> Tensor:
    k, v = (torch.cat([m.expand(len(t), -1, -1, -1), t], -1) for m, t in ((memory_key, k), (memory_value, v)))
    q, k = q.softmax(-2) * q.shape[2] ** -0.5, k.softmax(-1)
    context = torch.einsum("bhdn,bhen->bhde", k, v)
    return torch.einsum("bhde,bhdn->bhen", context, q)


def build(
    mode: str, shape: tuple[int, ...], layout: str, dtype: str, device: torch.device, allow_compile: bool
) -> Workload:
    n, c, height, width = shape
    grad = mode == "backward"
    qkv = random_tensor((n, 3 * c, height, width), device, dtype, seed=0, layout=layout)
    inputs = list(qkv.flatten(2).unflatten(1, (3, HEADS, CHANNELS)).unbind(1))
    inputs += list(random_tensor((2, HEADS, CHANNELS, MEMORIES), device, dtype, seed=1))
    grad_output = random_tensor((n, c, height, width), device, dtype, seed=9, layout=layout)
    grad_output = grad_output.flatten(2).unflatten(1, (HEADS, CHANNELS))
    if grad:
        inputs = [t.detach().requires_grad_() for t in inputs]

    functions: dict[str, Callable[..., Tensor]] = {"eager": plain}
    notes: list[str] = []
    if function := compiled(plain, inputs, allow_compile, notes, grad=grad):
        functions["compile"] = function
    functions["fastgen"] = linear_attention

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
    q, k, v = (t.detach().contiguous() for t in inputs[:3])
    providers.append(Provider("products", lambda: (k @ v.mT).mT @ q, "floor"))
    return Workload(
        providers,
        (Values(expected, yardstick="eager"),),
        min_bytes=(3 * q.nbytes + grad_output.nbytes) * (2 if grad else 1),
        flops=(3 if grad else 1) * 2 * 2 * q.numel() * CHANNELS,
        grad=grad,
        notes=notes,
    )
