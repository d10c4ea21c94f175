"""Training of flows: a step of Glow beside normflows, nflows and FrEIA; 32 layers in the memory of one beside stored ones."""

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.profiler import profile

from fastgen.flows import ActNorm, AffineCoupling, Compose, ConvNet, GlowStep, ResidualMLP, Transform, reversible
from fastgen.flows.gradients import parameters_of
from tests import peers

from ..cases import Case, Provider, Workload, random_tensor
from ..verify import Values

BOUND = 1e-4  # of outputs and gradients in fp32, whose convolutions sum over hundreds of channels
DEPTH = 32
# [N, C, H, W] that a step sees after the first squeeze of CIFAR-10, by the channels of its networks: normflows' example has 256,
# the paper 512.
STEPS = {64: (64, 12, 16, 16), 256: (64, 12, 16, 16), 512: (16, 12, 16, 16)}
STACKS = {"RealNVP": (2048, 64), "Glow": (16, 12, 16, 16)}
HIDDEN = {"RealNVP": 256, "Glow": 128}  # features or channels of the networks


def cases(device: torch.device, full: bool) -> list[Case]:
    steps = [
        Case(
            "glow_step", f"{hidden} hidden channels{', P L U' if parametrization == 'plu' else ''}", shape, "fp32",
            functools.partial(build_step, hidden, parametrization, shape, device), "a step of Glow, forward and backward",
        )
        for hidden, shape in STEPS.items()
        for parametrization in ("direct", "plu")
        if full or hidden == 256 or (hidden, parametrization) == (512, "direct")
    ]  # fmt: skip
    stacks = [
        Case(
            "reversible", f"{DEPTH} layers of {kind}", shape, "fp32",
            functools.partial(build_stack, kind, shape, device), f"{DEPTH} layers in the memory of one, forward and backward",
        )
        for kind, shape in STACKS.items()
    ]  # fmt: skip
    return steps + stacks


