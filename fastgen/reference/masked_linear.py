"""What `masked_linear` means, in plain torch: Germain et al., "MADE: Masked Autoencoder for Distribution Estimation", 2015."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ._check import check_floats, check_main, require
from ._layout import opmath_dtype
from ._masked_network import Network, check_network, read_program


def masked_linear_fwd(input: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor) -> Tensor:
    """In the dtype of the input; the arithmetic in fp32, or fp64 for fp64 input."""
    wide = input.to(opmath_dtype(input.dtype)).contiguous()  # or the library rounds otherwise
    y = F.linear(wide, _masked(weight, mask).to(wide.dtype).contiguous(), None if bias is None else bias.to(wide.dtype))
    return y.to(input.dtype)


def masked_linear_bwd(
    grad_output: Tensor, input: Tensor, weight: Tensor, mask: Tensor, wants_input: bool, wants_weight: bool
) -> tuple[Tensor, Tensor]:
    wide = opmath_dtype(input.dtype)
    grad = grad_output.to(wide)
    by_input = (grad @ _masked(weight, mask).to(wide)).to(input.dtype) if wants_input else input.new_empty(0)
    by_weight = _masked(grad.T @ input.to(wide), mask).to(weight.dtype) if wants_weight else weight.new_empty(0)
    return by_input, by_weight


def masked_linear_weight_bwd(
    grad_output: Tensor, input: Tensor, mask: Tensor, rows: Tensor, columns: Tensor, known: Tensor
) -> Tensor:
    """[O, C] in fp32, or fp64 for fp64; the order in which it is computed does not matter here."""
    wide = opmath_dtype(input.dtype)
    return _masked(grad_output.to(wide).T @ input.to(wide), mask)


def masked_linear_pack(weight: Tensor, gather: Tensor, tasks: Tensor, block: int) -> Tensor:
    """[P] in fp32, or fp64 for fp64."""
    flat = torch.nn.functional.pad(weight.reshape(-1), (0, 1))  # the last is what -1 names
    return flat.to(opmath_dtype(weight.dtype)).index_select(0, torch.where(gather < 0, weight.numel(), gather))


def masked_linear_network(
    input: Tensor, program: Tensor, weights: Tensor, parameters: Tensor, constants: Tensor | None, outputs: int
) -> Tensor:
    """[N, outputs] in the dtype of the input; the arithmetic in that of the weights."""
    plan = read_program("masked_linear_network", program, weights.numel(), parameters.numel())
    network = Network(plan, weights.new_zeros(plan.rows, input.shape[0]), weights, parameters)
    network.set_constants(constants)
    network.state[: plan.features] = input.to(weights.dtype).T[plan.order]
    output = weights.new_zeros(input.shape[0], plan.outputs)
    for level, at in enumerate(plan.levels):
        output[:, plan.output_order[at.output : at.output + at.outputs]] = network.run(level).T
    return output.to(input.dtype)


def _masked(t: Tensor, mask: Tensor) -> Tensor:
    return t.masked_fill(~mask, 0)


def masked_linear_fwd_check(input: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor) -> None:
    op = "masked_linear_fwd"
    check_main(op, "input", input)
    require(op, input.dim() == 2, f"input must be [M, C], got shape {tuple(input.shape)}")
    require(op, weight.dim() == 2, f"weight must be [O, C], got shape {tuple(weight.shape)}")
    check_floats(op, input, (weight.shape[0], input.shape[1]), weight=weight)
    check_floats(op, input, (weight.shape[0],), bias=bias)
    fits = mask.dtype == torch.bool and mask.shape == weight.shape and mask.device == input.device
    require(op, fits, f"mask must be boolean {tuple(weight.shape)}, got {mask.dtype}, shape {tuple(mask.shape)}")


def masked_linear_bwd_check(
    grad_output: Tensor, input: Tensor, weight: Tensor, mask: Tensor, wants_input: bool, wants_weight: bool
) -> None:
    masked_linear_fwd_check(input, weight, None, mask)
    check_floats("masked_linear_bwd", input, (input.shape[0], weight.shape[0]), grad_output=grad_output)


def masked_linear_weight_bwd_check(
    grad_output: Tensor, input: Tensor, mask: Tensor, rows: Tensor, columns: Tensor, known: Tensor
) -> None:
    op = "masked_linear_weight_bwd"
    check_main(op, "input", input)
    check_main(op, "grad_output", grad_output)
    fits = input.dim() == grad_output.dim() == 2 and grad_output.shape[0] == input.shape[0]
    fits = fits and grad_output.dtype == input.dtype and grad_output.device == input.device
    require(op, fits, "grad_output must be [M, O] beside input [M, C], in its dtype and on its device")
    outputs, inputs = grad_output.shape[1], input.shape[1]
    fits = mask.dtype == torch.bool and tuple(mask.shape) == (outputs, inputs) and mask.device == input.device
    require(op, fits, f"mask must be boolean [{outputs}, {inputs}], got {mask.dtype}, shape {tuple(mask.shape)}")
    for name, t, count in (("rows", rows, outputs), ("columns", columns, inputs), ("known", known, outputs)):
        fits = t.dtype == torch.int64 and tuple(t.shape) == (count,) and t.is_contiguous() and t.device == input.device
        require(op, fits, f"{name} must be contiguous int64 [{count}], got {t.dtype}, shape {tuple(t.shape)}")


def masked_linear_pack_check(weight: Tensor, gather: Tensor, tasks: Tensor, block: int) -> None:
    op = "masked_linear_pack"
    check_main(op, "weight", weight)
    fits = weight.dim() == 2 and weight.is_contiguous()
    require(op, fits, f"weight must be contiguous [O, C], got shape {tuple(weight.shape)}")
    fits = gather.dtype == torch.int32 and gather.dim() == 1 and gather.is_contiguous()
    fits = fits and gather.device == weight.device
    require(op, fits, f"gather must be a contiguous int32 vector, got {gather.dtype}, shape {tuple(gather.shape)}")
    fits = tasks.dtype == torch.int64 and tasks.dim() == 2 and tasks.shape[1] == 2 and tasks.is_contiguous()
    fits = fits and (tasks.is_cpu or tasks.device == weight.device)
    require(op, fits, f"tasks must be contiguous int64 [T, 2], got {tasks.dtype}, shape {tuple(tasks.shape)}")
    require(op, block >= 1, f"block must be positive, got {block}")
    require(op, weight.numel() < 2**31 - 1, "weight must have fewer than 2^31 - 1 numbers")
    if tasks.is_cpu and not isinstance(tasks, FakeTensor):
        sizes, count = tasks.tolist(), gather.shape[0]
        fits = all(min(size) >= 0 for size in sizes) and sum(known * units for known, units in sizes) == count
        require(op, fits, f"tasks must be as many numbers as gather has places, {count}, got {sizes}")
    if gather.is_cpu and gather.numel() and not isinstance(gather, FakeTensor):
        low, high = int(gather.min()), int(gather.max())
        require(op, low >= -1 and high < weight.numel(), f"gather must be in [-1, {weight.numel()}), got {low}, {high}")


def masked_linear_network_check(
    input: Tensor, program: Tensor, weights: Tensor, parameters: Tensor, constants: Tensor | None, outputs: int
) -> None:
    op = "masked_linear_network"
    check_main(op, "input", input)
    require(op, input.dim() == 2, f"input must be [N, D], got shape {tuple(input.shape)}")
    plan = check_network(op, input, program, weights, parameters, constants)
    if plan is not None:
        require(op, input.shape[1] == plan.features, f"input must be [N, {plan.features}], got {tuple(input.shape)}")
        require(op, outputs == plan.outputs, f"outputs must be the program's, {plan.outputs}, got {outputs}")


def masked_linear_fwd_fake(input: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor) -> Tensor:
    return input.new_empty((input.shape[0], weight.shape[0]))


def masked_linear_bwd_fake(
    grad_output: Tensor, input: Tensor, weight: Tensor, mask: Tensor, wants_input: bool, wants_weight: bool
) -> tuple[Tensor, Tensor]:
    by_input = input.new_empty(input.shape if wants_input else 0)
    return by_input, weight.new_empty(weight.shape if wants_weight else 0)


def masked_linear_weight_bwd_fake(
    grad_output: Tensor, input: Tensor, mask: Tensor, rows: Tensor, columns: Tensor, known: Tensor
) -> Tensor:
    return input.new_empty((grad_output.shape[1], input.shape[1]), dtype=opmath_dtype(input.dtype))


def masked_linear_pack_fake(weight: Tensor, gather: Tensor, tasks: Tensor, block: int) -> Tensor:
    return weight.new_empty(gather.shape[0], dtype=opmath_dtype(weight.dtype))


def masked_linear_network_fake(
    input: Tensor, program: Tensor, weights: Tensor, parameters: Tensor, constants: Tensor | None, outputs: int
) -> Tensor:
    return input.new_empty((input.shape[0], outputs))
