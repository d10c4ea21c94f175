"""What `autoregressive_inverse` means, in plain torch: each feature once those before it are known, each unit of the network once.

Papamakarios, Pavlakou and Murray, "Masked Autoregressive Flow for Density Estimation", 2017; Kingma et al., "Improving Variational
Inference with Inverse Autoregressive Flow", 2016.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .._schema import AUTOREGRESSIVE_SCALES, SPLINE_TAILS
from ._check import check_main, require
from ._layout import opmath_dtype
from ._masked_network import Network, Program, check_network, read_program, state_size
from ._spline import Numbers, Spline, check_spline, derivatives_of


def autoregressive_inverse(
    input: Tensor,
    program: Tensor,
    weights: Tensor,
    parameters: Tensor,
    constants: Tensor | None,
    scale: int,
    numbers: Sequence[float],
    shift_first: bool,
    multiply: bool,
) -> tuple[Tensor, Tensor]:
    """The output in the dtype of the input; the arithmetic and the log-det in that of the weights."""

    def inverted(given: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
        shift = numbers[3] * outputs[:, 0 if shift_first or outputs.shape[1] == 1 else 1]
        raw = outputs[:, 1 if shift_first and outputs.shape[1] == 2 else 0]
        s, log_s = scale_of(AUTOREGRESSIVE_SCALES[scale], raw, numbers)
        return (given * s + shift, log_s) if multiply else ((given - shift) / s, -log_s)

    return _level_by_level("autoregressive_inverse", input, program, weights, parameters, constants, inverted)


def autoregressive_inverse_spline(
    input: Tensor,
    program: Tensor,
    weights: Tensor,
    parameters: Tensor,
    constants: Tensor | None,
    numbers: Sequence[float],
    num_bins: int,
    derivatives: int,
    tails: int,
    parametrization: int,
    turn: bool,
) -> tuple[Tensor, Tensor]:
    """As :func:`autoregressive_inverse`."""

    def inverted(given: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
        y, packed = given.T, outputs.permute(2, 0, 1)  # [N, features], [N, features, P]
        spline = Spline(y, packed, None, None, None, numbers, num_bins, tails, parametrization, True)
        x, log_det = spline.values(y)
        if turn:
            x = torch.remainder(x, 2 * numbers[1]) - numbers[1]
        return x.T, log_det.T

    return _level_by_level("autoregressive_inverse_spline", input, program, weights, parameters, constants, inverted)


def _level_by_level(
    op: str,
    input: Tensor,
    program: Tensor,
    weights: Tensor,
    parameters: Tensor,
    constants: Tensor | None,
    inverted: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """``inverted``: of y [features, N] and outputs [features, P, N] of a level the x and terms of the log-det."""
    plan = read_program(op, program, weights.numel(), parameters.numel())
    y = input.to(weights.dtype)
    network = Network(plan, weights.new_zeros(plan.rows, input.shape[0]), weights, parameters)
    network.set_constants(constants)
    x, log_det = torch.empty_like(y), weights.new_zeros(input.shape[0], dtype=torch.float64)
    for level, at in enumerate(plan.levels):
        if not at.features:
            network.run(level)
            continue
        outputs = network.run(level).unflatten(0, (at.features, -1))
        features = plan.order[at.feature : at.feature + at.features]
        found, terms = inverted(y[:, features].T, outputs)
        network.set_features(level, found)
        x[:, features] = found.T
        log_det += terms.double().sum(0)
    return x.to(input.dtype), log_det.to(opmath_dtype(weights.dtype))


def scale_of(name: str, raw: Tensor, numbers: Sequence[float]) -> tuple[Tensor, Tensor]:
    """(s, log s)."""
    bound, offset, eps, gain = numbers
    a = gain * raw
    if name == "none":
        return torch.ones_like(a), torch.zeros_like(a)
    if name == "sigmoid":
        s = torch.sigmoid(a + offset) + eps
        return s, s.log()
    if name == "softplus":
        s = (F.softplus(a) + eps).clamp_max(bound)
        return s, s.log()
    log_s = {
        "exp": lambda: a,
        "tanh": lambda: bound * torch.tanh(a),
        "soft_tanh": lambda: bound * torch.tanh(a / bound),
        "atan": lambda: 0.636 * bound * torch.atan(a),  # of FrEIA, not 2 / pi
        "sigmoid_centered": lambda: bound * torch.tanh(a / 2),
        "soft_clip": lambda: a / (1 + (a / bound).abs()),
    }[name]()
    return log_s.exp(), log_s


def autoregressive_inverse_advance(
    state: Tensor,
    known: Tensor,
    program: Tensor,
    weights: Tensor,
    parameters: Tensor,
    constants: Tensor | None,
    level: int,
    outputs: int,
) -> Tensor:
    plan = read_program("autoregressive_inverse_advance", program, weights.numel(), parameters.numel())
    samples = known.shape[0]
    network = Network(plan, state[: plan.rows * samples].view(plan.rows, samples), weights, parameters)
    if level == 0:
        network.set_constants(constants)
    else:
        network.set_features(level - 1, known.T)
    return network.run(level).T.contiguous()


def _check_input(
    op: str, input: Tensor, program: Tensor, weights: Tensor, parameters: Tensor, constants: Tensor | None
) -> Program | None:
    """What a whole inverse asks of its input and its network; the plan, where its values are at hand."""
    check_main(op, "input", input)
    require(op, input.dim() == 2, f"input must be [N, D], got shape {tuple(input.shape)}")
    plan = check_network(op, input, program, weights, parameters, constants)
    if plan is not None:
        require(op, input.shape[1] == plan.features, f"input must be [N, {plan.features}], got {tuple(input.shape)}")
    return plan


def autoregressive_inverse_check(
    input: Tensor,
    program: Tensor,
    weights: Tensor,
    parameters: Tensor,
    constants: Tensor | None,
    scale: int,
    numbers: Sequence[float],
    shift_first: bool,
    multiply: bool,
) -> None:
    op = "autoregressive_inverse"
    plan = _check_input(op, input, program, weights, parameters, constants)
    known = 0 <= scale < len(AUTOREGRESSIVE_SCALES)
    require(op, known, f"scale must be an index of AUTOREGRESSIVE_SCALES, got {scale}")
    fits = len(numbers) == 4 and numbers[0] > 0
    require(op, fits, f"numbers must be bound > 0, offset, eps and gain, got {list(numbers)}")
    if plan is None:
        return
    each = 1 if AUTOREGRESSIVE_SCALES[scale] == "none" else 2
    for level in plan.levels:
        fits = level.outputs in (each * level.features, 2 * level.features)
        require(op, fits, f"program must have {each} outputs a feature")


def autoregressive_inverse_spline_check(
    input: Tensor,
    program: Tensor,
    weights: Tensor,
    parameters: Tensor,
    constants: Tensor | None,
    numbers: Sequence[float],
    num_bins: int,
    derivatives: int,
    tails: int,
    parametrization: int,
    turn: bool,
) -> None:
    op = "autoregressive_inverse_spline"
    plan = _check_input(op, input, program, weights, parameters, constants)
    check_spline(op, numbers, num_bins, tails, parametrization)
    counts = derivatives_of(SPLINE_TAILS[tails], num_bins)
    require(op, derivatives in counts, f"derivatives must be {counts[0]}, got {derivatives}")
    n = Numbers(*numbers)
    require(op, not turn or n.left == -n.right, f"turn must have a box of -bound to bound, got {numbers[:2]}")
    if plan is None:
        return
    each = 2 * num_bins + derivatives
    for level in plan.levels:
        require(op, level.outputs == each * level.features, f"program must have {each} outputs a feature")


def autoregressive_inverse_advance_check(
    state: Tensor,
    known: Tensor,
    program: Tensor,
    weights: Tensor,
    parameters: Tensor,
    constants: Tensor | None,
    level: int,
    outputs: int,
) -> None:
    op = "autoregressive_inverse_advance"
    check_main(op, "known", known)
    require(op, known.dim() == 2, f"known must be [N, features], got shape {tuple(known.shape)}")
    plan = check_network(op, known, program, weights, parameters, constants)
    fits = state.dim() == 1 and state.is_contiguous() and state.dtype == weights.dtype == known.dtype
    require(op, fits, f"state must be a contiguous vector, and known and state {weights.dtype}")
    require(op, state.device == known.device, f"state must be on the device {known.device}")
    require(op, level >= 0, f"level must not be negative, got {level}")
    if plan is None:
        return
    require(op, level < len(plan.levels), f"level must be in [0, {len(plan.levels)}), got {level}")
    of_level = plan.levels[level].outputs
    require(op, outputs == of_level, f"outputs must be those of the level, {of_level}, got {outputs}")
    before = 0 if level == 0 else plan.levels[level - 1].features
    require(op, known.shape[1] == before, f"known must be [N, {before}] at level {level}, got {tuple(known.shape)}")
    size = state_size(plan.rows, known.shape[0])
    require(op, state.numel() >= size, f"state must have {size} numbers, got {state.numel()}")
    needed = level > 0 or plan.constants == 0 or constants is not None
    require(op, needed, f"constants must be [N, {plan.constants}] at level 0")


def autoregressive_inverse_fake(
    input: Tensor,
    program: Tensor,
    weights: Tensor,
    parameters: Tensor,
    constants: Tensor | None,
    scale: int,
    numbers: Sequence[float],
    shift_first: bool,
    multiply: bool,
) -> tuple[Tensor, Tensor]:
    return input.new_empty(input.shape), weights.new_empty(input.shape[0])


def autoregressive_inverse_spline_fake(
    input: Tensor,
    program: Tensor,
    weights: Tensor,
    parameters: Tensor,
    constants: Tensor | None,
    numbers: Sequence[float],
    num_bins: int,
    derivatives: int,
    tails: int,
    parametrization: int,
    turn: bool,
) -> tuple[Tensor, Tensor]:
    return input.new_empty(input.shape), weights.new_empty(input.shape[0])


def autoregressive_inverse_advance_fake(
    state: Tensor,
    known: Tensor,
    program: Tensor,
    weights: Tensor,
    parameters: Tensor,
    constants: Tensor | None,
    level: int,
    outputs: int,
) -> Tensor:
    return known.new_empty((known.shape[0], outputs))