def build_step(
    hidden: int, parametrization: str, shape: tuple[int, ...], device: torch.device, allow_compile: bool
) -> Workload:
    torch.manual_seed(0)  # weights that do not depend on what ran before
    channels, notes = shape[1], []
    steps: dict[str, Any] = {}
    for name, make in (("normflows", _normflows), ("nflows", _nflows), ("FrEIA", _freia)):
        try:
            steps[name] = make(channels, hidden, shape[2:])
        except ImportError as error:
            notes.append(f"{name} is left out: {error}")
    network = ConvNet(channels // 2, channels, hidden_channels=hidden)
    coupling = AffineCoupling(network, scale_fn="sigmoid")
    steps["fastgen"] = GlowStep(channels, coupling, parametrization=parametrization)
    x = random_tensor(shape, device, "fp32", seed=3).requires_grad_()
    y_grad = random_tensor(shape, device, "fp32", seed=4)
    providers = []
    for name, step in steps.items():
        step = _filled(step).to(device).train()
        step(x)  # actnorms see their first batch
        wide = copy.deepcopy(step).double()
        expected = Values(
            functools.partial(train, wide, x.detach().double().requires_grad_(), y_grad.double()), tolerance=BOUND
        )
        role = "fastgen" if name == "fastgen" else "baseline"
        providers.append(Provider(name, functools.partial(train, step, x, y_grad), role, (expected,)))
    pixels = shape[0] * shape[2] * shape[3]
    multiply_adds = 9 * (channels // 2) * hidden + hidden**2 + 9 * hidden * channels + channels**2
    return Workload(
        providers, (), min_bytes=10 * x.nbytes, flops=3 * 2 * pixels * multiply_adds, grad=True, notes=notes
    )  # fmt: skip


def build_stack(kind: str, shape: tuple[int, ...], device: torch.device, allow_compile: bool) -> Workload:
    torch.manual_seed(0)  # weights that do not depend on what ran before
    layers = _layers(kind, shape[1], DEPTH)
    stored = _filled(Compose(layers), size=0.003).to(device).eval()
    thrifty = reversible(stored.layers)
    x = random_tensor(shape, device, "fp32", seed=3).requires_grad_()
    y_grad = random_tensor(shape, device, "fp32", seed=4)
    wide = copy.deepcopy(stored).double()
    notes = []
    if device.type == "cpu":
        one = _filled(Compose(_layers(kind, shape[1], 1)), size=0.003).eval()
        sizes = [peak_bytes(lambda step=step: train(step, x, y_grad)) for step in (thrifty, stored, one)]
        gradients = 4 * (sum(p.numel() for p in stored.parameters()) - sum(p.numel() for p in one.parameters()))
        mib = [size / 2**20 for size in (sizes[0] - gradients, sizes[1] - gradients, sizes[2] + x.nbytes)]
        notes.append(
            f"peak memory without the gradients of {DEPTH - 1} layers' weights: reversible {mib[0]:.1f} MiB, stored {mib[1]:.1f}, "
            f"one layer and the input {mib[2]:.1f}: {mib[0] / mib[2]:.2f} of it"
        )
    expected = Values(
        functools.partial(train, wide, x.detach().double().requires_grad_(), y_grad.double()), tolerance=BOUND
    )
    calls = {"stored": stored, "fastgen": thrifty}
    return Workload(
        [
            Provider(name, functools.partial(train, step, x, y_grad), "fastgen" if name == "fastgen" else "baseline")
            for name, step in calls.items()
        ],
        (expected,),
        min_bytes=2 * x.nbytes,
        flops=3 * 2 * (x.numel() // shape[1]) * sum(p.numel() for p in stored.parameters()),
        grad=True,
        notes=notes,
    )


def train(step: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor, y_grad: Tensor) -> tuple[Tensor, ...]:
    """Forward and backward of a loss that sees output and log-det: (output, log-det, gradient of x, that of a last layer's weight).

    That weight's gradient is continuous: one before a ReLU jumps by a term where float32 and float64 differ on the sign.
    """
    weights = list(dict.fromkeys(p for p in parameters_of(step) if p.requires_grad))  # type: ignore[arg-type]
    y, log_det = step(x)
    gradients = torch.autograd.grad((y, log_det), (x, *weights), (y_grad, -torch.ones_like(log_det)), allow_unused=True)
    narrowing = [i for i, weight in enumerate(weights) if weight.dim() > 1 and weight.shape[0] < weight.shape[1]]
    last = max(narrowing, key=lambda i: weights[i].numel())
    return y.detach(), log_det.detach(), gradients[0], gradients[1 + last]


def peak_bytes(function: Callable[[], Any]) -> int:
    """The most memory that a call holds at once, by the allocations that the profiler sees."""
    function()
    with profile(profile_memory=True, use_kineto=True) as profiler:
        function()
    now = most = 0
    for event in profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def _layers(kind: str, width: int, depth: int) -> list[Transform]:
    layers: list[Transform] = []
    for i in range(depth):
        if kind == "Glow":
            network: nn.Module = ConvNet(width // 2, width, hidden_channels=HIDDEN[kind])
            layers.append(GlowStep(width, AffineCoupling(network, scale_fn="sigmoid")))
        else:
            network = ResidualMLP(width // 2, width, hidden_features=HIDDEN[kind])
            mask = "first_half" if i % 2 else "second_half"
            layers.append(Compose([ActNorm(width), AffineCoupling(network, mask=mask, scale_fn="tanh")]))
    return layers


class _Step(nn.Module):
    """A peer's step, called as ours is."""

    def __init__(self, step: nn.Module, call: Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.step, self.call = step, call

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.call(self.step, x)


def _normflows(channels: int, hidden: int, size: Sequence[int]) -> nn.Module:
    block = peers.load("normflows").flows.GlowBlock(channels, hidden)
    return _Step(block, lambda step, x: step.inverse(x))  # type: ignore[operator]


def _nflows(channels: int, hidden: int, size: Sequence[int]) -> nn.Module:
    transforms = peers.load("nflows.transforms")
    mask = [0] * (channels // 2) + [1] * (channels - channels // 2)

    class Network(nn.Sequential):
        def forward(self, x: Tensor, context: None = None) -> Tensor:
            return super().forward(x)

    def network(inputs: int, outputs: int) -> nn.Module:
        return Network(*_convolutions(inputs, outputs, hidden))

    return transforms.CompositeTransform(
        [
            transforms.ActNorm(channels),
            transforms.OneByOneConvolution(channels),
            transforms.AffineCouplingTransform(mask, network),
        ]
    )


def _freia(channels: int, hidden: int, size: Sequence[int]) -> nn.Module:
    def network(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(*_convolutions(inputs, outputs, hidden))

    # A scale of 1 would leave a log-det near 0, which is a difference of thousands of terms.
    block = peers.load("FrEIA.modules").AllInOneBlock(
        [(channels, *size)], subnet_constructor=network, global_affine_init=0.9, permute_soft=True
    )

    def call(step: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        (y,), log_det = step([x])
        return y, log_det

    return _Step(block, call)


def _convolutions(inputs: int, outputs: int, hidden: int) -> list[nn.Module]:
    last = nn.Conv2d(hidden, outputs, 3, padding=1)
    nn.init.zeros_(last.weight)  # as Glow's: `_filled` fills it
    return [
        nn.Conv2d(inputs, hidden, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(hidden, hidden, 1),
        nn.ReLU(),
        last,
    ]


def _filled(step: Any, size: float = 0.005) -> Any:
    """``step`` with noise where its last layers are zeros: else its scales are constants and a comparison proves nothing.

    Small noise: of millions of values some are within a rounding of a ReLU's kink, and float32 and float64 may take different sides
    of it. What one unit adds to a gradient has to stay below the bar.
    """
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in step.parameters():
            if parameter.dim() > 1 and not parameter.any():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise * size / parameter[0].numel() ** 0.5)
    return step
