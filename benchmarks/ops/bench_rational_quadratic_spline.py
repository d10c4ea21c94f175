"""`rational_quadratic_spline`, K = 8, beside the splines of nflows, zuko and flowjax: a table and half of the channels of an
image, both ways, inference and training (flowjax: the table, inference).

A peer is called as its own layers call it: nflows splits the output of a conditioner into three views, of an image after a
permutation, and gathers the channels that it transforms; zuko makes a transform of three tensors. Where a peer cannot be
compiled whole the row says so. flowjax is jitted, with one spline an element as its own layers have it; its values come from
another process, which takes a small part of its time. The floor is a clone of the parameters.
"""

import functools
import math
from collections.abc import Callable

import torch
from nflows.transforms.splines.rational_quadratic import unconstrained_rational_quadratic_spline
from torch import Tensor
from zuko.transforms import MonotonicRQSTransform

from fastgen.ops import rational_quadratic_spline

from ..cases import DTYPES, Case, Provider, Workload, compiled, random_tensor
from ..flowjax_peer import started
from ..verify import Values

BINS = 8
PARAMETERS = 3 * BINS - 1
BOUND = 3.0
TABLE, IMAGE = (
    (4096, 64),
    (16, 24, 32, 32),
)  # 262,144 elements, and 196,608 of which every second channel is transformed
MODES = ("forward", "inverse", "backward")
FORMS = {"nflows": (TABLE, IMAGE), "zuko": (TABLE,)}
FLOPS = 16 * 15 + 150  # nominal, an element: sixteen exponentials, and the rest

Function = Callable[..., tuple[Tensor, Tensor]]


