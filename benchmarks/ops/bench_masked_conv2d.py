"""`masked_conv2d` at the sizes of PixelCNNs, inference and training, beside dense convolutions of a masked weight.

The baseline masks as published models do: the weight is multiplied by its mask in place, then convolved. A first layer's image
needs no gradient. The floor is a matrix product of as many multiply-adds as the live taps have.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.ops import masked_conv2d, masked_conv2d_mask

from ..cases import Case, Provider, Workload, compiled, random_tensor
from ..verify import Values

# Mask -> (kernel, ([N, C, H, W], K)): first layers of grey and of RGB images, and wide ones; middle layers.
SHAPES = {
    "7x7 A": (7, (((1, 1, 28, 28), 64), ((16, 1, 28, 28), 64), ((16, 3, 32, 32), 128), ((4, 64, 32, 32), 64))),
    "3x3 B": (
        3,
        (
            ((1, 64, 28, 28), 64), ((16, 64, 28, 28), 64), ((1, 128, 32, 32), 128), ((16, 128, 32, 32), 128),
            ((4, 256, 32, 32), 256),
        ),
    ),
}  # fmt: skip
LAYOUTS = ("NCHW", "NHWC")


def cases(device: torch.device, full: bool) -> list[Case]:
    """Masks, modes and shapes; the other layout, and bf16, of inference alone unless ``full``."""
    listed = [
        (name, kernel, mode, shape, k, layout, dtype)
        for mode in ("inference", "training")
        for dtype in ("fp32", "bf16")
        for name, (kernel, shapes) in SHAPES.items()
        for shape, k in shapes
        for layout in LAYOUTS
        if full or (dtype == "fp32" and (layout == "NCHW" or mode == "inference"))
    ]
    return [
        Case(
            "masked_conv2d", f"{name}, {mode}", (*shape, k), dtype,
            functools.partial(build, name[-1], kernel, mode, shape, k, layout, dtype, device),
            f"masked conv {name}, {mode}, {dtype}",
            layout=layout,
        )
        for name, kernel, mode, shape, k, layout, dtype in listed
    ]  # fmt: skip


def plain(x: Tensor, weight: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    return F.conv2d(x, weight * mask, bias, padding=weight.shape[-1] // 2)


def in_place(x: Tensor, weight: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    weight.data *= mask
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)


def build(
    mask_type: str, kernel: int, mode: str, shape: tuple[int, ...], k: int, layout: str, dtype: str, device: torch.device,
    allow_compile: bool,
) -> Workload:  # fmt: skip
    n, c, height, width = shape
    grad = mode == "training"
    x = random_tensor(shape, device, dtype, seed=0, layout=layout)
    weight = random_tensor((k, c, kernel, kernel), device, dtype, seed=1, deviation=(c * kernel**2 / 2) ** -0.5)
    bias, grad_output = (
        random_tensor((k,), device, dtype, seed=2),
        random_tensor((n, k, height, width), device, dtype, 3, layout=layout),
    )
    live = masked_conv2d_mask(mask_type, weight.shape, device=device)
    mask, taps = live.to(x.dtype), int(live[0, 0].sum())
    first = c <= 3  # an image needs no gradient
    x.requires_grad_(grad and not first)

    def ours(x: Tensor, weight: Tensor, bias: Tensor, _: Tensor) -> Tensor:
        return masked_conv2d(x, weight, bias, mask_type=mask_type)

    def inputs(weight: Tensor) -> tuple[Tensor, ...]:
        return x, weight.clone().requires_grad_(grad), bias.clone().requires_grad_(grad), mask

    functions: dict[str, Callable[..., Tensor]] = {"eager": in_place}
    notes: list[str] = []
    if function := compiled(plain, inputs(weight), allow_compile, notes, grad=grad):
        functions["compile"] = function
    functions["fastgen"] = ours

    def run(
        function: Callable[..., Tensor], given: tuple[Tensor, ...], grad_output: Tensor = grad_output
    ) -> tuple[Tensor, ...]:
        output = function(*given)
        if not grad:
            return (output,)
        leaves = [t for t in given if t.requires_grad]
        grads = list(torch.autograd.grad(output, leaves, grad_output))
        of_weight = 0 if first else 1
        grads[of_weight] = torch.where(live, grads[of_weight], 1.0)  # of live taps alone: a check wants few zeros
        return output, *grads

    def expected() -> tuple[Tensor, ...]:
        wide = [t.detach().double().requires_grad_(t.requires_grad) for t in inputs(weight)]
        return run(plain, tuple(wide), grad_output.double())

    providers = [
        Provider(name, functools.partial(run, f, inputs(weight)), "fastgen" if name == "fastgen" else "baseline")
        for name, f in functions.items()
    ]
    left, right = (
        random_tensor((n * height * width, taps * c), device, dtype, 6),
        random_tensor((taps * c, k), device, dtype, 7),
    )
    providers.append(Provider("matrix product", functools.partial(torch.matmul, left, right), "floor"))
    passes = (2 if first else 3) if grad else 1
    return Workload(
        providers,
        (Values(expected, yardstick="eager"),),
        min_bytes=(x.nbytes + taps * c * k * x.element_size() + grad_output.nbytes) * passes,
        flops=passes * 2 * taps * n * height * width * c * k,
        grad=grad,
        notes=notes,
    )
