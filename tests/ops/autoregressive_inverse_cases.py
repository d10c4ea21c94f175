"""Arguments of `autoregressive_inverse` for its tests on every device, and the D-pass loop that it stands in for."""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastgen import _dispatch
from fastgen._schema import AUTOREGRESSIVE_SCALES
from fastgen.ops import autoregressive_inverse, autoregressive_inverse_state
from fastgen.reference._spline import Spline
from fastgen.reference.autoregressive_inverse import scale_of

from ._made import Network, made
from .families import Call, OfTensors
from .numerics import DTYPES, dtype_name, randn

# scale_fn -> its numbers, as their libraries have them.
SCALES: dict[str, dict[str, float]] = {
    "none": {},
    "exp": {},
    "tanh": {"bound": 1.5},
    "soft_tanh": {"bound": 2.0, "gain": 0.1},  # FrEIA's AllInOneBlock
    "atan": {"bound": 2.0},  # FrEIA
    "sigmoid_centered": {"bound": 2.0},
    "soft_clip": {"bound": -math.log(1e-3)},  # zuko
    "sigmoid": {"offset": 2.0, "eps": 1e-3},  # normflows
    "softplus": {"eps": 1e-3},  # nflows
}


def numbers_of(scale_fn: str) -> list[float]:
    given = SCALES[scale_fn]
    return [given.get("bound", math.inf), given.get("offset", 0.0), given.get("eps", 0.0), given.get("gain", 1.0)]


def loop(
    net: Network, y: Tensor, scale_fn: str, *, shift_first: bool = False, multiply: bool = False
) -> tuple[Tensor, Tensor]:
    """As nflows has it: D passes through the whole network, in the dtype of ``y``."""
    x, log_det = torch.zeros_like(y), y.new_zeros(len(y))
    for _ in range(net.features):
        both = net.outputs(x).unflatten(1, (net.features, net.per_feature))
        raw, shift = both[..., int(shift_first) % net.per_feature], both[..., 0 if shift_first else -1]
        numbers = numbers_of(scale_fn)
        s, log_s = scale_of(scale_fn, raw, numbers)
        shift = shift * numbers[3]
        x = y * s + shift if multiply else (y - shift) / s
        log_det = log_s.sum(1) if multiply else -log_s.sum(1)
    return x, log_det


def operands(net: Network, dtype: torch.dtype) -> dict[str, Any]:
    """program, weights, parameters and constants by name, for an input of ``dtype``."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    program = net.program(stepwise=True)
    return dict(zip(("program", "weights", "parameters", "constants"), net.operands(program, wide), strict=True))


def arguments(
    samples: int, dtype: torch.dtype, scale_fn: str = "softplus", *flags: bool, **options: Any
) -> tuple[Any, ...]:
    """Of the raw op."""
    context = options.pop("context", True)
    net = made(samples=samples if context else 0, **options)
    y = randn(samples, net.features, seed=7).to(dtype)
    code, both = AUTOREGRESSIVE_SCALES.index(scale_fn), flags or (False, False)
    return (y, *operands(net, dtype).values(), code, numbers_of(scale_fn), *both)


BINS = 4
SPLINE_BOX = [-1.5, 1.5, -1.5, 1.5, 1e-2, 2e-2, 1e-2, 0.5]
# name -> derivatives, tails, parametrization and turn of the raw op: K - 1 slopes or K + 1, as their libraries have them.
SPLINES: dict[str, tuple[int, int, int, bool]] = {
    "linear": (BINS - 1, 0, 0, False),  # nflows
    "linear, ends given": (BINS + 1, 0, 0, False),
    "circular": (BINS, 1, 0, False),  # normflows
    "bounded": (BINS + 1, 2, 0, False),
    "zuko": (BINS - 1, 0, 1, False),
    "zuko, circular": (BINS - 1, 0, 1, True),
}


def spline_net(name: str, samples: int = 0, **options: Any) -> Network:
    return made(samples=samples, per_feature=2 * BINS + SPLINES[name][0], **{"scale": 0.3, **options})


def spline_arguments(
    samples: int, dtype: torch.dtype, name: str = "linear", context: bool = True, size: float = 1.0, **options: Any
) -> tuple[Any, ...]:
    """Of the raw op; in a bounded box all of the input lies inside. Rounding is amplified near an end: ``size`` scales inputs."""
    net = spline_net(name, samples if context else 0, **options)
    y = size * randn(samples, net.features, seed=7)
    y = (y.clamp(-1.49, 1.49) if name == "bounded" else y).to(dtype)
    derivatives, *codes = SPLINES[name]
    return (y, *operands(net, dtype).values(), SPLINE_BOX, BINS, derivatives, *codes)


def spline_loop(net: Network, y: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """D passes through the whole network, in the dtype of ``y``, each by the spline's own reference."""
    _, tails, parametrization, turn = SPLINES[name]
    x, log_det = torch.zeros_like(y), y.new_zeros(len(y))
    for _ in range(net.features):
        packed = net.outputs(x).unflatten(1, (net.features, net.per_feature))
        spline = Spline(y, packed, None, None, None, SPLINE_BOX, BINS, tails, parametrization, True)
        x, terms = spline.values(y)
        x = torch.remainder(x, 3.0) - 1.5 if turn else x
        log_det = terms.sum(1)
    return x, log_det