def rows(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """[N, C', *spatial, P] of the output of a conditioner, [N, C' P, *spatial]."""
    if len(shape) == 2:
        return packed.reshape(shape[0], -1, PARAMETERS)
    n, channels, *space = shape
    return packed.reshape(n, channels // 2, PARAMETERS, *space).permute(0, 1, 3, 4, 2)


def parts(packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return packed[..., :BINS], packed[..., BINS : 2 * BINS], packed[..., 2 * BINS :]


def by_nflows(x: Tensor, packed: Tensor, *, inverse: bool = False) -> tuple[Tensor, Tensor]:
    parameters = rows(packed, tuple(x.shape))
    if x.dim() == 2:
        y, log_det = unconstrained_rational_quadratic_spline(x, *parts(parameters), inverse=inverse, tail_bound=BOUND)
        return y, log_det.sum(1)
    identity, transformed = torch.arange(0, x.shape[1], 2), torch.arange(1, x.shape[1], 2)
    chosen = x[:, transformed]
    y, log_det = unconstrained_rational_quadratic_spline(chosen, *parts(parameters), inverse=inverse, tail_bound=BOUND)
    output = torch.empty_like(x)
    output[:, identity] = x[:, identity]
    output[:, transformed] = y
    return output, log_det.flatten(1).sum(1)


def by_zuko(x: Tensor, packed: Tensor, *, inverse: bool = False) -> tuple[Tensor, Tensor]:
    transform = MonotonicRQSTransform(*parts(rows(packed, tuple(x.shape))), bound=BOUND)
    y, log_det = (transform.inv if inverse else transform).call_and_ladj(x)
    return y, log_det.sum(1)


PEERS: dict[str, Function] = {"nflows": by_nflows, "zuko": by_zuko}


def ours(x: Tensor, packed: Tensor, *, mask: Tensor | None, form: str, inverse: bool = False) -> tuple[Tensor, Tensor]:
    parameters = rows(packed, tuple(x.shape))
    return rational_quadratic_spline(x, parameters, bound=BOUND, mask=mask, parametrization=form, inverse=inverse)


def cases(device: torch.device, full: bool) -> list[Case]:
    """3 modes x (2 shapes of nflows, 1 of zuko), in float32 and, of the table, bfloat16; flowjax's on a CPU, both ways."""
    listed = [
        Case(
            "rational_quadratic_spline",
            f"{form} {mode}",
            shape,
            dtype,
            functools.partial(build, form, mode, shape, dtype, device),
            f"spline of {form}, {'forward and backward' if mode == 'backward' else mode}",
            layout="NCHW" if len(shape) > 2 else "NC",
        )
        for form, shapes in FORMS.items()
        for mode in MODES
        for shape in shapes
        for dtype in ("fp32", "bf16")
        if dtype == "fp32" or (shape == TABLE and device.type == "cuda")
    ]
    if device.type == "cpu":
        listed += [
            Case(
                "rational_quadratic_spline", f"flowjax {mode}", TABLE, "fp32",
                functools.partial(build_flowjax, mode == "inverse"), f"spline of flowjax, {mode}", layout="NC",
            )
            for mode in ("forward", "inverse")
        ]  # fmt: skip
    return listed


def build(
    form: str, mode: str, shape: tuple[int, ...], dtype: str, device: torch.device, allow_compile: bool
) -> Workload:
    grad, inverse = mode == "backward", mode == "inverse"
    channels = shape[1] if shape == TABLE else shape[1] // 2
    x = random_tensor(shape, device, dtype, seed=0)
    # of much larger parameters a few elements are so steep that the largest error, ours or the peer's, is a matter of chance
    packed = random_tensor((shape[0], channels * PARAMETERS, *shape[2:]), device, dtype, seed=1, deviation=0.2)
    inputs = [t.requires_grad_(grad) for t in (x, packed)]
    grads = (random_tensor(shape, device, dtype, seed=2), random_tensor(shape[:1], device, "fp32", seed=3))
    mask = None if shape == TABLE else torch.arange(1, shape[1], 2, device=device)
    functions: dict[str, Function] = {form: functools.partial(PEERS[form], inverse=inverse)}
    notes: list[str] = []
    if function := compiled(functions[form], inputs, allow_compile, notes, grad=grad):
        functions["compile"] = function
    functions["fastgen"] = functools.partial(ours, mask=mask, form=form, inverse=inverse)

    def prepare(function: Function) -> Callable[..., tuple[Tensor, ...]]:
        def forward_and_backward(*args: Tensor) -> tuple[Tensor, ...]:
            outputs = function(*args)
            return *outputs, *torch.autograd.grad(
                outputs, args, [g.to(o.dtype) for g, o in zip(grads, outputs, strict=True)]
            )

        return forward_and_backward if grad else function

    def expected() -> tuple[Tensor, ...]:
        wide = [t.detach().double().requires_grad_(grad) for t in inputs]
        with torch.set_grad_enabled(grad):
            return prepare(functions["fastgen"])(*wide)

    providers = [
        Provider(name, functools.partial(prepare(f), *inputs), "fastgen" if name == "fastgen" else "baseline")
        for name, f in functions.items()
    ]
    providers.append(Provider("copy", packed.detach().clone, "floor"))
    elements, transformed = math.prod(shape), math.prod(shape) * channels // shape[1]
    # read and write an element and its parameters: all once, in training the parameters twice and their gradient once
    units = 2 * elements + PARAMETERS * transformed if not grad else 6 * elements + 3 * PARAMETERS * transformed
    terms = [1, transformed // shape[0], 1, 1][: 4 if grad else 2]
    return Workload(
        providers,
        (Values(expected, yardstick=form, terms=terms),),
        min_bytes=units * DTYPES[dtype].itemsize,
        flops=FLOPS * transformed * (3 if grad else 1),
        grad=grad,
        notes=notes,
    )


def build_flowjax(inverse: bool, allow_compile: bool) -> Workload:
    """Its bins are at least 1e-3 wide, whatever the box; all knots have slopes, of which those at the ends are left at 1."""
    notes: list[str] = []
    peer = started(allow_compile, notes)
    cpu = torch.device("cpu")
    x = random_tensor(TABLE, cpu, "fp32", seed=0)
    numbers = random_tensor((*TABLE, 3 * BINS + 1), cpu, "fp32", seed=1, deviation=0.2)
    numbers[..., [2 * BINS, -1]] = 0.0
    # flowjax adds them to the parameters of the identity; a layer of ours has them as they are
    packed = torch.cat([numbers[..., : 2 * BINS], numbers[..., 2 * BINS + 1 : -1] + math.log(math.expm1(1 - 1e-3))], -1)
    least = 1e-3 / (2 * BOUND)

    def spline(x: Tensor, packed: Tensor) -> tuple[Tensor, Tensor]:
        return rational_quadratic_spline(
            x, packed, bound=BOUND, min_bin_width=least, min_bin_height=least, inverse=inverse
        )

    providers = [
        Provider("fastgen", functools.partial(spline, x, packed), "fastgen"),
        Provider("copy", packed.detach().clone, "floor"),
    ]
    if peer is not None:
        peer("spline", x.numpy(), numbers.numpy(), BOUND, inverse)
        providers.insert(0, Provider("flowjax", lambda: tuple(map(torch.tensor, peer("run")))))
    elements = math.prod(TABLE)
    return Workload(
        providers,
        (Values(lambda: spline(x.double(), packed.double()), tolerance=1e-5),),
        min_bytes=4 * elements * (2 + PARAMETERS),
        flops=FLOPS * elements,
        notes=notes,
    )
