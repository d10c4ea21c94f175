"""`masked_linear` and networks of it: layers in inference and training, and a whole MADE, beside weights multiplied by their masks.

The MADE is nflows', with its weights. The floor is a matrix product of the whole weight.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.flows import MADE
from fastgen.ops import masked_linear

from ..cases import Case, Provider, Workload, compiled, random_tensor
from ..verify import Values
from .bench_autoregressive_inverse import randomised

# (rows, inputs, outputs), the degrees of a MADE of 64 features.
SHAPES = ((256, 512, 512), (256, 1024, 1024), (4096, 512, 512))
FEATURES, WIDTH = (64, 784), 512


def cases(device: torch.device, full: bool) -> list[Case]:
    """Layers in both modes, and whole networks on a CPU."""
    layers = [
        Case(
            "masked_linear", mode, shape, "fp32", functools.partial(build, mode, shape, device), f"masked linear, {mode}",
            layout="NC",
        )
        for mode in ("inference", "training")
        for shape in SHAPES
    ]  # fmt: skip
    networks = [
        Case(
            "masked_linear", "MADE", (256, features), "fp32", functools.partial(build_made, features), "MADE of nflows, inference",
            layout="ND",
        )
        for features in FEATURES
    ]  # fmt: skip
    return layers + (networks if device.type == "cpu" else [])


def plain(x: Tensor, weight: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    return F.linear(x, weight * mask, bias)


def build(mode: str, shape: tuple[int, int, int], device: torch.device, allow_compile: bool) -> Workload:
    rows, inputs, outputs = shape
    grad = mode == "training"
    x = random_tensor((rows, inputs), device, "fp32", 0)
    weight = random_tensor((outputs, inputs), device, "fp32", 1, deviation=inputs**-0.5)
    bias, grad_output = random_tensor((outputs,), device, "fp32", 2), random_tensor((rows, outputs), device, "fp32", 3)
    ins, outs = (torch.arange(n, device=device) % 63 for n in (inputs, outputs))
    live = outs[:, None] >= ins
    mask = live.to(x.dtype)
    tensors = [t.requires_grad_(grad) for t in (x, weight, bias)]

    def ours(x: Tensor, weight: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
        return masked_linear(x, weight, bias, mask=live)

    functions: dict[str, Callable[..., Tensor]] = {"eager": plain}
    notes: list[str] = []
    if function := compiled(plain, [*tensors, mask], allow_compile, notes, grad=grad):
        functions["compile"] = function
    functions["fastgen"] = ours

    def run(function: Callable[..., Tensor], *given: Tensor) -> tuple[Tensor, ...]:
        if not grad:
            return (function(*given, mask),)
        with torch.no_grad():
            given[1].mul_(1)  # a step of training changes the weight
        output = function(*given, mask.to(given[0].dtype))
        grads = torch.autograd.grad(output, given, grad_output.to(output.dtype))
        by_input, by_weight, by_bias = grads
        return output, by_input, torch.where(live, by_weight, 1.0), by_bias  # a check wants few zeros

    def expected() -> tuple[Tensor, ...]:
        return run(plain, *(t.detach().double().requires_grad_(grad) for t in tensors))

    def copies() -> list[Tensor]:
        return [t.detach().clone().requires_grad_(grad) for t in tensors]

    providers = [
        Provider(name, functools.partial(run, f, *copies()), "fastgen" if name == "fastgen" else "baseline")
        for name, f in functions.items()
    ]
    providers.append(
        Provider("matrix product", functools.partial(torch.matmul, x.detach(), weight.detach().t()), "floor")
    )
    return Workload(
        providers,
        (Values(expected, yardstick="eager"),),
        min_bytes=(x.nbytes + weight.nbytes // 2 + grad_output.nbytes) * (3 if grad else 1),
        flops=(3 if grad else 1) * rows * inputs * outputs,
        grad=grad,
        notes=notes,
    )


def build_made(features: int, allow_compile: bool) -> Workload:
    from nflows.transforms.made import MADE as Theirs

    theirs = randomised(Theirs(features, WIDTH, output_multiplier=2), 0.05)
    ours = MADE(features, 2, hidden_features=WIDTH)
    ours.load_state_dict(theirs.state_dict(), strict=False)
    x = random_tensor((256, features), torch.device("cpu"), "fp32", seed=3)
    functions: dict[str, Callable[..., Tensor]] = {"nflows": theirs.forward}
    notes: list[str] = []
    if function := compiled(theirs.forward, [x], allow_compile, notes):
        functions["compile"] = function
    functions["fastgen"] = ours.forward

    def expected() -> tuple[Tensor, ...]:
        theirs.double()
        try:
            return (theirs(x.double()),)
        finally:
            theirs.float()

    providers = [
        Provider(name, functools.partial(lambda f: (f(x),), f), "fastgen" if name == "fastgen" else "baseline")
        for name, f in functions.items()
    ]
    weights = [w for w in ours.parameters() if w.dim() == 2]
    products = [w.detach() for w in weights]

    def dense() -> Tensor:
        h = x
        for weight in products:
            h = torch.matmul(h, weight.t())
        return h

    providers.append(Provider("matrix products", dense, "floor"))
    sizes = sum(w.numel() for w in weights)
    return Workload(
        providers,
        (Values(expected, yardstick="nflows"),),
        min_bytes=3 * x.nbytes + 2 * sizes,
        flops=256 * sizes,
        notes=notes,
    )
