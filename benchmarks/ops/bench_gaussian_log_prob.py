"""`gaussian_log_prob` of what a Glow splits off, under the packed output of a network, density and training, beside eager and
compiled torch (two halves of `chunk`, as Glow's ports have them) and `torch.distributions.Normal`; and nflows' standard normal.

The floor is a clone of the parameters.
"""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastgen.ops import gaussian_log_prob

from ..cases import DTYPES, Case, Provider, Workload, compiled, random_tensor
from ..verify import Values

SHAPES = ((64, 12, 32, 32), (64, 24, 8, 8), (65536, 64))
GROUP_OF = {
    ("forward", "packed"): "normal log-density, packed parameters",
    ("backward", "packed"): "normal log-density, packed parameters, forward and backward",
    ("standard", "standard"): "standard normal log-density",
}
UNITS = {"forward": 3, "backward": 9, "standard": 1}  # of the input
FLOPS_PER_ELEMENT = 15

Function = Callable[..., Tensor]


def plain(x: Tensor, packed: Tensor | None = None) -> Tensor:
    if packed is None:
        terms = -0.5 * (x**2 + math.log(2 * math.pi))
    else:
        mean, log_scale = packed.chunk(2, 1)
        terms = -0.5 * math.log(2 * math.pi) - log_scale - 0.5 * (x - mean) ** 2 / torch.exp(2 * log_scale)
    return terms.flatten(1).sum(1)


def distribution(x: Tensor, packed: Tensor) -> Tensor:
    mean, log_scale = packed.chunk(2, 1)
    return torch.distributions.Normal(mean, log_scale.exp(), validate_args=False).log_prob(x).flatten(1).sum(1)


def cases(device: torch.device, full: bool) -> list[Case]:
    """3 kinds of call x 3 shapes x dtypes."""
    dtypes = ("bf16", "fp32", "fp16") if device.type == "cuda" else ("fp32", "bf16")
    return [
        Case("gaussian_log_prob", mode, shape, dtype, functools.partial(build, mode, kind, shape, dtype, device), group)
        for (mode, kind), group in GROUP_OF.items()
        for shape in SHAPES
        for dtype in dtypes
    ]


def build(
    mode: str, kind: str, shape: tuple[int, ...], dtype: str, device: torch.device, allow_compile: bool
) -> Workload:
    grad = mode == "backward"
    doubled = (shape[0], 2 * shape[1], *shape[2:])
    whole = random_tensor(doubled, device, dtype, seed=0)
    x = whole[:, shape[1] :].detach().requires_grad_(grad)  # the half that a split leaves
    inputs = [x]
    if kind == "packed":
        inputs.append(random_tensor(doubled, device, dtype, seed=1, deviation=0.5).requires_grad_(grad))
    notes: list[str] = []
    functions: dict[str, Function] = {"eager": plain}
    if kind == "packed":
        functions["torch.distributions"] = distribution
    elif dtype == "fp32":
        try:
            from nflows.distributions import StandardNormal

            functions["nflows"] = StandardNormal(shape[1:]).to(x).log_prob
        except ImportError:
            notes.append("nflows is not installed")
    if function := compiled(plain, inputs, allow_compile, notes, grad=grad):
        functions["compile"] = function
    functions["fastgen"] = gaussian_log_prob

    def prepare(function: Function) -> Callable[..., tuple[Tensor, ...]]:
        def forward_and_backward(*args: Tensor) -> tuple[Tensor, ...]:
            y = function(*args)
            return y, *torch.autograd.grad(y, args, torch.ones_like(y))

        return forward_and_backward if grad else lambda *args: (function(*args),)

    def expected() -> tuple[Tensor, ...]:
        return prepare(plain)(*(t.detach().double().requires_grad_(grad) for t in inputs))

    elements = math.prod(shape)
    terms = [elements // shape[0], 1, 1][: 1 + len(inputs) * grad]
    values = Values(expected, yardstick="eager", terms=terms)
    # fastgen's sums are in float32 whatever the dtype, and are held to that: twice the bound of float32's sum taken in halves.
    sums = Values(
        lambda: expected()[:1],
        tolerance=math.log2(terms[0]) * torch.finfo(torch.float32).eps,
        of=lambda outputs: outputs[:1],
    )
    providers = [
        Provider(name, functools.partial(prepare(f), *inputs), "fastgen", (values, sums))
        if name == "fastgen"
        else Provider(name, functools.partial(prepare(f), *inputs))
        for name, f in functions.items()
    ]
    providers.append(Provider("copy", inputs[-1].detach().clone, "floor"))
    units = UNITS[mode]
    return Workload(
        providers,
        (values,),
        min_bytes=units * elements * DTYPES[dtype].itemsize,
        flops=FLOPS_PER_ELEMENT * (2 if grad else 1) * elements,
        grad=grad,
        notes=notes,
    )
