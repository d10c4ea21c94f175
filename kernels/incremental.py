"""Triton kernel of `incremental`: one program draws one image, from the first pixel to the last.

A barrier of the whole grid takes a microsecond or two, and a pixel has some thirty stages: so images are spread over the
multiprocessors and each stays within one, where a barrier takes nanoseconds. The program of the network is not compiled in: the
kernel reads it, row by row of a table, and does for each instruction what its kind says. The state of an image and the weights
stay in the cache of the GPU, from which each pixel reads the weights of its own taps once, as blocks of BLOCK_K x BLOCK_O times
a vector; of rows, which are matrix products, a tile of BLOCK_M columns uses each weight that is read. Sums are in fp32, or fp64
for fp64. What an instruction has written the next ones read after a barrier: each is a stage by itself.

On a GPU nobody asks whether logits are finite, since that would be to wait: where none can be drawn the pixel and its
log-probability are NaN, and so is what is drawn after it and reads it.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgen._schema import DRAWS
from fastgen.kernels._incremental_instructions import attend, combine, embedding, normalize
from fastgen.kernels._incremental_pixel import draw_levels, draw_mixture, keep_logits
from fastgen.kernels._incremental_plan import HEADER, INSTRUCTION, KINDS, Plan, plan_of
from fastgen.kernels._incremental_values import number, place
from fastgen.kernels._launch import launch, on_device
from fastgen.kernels._operands import accumulator
from fastgen.kernels._philox import low_word
from fastgen.reference import incremental as reference

__all__ = ["incremental_sample", "incremental_step", "reasons"]

MIXTURE = DRAWS.index("logistic_mixture")
MOST_LEVELS = 1024  # in the registers of a program
MOST_HEAD = 64
WARPS = 8
# Of a pixel's sums 16 weights a thread, 16 KB in flight; a tile of rows holds 4 sums a thread.
BLOCKS = {"BLOCK_M": 16, "BLOCK_K": 64, "BLOCK_O": 64}

WIDTH, COLORS, TURNS, CHANNELS, IMAGE, LOGITS, FIRST = (
    tl.constexpr(HEADER.index(name))
    for name in ("width", "colors", "turns", "output_channels", "image", "logits", "first_row")
)
COMBINE, LAYER_NORM, ATTENTION = (tl.constexpr(KINDS.index(name)) for name in ("combine", "layer_norm", "attention"))
APART = tl.constexpr(len(INSTRUCTION))
I_KIND, I_STEP, I_HEIGHT, I_WIDTH, I_BEHIND = (
    tl.constexpr(INSTRUCTION.index(name)) for name in ("kind", "step", "height", "width", "behind")
)


# Places and columns of a draw are other numbers every call: without the list Triton would compile anew for 1 and multiples of 16.
@triton.jit(
    do_not_specialize=[
        "first", "last", "size", "level_count", "count", "level_stride", "color_stride", "top_k", "rounded", "step",
    ]
)  # fmt: skip
def incremental_kernel(
    table,  # int64, see _incremental_plan
    state,  # [N * the state of an image]
    image,  # [N, C, H, W]
    known,  # the same in uint8, or None
    weights,
    parameters,
    constants,  # one after the other
    levels,
    seeds,  # [N] int64
    options,  # temperature, top_p
    out,  # [N, C, H, W], or None where logits alone are wanted
    log_prob,  # [N, H, W]
    logits,  # [N, O, H, W], or None; of a step [N, O]
    first,  # of the events, a pixel or a color of one each
    last,
    size,  # pixels of an image
    level_count,
    count,
    level_stride,
    color_stride,
    top_k,
    rounded,
    step,
    STEP: tl.constexpr,
    KIND: tl.constexpr,
    CUT: tl.constexpr,
    MIXED: tl.constexpr,  # colors of a mixture, 0 where levels are drawn
    BLOCK_L: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_O: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    width, turns, colors = number(table + WIDTH), number(table + TURNS), number(table + COLORS)
    channels = number(table + CHANNELS)
    for event in range(first, last):
        pixel, turn = event // turns, event % turns
        y, x = pixel // width, pixel % width
        pixel = pixel.to(tl.int64)
        first_color, last_color = tl.where(turns > 1, turn, 0), tl.where(turns > 1, turn + 1, colors)
        values, _ = place(table + tl.load(table + LOGITS), y, n, x)
        to, _ = place(table + tl.load(table + IMAGE), y, n, x)
        for m in range(
            0, 4
        ):  # of a row, of a pixel, what hangs on its colors: where they have turns, and after the draw
            moment = tl.minimum(m, 2)
            begin, end = number(table + FIRST + 2 * moment), number(table + FIRST + 1 + 2 * moment)
            runs = tl.where(
                m == 0, x + turn == 0, tl.where(m == 1, turn == 0, tl.where(m == 2, turns > 1, turn == turns - 1))
            )
            if STEP:  # what follows from the event before, and then what the last one needs
                runs = tl.where(m == 3, event < last - 1, runs & (event == last - 1))
            end = tl.where(runs, end, begin)
            if m == 3:
                if STEP:
                    for c in range(0, tl.where(event < last - 1, last_color, 0)):
                        tl.store(state + to + c, tl.load(image + (n * colors + c) * size + pixel))
                else:
                    if logits is not None:
                        keep_logits(
                            logits, state + values, n, pixel, size, channels, colors, first_color, last_color, level_stride,
                            color_stride, BLOCK_O,
                        )  # fmt: skip
                    seed = tl.load(seeds + n)
                    if MIXED > 0:
                        draw_mixture(
                            state + values, state + to, image, known, seed, options, out, log_prob, n, pixel, size, count, rounded,
                            step, MIXED, BLOCK_L, ACC,
                        )  # fmt: skip
                    else:
                        draw_levels(
                            state + values, state + to, image, known, levels, level_count, seed, options, out, log_prob, n, pixel,
                            size, colors, first_color, last_color, count, level_stride, color_stride, top_k, step, KIND, CUT,
                            BLOCK_L, ACC,
                        )  # fmt: skip
                tl.debug_barrier()
            for address in range(begin, end, APART):
                i = table + address
                kind, apart = number(i + I_KIND), number(i + I_STEP)
                row, column = y // apart - number(i + I_BEHIND), x // apart
                x0 = tl.where(m == 0, 0, column)
                x1 = tl.where(m == 0, number(i + I_WIDTH), column + 1)
                meets = (y % apart == 0) & (row >= 0) & (row < number(i + I_HEIGHT)) & (x1 <= number(i + I_WIDTH))
                x1 = tl.where(meets & ((m == 0) | (x % apart == 0)), x1, x0)
                if kind == COMBINE:
                    combine(
                        table,
                        state,
                        weights,
                        parameters,
                        constants,
                        i,
                        row,
                        x0,
                        x1,
                        n,
                        m,
                        DOT,
                        BLOCK_M,
                        BLOCK_K,
                        BLOCK_O,
                        ACC,
                    )
                elif kind == LAYER_NORM:
                    normalize(table, state, parameters, constants, i, row, x0, x1, n, BLOCK_O, ACC)
                elif kind == ATTENTION:
                    attend(table, state, parameters, constants, i, row, x0, x1, n, 32, BLOCK_E, ACC)
                else:
                    embedding(table, state, parameters, constants, i, row, x0, x1, n, BLOCK_O)
                tl.debug_barrier()
        if STEP:
            for begin in range(0, tl.where(event == last - 1, channels, 0), BLOCK_O):
                o = begin + tl.arange(0, BLOCK_O)
                tl.store(
                    logits + n * channels + o,
                    tl.load(state + values + o, mask=o < channels, other=0.0),
                    mask=o < channels,
                )


def reasons(op: str, *args: Any) -> list[str]:
    """Why Triton cannot take this call; empty where it can."""
    image, program, weights, parameters, constants = args[1 if op == "incremental_step" else 0], *_program_of(op, args)
    try:
        plan = plan_of(op, program, weights, parameters, constants, image.shape[0])
    except (RuntimeError, TypeError, IndexError):
        return []  # the launcher says what is wrong
    found = []
    if plan.head_size > MOST_HEAD:
        found.append(f"heads of up to {MOST_HEAD} channels fit the registers of a program, got {plan.head_size}")
    if op == "incremental_sample" and args[8][:1] != [DRAWS.index("bernoulli")] and args[8][1] > MOST_LEVELS:
        found.append(f"up to {MOST_LEVELS} levels or components fit the registers of a program, got {args[8][1]}")
    return found


def incremental_sample(
    image: Tensor,
    known: Tensor | None,
    program: Tensor,
    weights: Tensor,
    parameters: Tensor,
    constants: Sequence[Tensor],
    levels: Tensor,
    seeds: Tensor,
    draw: Sequence[int],
    temperature: float,
    top_p: float,
    channels: int,
    return_logits: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    op, (images, colors, height, width) = "incremental_sample", image.shape if image.dim() == 4 else (0, 0, 0, 0)
    arguments = (
        image,
        known,
        program,
        weights,
        parameters,
        constants,
        levels,
        seeds,
        draw,
        temperature,
        top_p,
        channels,
    )
    plan = _checked(op, *arguments, return_logits)
    kind, count, level_stride, color_stride, top_k, rounded, step = draw
    out = torch.empty(image.shape, dtype=image.dtype, device=image.device)
    log_prob = torch.empty((images, height, width), dtype=image.dtype, device=image.device)
    logits = torch.empty(
        (images if return_logits else 0, channels, height, width), dtype=image.dtype, device=image.device
    )
    if images == 0:
        return out, log_prob, logits
    mask, state = None if known is None else known.view(torch.uint8), parameters.new_zeros(images * plan.program.state)
    options = parameters.new_full((2,), top_p)
    options[0].fill_(temperature)
    mixed = colors if kind == MIXTURE else 0
    in_block = 2 if DRAWS[kind] == "bernoulli" else count
    events = height * width * (colors if plan.program.per_color else 1)
    with on_device(image):
        _launch(
            plan, images, state, image, mask, weights, parameters, constants, levels, seeds, options, out, log_prob,
            logits if return_logits else None, 0, events, height * width, levels.shape[0], in_block, level_stride, color_stride,
            min(top_k, in_block), rounded, low_word(step), STEP=False, KIND=kind, MIXED=mixed,
            CUT=DRAWS[kind] == "categorical" and (top_k > 0 or top_p < 1), BLOCK_L=max(16, triton.next_power_of_2(in_block)),
        )  # fmt: skip
    return out, log_prob, logits


def incremental_step(
    state: Tensor,
    image: Tensor,
    program: Tensor,
    weights: Tensor,
    parameters: Tensor,
    constants: Sequence[Tensor],
    row: int,
    column: int,
    color: int,
    channels: int,
) -> Tensor:
    op = "incremental_step"
    plan = _checked(op, state, image, program, weights, parameters, constants, row, column, color, channels)
    logits = torch.empty((image.shape[0], channels), dtype=image.dtype, device=image.device)
    if image.shape[0] == 0:
        return logits
    p = plan.program
    event = (row * p.width + column) * (p.colors if p.per_color else 1) + color
    with on_device(image):
        _launch(
            plan, image.shape[0], state, image, None, weights, parameters, constants, None, None, None, None, None, logits,
            max(event - 1, 0), event + 1, p.height * p.width, 0, 0, 0, 0, 0, 0, 0, STEP=True, KIND=0, MIXED=0, CUT=False,
            BLOCK_L=16,
        )  # fmt: skip
    return logits


def _launch(plan: Plan, images: int, state: Tensor, image: Tensor, known: Tensor | None, weights: Tensor, parameters: Tensor,
            constants: Sequence[Tensor], *args: Any, **constexprs: Any) -> None:  # fmt: skip
    flat = torch.cat([constant.reshape(-1) for constant in constants]) if constants else parameters[:0]
    tensors = (plan.table, state, image, known, weights, parameters, flat)
    launch(
        incremental_kernel, images, *tensors, *args, num_warps=WARPS, enable_fp_fusion=True, **constexprs, BLOCK_E=plan.head_size,
        **BLOCKS, DOT=parameters.dtype == torch.float32, ACC=accumulator(parameters),
    )  # fmt: skip


def _program_of(op: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return args[2:6]


def _checked(op: str, *args: Any) -> Plan:
    """The plan of a call that the reference's check has seen; where it refuses, so do we."""
    image = args[1 if op == "incremental_step" else 0]
    try:
        getattr(reference, f"{op}_check")(*args)
        return plan_of(op, *_program_of(op, args), image.shape[0])
    except RuntimeError as error:
        raise ValueError(str(error)) from None