def advance(level: int = 4, samples: int = 3, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """Of the raw op at one level, by default the last, which reads the ends of weights and parameters."""
    net = made(samples=samples)
    program = net.program(stepwise=True)
    given = net.operands(program, dtype)
    state = autoregressive_inverse_state(program.rows, samples, like=given[1])
    known = randn(samples, len(program.levels[level - 1]) if level else 0).to(dtype)
    return (state, known, *given, level, program.outputs[level])


def example(dtype: torch.dtype) -> dict[str, Any]:
    net = made(samples=4)
    return {"input": randn(4, 5, seed=7).to(dtype), **operands(net, dtype), "scale_fn": "softplus", "eps": 1e-3}


NO_GRADIENT = True
OWN_DTYPE = (1,)  # the log-det is in the dtype of the weights
UNSEEN = {
    "autoregressive_inverse_advance": advance,
    "autoregressive_inverse_spline": partial(spline_arguments, 4, torch.float32),
}
REFUSED = [
    ("autoregressive_inverse", {"scale": 9}, "scale must be"),
    ("autoregressive_inverse", {"scale": -1}, "scale must be"),
    ("autoregressive_inverse", {"numbers": [1.0, 0.0, 0.0]}, "numbers must be"),
    ("autoregressive_inverse", {"numbers": [0.0, 0.0, 0.0, 1.0]}, "numbers must be"),
    ("autoregressive_inverse", {"numbers": [math.nan, 0.0, 0.0, 1.0]}, "numbers must be"),
    ("autoregressive_inverse", {"constants": None}, "constants must be"),
    ("autoregressive_inverse_spline", {"numbers": SPLINE_BOX[:7]}, "numbers must be"),
    ("autoregressive_inverse_spline", {"numbers": [SPLINE_BOX[1], *SPLINE_BOX[1:]]}, "the box must"),
    ("autoregressive_inverse_spline", {"numbers": [*SPLINE_BOX[:4], 0.3, *SPLINE_BOX[5:]]}, "min_bin_width and"),
    ("autoregressive_inverse_spline", {"numbers": [*SPLINE_BOX[:6], 1.0, 1.0]}, "min_derivative must be"),
    ("autoregressive_inverse_spline", {"num_bins": 0}, "num_bins must be"),
    ("autoregressive_inverse_spline", {"derivatives": 4}, "derivatives must be"),
    ("autoregressive_inverse_spline", {"derivatives": 5}, "program must have 13"),
    ("autoregressive_inverse_spline", {"tails": 3}, "tails must be"),
    ("autoregressive_inverse_spline", {"parametrization": 2}, "parametrization must be"),
    ("autoregressive_inverse_spline", {"numbers": [-1.0, *SPLINE_BOX[1:]], "turn": True}, "turn must have"),
    ("autoregressive_inverse_spline", {"constants": None}, "constants must be"),
    ("autoregressive_inverse_advance", {"level": 5}, "level must be"),
    ("autoregressive_inverse_advance", {"level": -1}, "level must"),
    ("autoregressive_inverse_advance", {"outputs": 3}, "outputs must be"),
]


def harmless(op: str, name: str, how: str, arguments: dict[str, Any]) -> bool:
    """There may be more weights and state than are used."""
    return name in ("weights", "parameters", "state") and how == "dimension 0 too long"


def unknown_to_fakes(op: str, name: str, how: str) -> bool:
    """The program says how large these are."""
    sizes = ("program", "weights", "parameters", "constants", "state", "known", "input")
    return how.startswith("dimension") and name in sizes


_NET = made()
_OPERANDS = operands(_NET, torch.float32)
MAPPED = OfTensors(  # of whole numbers, since the op has no gradients
    lambda eighths: autoregressive_inverse(eighths / 8, **_OPERANDS, scale_fn="softplus", eps=1e-3),
    lambda k: [(8 * randn(4, 5, seed=k)).long()],
)


EXPORTED = {
    "autoregressive_inverse": OfTensors(
        lambda y: autoregressive_inverse(y, **_OPERANDS, scale_fn="softplus", eps=1e-3), lambda n: [randn(n, 5).float()]
    )
}


def calls() -> Iterator[Call]:
    for scale_fn in SCALES:
        if scale_fn == "atan":
            continue  # which Triton has not
        yield Call(f"{scale_fn} fp32", "autoregressive_inverse", partial(arguments, 5, torch.float32, scale_fn))
    for dtype in DTYPES:
        yield Call(dtype_name(dtype), "autoregressive_inverse", partial(arguments, 3, dtype, "sigmoid", True, True))
    for name in SPLINES:
        yield Call(
            f"{name} fp32", "autoregressive_inverse_spline", partial(spline_arguments, 5, torch.float32, name, size=0.6)
        )
    for dtype in DTYPES:
        yield Call(dtype_name(dtype), "autoregressive_inverse_spline", partial(spline_arguments, 3, dtype))
    several = partial(arguments, 20, torch.float32, context=False, order=[2, 1, 2, 3, 1], features=5)
    yield Call("levels of several features", "autoregressive_inverse", several)


def check_level_by_level(kernels):
    """The state lies on the device: all levels at once, each against the reference."""

    def levels(*args: Tensor) -> list[Tensor]:
        state, program, weights, parameters, constants, *known = args
        function, found = _dispatch.Triton.kernel("autoregressive_inverse_advance"), []
        for level, features in enumerate(known):
            beside = constants if level == 0 else None
            found.append(function(state, features, program, weights, parameters, beside, level, 2))
        return found

    net = made(samples=20)
    for dtype in (torch.float32, torch.float64):
        program, given = net.program(stepwise=True), operands(net, dtype)
        state = autoregressive_inverse_state(program.rows, 20, like=given["weights"])
        x = randn(20, 5, seed=3).to(dtype)
        found = kernels.on_device(levels)(state, *given.values(), x[:, :0], *x[:, :4].split(1, 1))
        whole = net.outputs(x.double()).unflatten(1, (5, 2))
        for level, outputs in enumerate(found):
            atol = 1e-12 if dtype == torch.float64 else 2e-5
            torch.testing.assert_close(outputs.double(), whole[:, level], rtol=1e-5, atol=atol)


def check_reasons(kernels):
    atan = arguments(3, torch.float32, "atan")
    assert _dispatch.Triton.reasons("autoregressive_inverse", *atan) == ["Triton has no atan"]


STORES_IN_A_LOOP = {
    "autoregressive_inverse.spline_kernel",
    "autoregressive_inverse.inverse_kernel",
    "autoregressive_inverse.advance_kernel",
    "masked_linear.network_kernel",
}
# Once a task: addresses outside of the loop over its sum, for sm_80; for sm_100 in fp64 what calls of divisions keep.
STACK = {
    "autoregressive_inverse.advance_kernel": {"fp32": 8},
    "autoregressive_inverse.inverse_kernel": {"fp64": 56},
    "masked_linear.network_kernel": {"bf16": 16},
}
NO_STORAGE_TYPE = {"autoregressive_inverse.advance_kernel"}  # all is in the dtype of the arithmetic


def gates(arch: int) -> Iterator[Call]:
    for dtype in DTYPES:
        yield Call(dtype_name(dtype), "autoregressive_inverse", partial(arguments, 64, dtype, hidden=64))
        for name in ("linear", "zuko, circular") if dtype == torch.float32 or arch == 90 else ("circular",):
            call = partial(spline_arguments, 64, dtype, name, hidden=64)
            yield Call(f"{name} {dtype_name(dtype)}", "autoregressive_inverse_spline", call)
    for dtype in (torch.float32, torch.float64):
        yield Call(dtype_name(dtype), "autoregressive_inverse_advance", partial(advance, 0, 3, dtype))
