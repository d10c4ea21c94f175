"""Arguments of `linear_attention` for its tests on every device, and what a user writes without it."""

import itertools
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgen import _dispatch
from fastgen.ops import linear_attention
from fastgen.reference import linear_attention as reference

from .families import Call, OfTensors
from .numerics import DTYPES, assert_bar, dtype_name, randn

# (N, H, D, E, L, S, M): whole vectors, tiles and blocks and not, one chunk of positions and several, memories and none.
SHAPES = [
    (2, 4, 32, 32, 64, 64, 4), (1, 1, 1, 1, 1, 1, 0), (1, 2, 7, 13, 30, 50, 3), (2, 3, 16, 40, 200, 193, 0),
    (1, 1, 32, 32, 1300, 2500, 4), (1, 2, 64, 5, 9, 17, 200),
]  # fmt: skip
# The order of [N, H, D, L] in memory: of a contiguous convolution, and of a channels-last one.
PLACES = {"channels": (0, 1, 2, 3), "channels last": (0, 3, 1, 2), "heads last": (0, 3, 2, 1)}


def placed(t: Tensor, place: str) -> Tensor:
    order = PLACES[place]
    return t.permute(order).contiguous().permute([order.index(d) for d in range(4)])


def tensors(shape: tuple[int, ...], dtype: torch.dtype, place: str = "channels") -> list[Tensor]:
    """Queries, keys, values and, where there are any, memories of a shape as in SHAPES."""
    n, heads, depth, width, length, keys, memories = shape
    sizes = ((n, heads, depth, length), (n, heads, depth, keys), (n, heads, width, keys))
    found = [placed(2 * randn(*size, seed=i + 1, dtype=dtype), place) for i, size in enumerate(sizes)]
    if memories:
        found += [randn(heads, channels, memories, seed=8 + channels, dtype=dtype) for channels in (depth, width)]
    return found


def plain(q: Tensor, k: Tensor, v: Tensor, mk: Tensor | None = None, mv: Tensor | None = None, scale=None) -> Tensor:
    """The same as denoising-diffusion-pytorch writes it, in the dtype of ``q``."""
    scale = q.shape[2] ** -0.5 if scale is None else scale
    if mk is not None and mv is not None:
        k, v = (torch.cat([m.expand(len(t), -1, -1, -1), t], -1) for m, t in ((mk, k), (mv, v)))
    q, k = q.softmax(-2) * scale, k.softmax(-1)
    context = torch.einsum("bhdn,bhen->bhde", k, v)
    return torch.einsum("bhde,bhdn->bhen", context, q)


def gradients(function, inputs: list[Tensor], grad: Tensor, **options) -> list[Tensor]:
    """The output and the gradients of all inputs."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    y = function(*leaves, **options)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))]


def example(dtype: torch.dtype) -> dict[str, Any]:
    names = ("query", "key", "value", "memory_key", "memory_value")
    return dict(zip(names, tensors((2, 3, 4, 5, 6, 7, 2), dtype), strict=True))


def harmless(op: str, name: str, how: str, arguments: dict[str, Any]) -> bool:
    """There may be any number of queries."""
    return op != "linear_attention_bwd" and name == "query" and how.startswith("dimension 3")


_HALF = torch.zeros(3, 4, 2, dtype=torch.float16)
REFUSED = [
    *(
        (op, changes, message)
        for op in ("linear_attention", "linear_attention_fwd", "linear_attention_bwd")
        for changes, message in (
            ({"key": torch.zeros(2, 3, 4, 7).double()}, "key must.* have the dtype of query"),
            ({"memory_key": None}, "memory_key and memory_value must be given together"),
            ({"memory_key": _HALF}, "memory_key must"),
        )
    ),
    ("linear_attention_bwd", {"statistics": torch.zeros(2, 3, 2, 4).double()}, "statistics must be"),
    ("linear_attention_bwd", {"context": torch.zeros(2, 3, 4, 5).double()}, "context must be"),
    ("linear_attention_bwd", {"grad_output": torch.zeros(2, 3, 5, 6).double()}, "grad_output must be"),
]
MAPPED = OfTensors(
    lambda *t: linear_attention(*t),
    lambda k: [
        randn(*size, seed=10 * k + i, dtype=torch.float32)
        for i, size in enumerate(((2, 2, 4, 5), (2, 2, 4, 6), (2, 2, 3, 6), (2, 4, 2), (2, 3, 2)))
    ],
)
EXPORTED = {
    "linear_attention": OfTensors(
        lambda q, k, v: linear_attention(q, k, v),
        lambda n: [
            randn(n, *size, seed=i, dtype=torch.float32) for i, size in enumerate(((2, 4, 5), (2, 4, 6), (2, 3, 6)))
        ],
    )
}

# Of the Triton kernels: tiles that are full and that are not, one chunk and several.
KERNEL_SHAPES = [
    ((2, 2, 8, 8, 20, 23, 3), "channels"), ((1, 2, 32, 32, 70, 40, 4), "channels last"), ((1, 1, 40, 24, 20, 30, 0), "channels"),
]  # fmt: skip
# A context beside tiles of positions: three programs of 4 warps a multiprocessor.
REGISTERS = dict.fromkeys(
    ("linear_attention.output_kernel", "_linear_attention_bwd.queries_kernel", "_linear_attention_bwd.keys_kernel"), 168
)
# Which reads what the others have left, in the type of the arithmetic.
NO_STORAGE_TYPE = ("linear_attention.merge_kernel",)


def forward(shape, place, dtype) -> tuple[Any, ...]:
    """Arguments of `linear_attention_fwd`."""
    given = tensors(shape, dtype, place)
    return (*given, *[None] * (5 - len(given)), shape[2] ** -0.5)


def backward(shape, place, dtype) -> tuple[Any, ...]:
    """Arguments of `linear_attention_bwd` after that forward."""
    *inputs, scale = forward(shape, place, dtype)
    output, context, statistics = reference.linear_attention_fwd(*inputs, scale)
    return (randn(*output.shape, seed=3, dtype=dtype), *inputs, context, statistics, scale)


def calls() -> Iterator[Call]:
    for (shape, place), dtype in itertools.product(KERNEL_SHAPES, DTYPES):
        # the first for every dtype, the others where arithmetic is plainest
        if dtype == torch.float32 or shape[0] == 2:
            name = f"{shape} {place} {dtype_name(dtype)}"
            yield Call(name, "linear_attention_fwd", partial(forward, shape, place, dtype))
            yield Call(name, "linear_attention_bwd", partial(backward, shape, place, dtype), least=1.0)
    several = ((1, 1, 4, 4, 1100, 2100, 2), "channels", torch.float32)
    yield Call("several chunks", "linear_attention_fwd", partial(forward, *several))
    yield Call("several chunks", "linear_attention_bwd", partial(backward, *several), least=1.0)
    yield Call("output alone", "linear_attention", partial(forward, *KERNEL_SHAPES[0], torch.float32))


def check_no_keys(kernels):
    q, k, v = tensors((1, 2, 8, 8, 5, 5, 0), torch.float32)
    y, context, statistics = kernels.linear_attention_fwd(q, k[..., :0], v[..., :0], None, None, 1.0)
    assert not y.any() and not context.any()
    assert (statistics[:, :, 0] == -math.inf).all() and not statistics[:, :, 1].any()


@pytest.mark.parametrize("index", range(3))
def check_not_finite(kernels, index):
    """A NaN of a query spoils its position, of a key its whole head, of a value one channel of it."""
    inputs = tensors((2, 2, 8, 8, 40, 40, 2), torch.float32)
    inputs[index][0, 1, 3, 5] = math.nan
    y = kernels.linear_attention(*inputs, 0.3)
    expected = torch.zeros_like(y, dtype=torch.bool)
    expected[((0, 1, slice(None), 5), (0, 1), (0, 1, 3))[index]] = True
    assert torch.equal(y.isnan(), expected)


def check_reasons(kernels):
    large = torch.zeros(1, 1, 100, 2)
    assert _dispatch.Triton.reasons("linear_attention", large, large, large, None, None, 1.0) == [
        "up to 64 channels a head fit the registers of a program of linear_attention, got 100"
    ]


def gates(arch: int) -> Iterator[Call]:
    """Four heads of 32 channels at 32x32, as the project has them, in every dtype; memories, and 64 channels, in one."""

    def zeros(shape, dtype, place="channels", grad=False):
        n, heads, depth, width, length, keys, memories = shape
        query, key, value = (
            placed(torch.zeros(n, heads, channels, positions, dtype=dtype), place)
            for channels, positions in ((depth, length), (depth, keys), (width, keys))
        )
        memory = [torch.zeros(heads, c, memories, dtype=dtype) if memories else None for c in (depth, width)]
        rest = (query, key, value, *memory)
        if not grad:
            return (*rest, depth**-0.5)
        opmath = torch.promote_types(dtype, torch.float32)
        context = torch.zeros(n, heads, depth, width, dtype=opmath)
        output = placed(torch.zeros(n, heads, width, length, dtype=dtype), place)
        return (output, *rest, context, torch.zeros(n, heads, 2, depth, dtype=opmath), depth**-0.5)

    cases = [
        (f"d=32 {dtype_name(dtype)}", ((2, 4, 32, 32, 1024, 1024, 4 if dtype == torch.bfloat16 else 0), dtype))
        for dtype in DTYPES
    ]
    if arch == 90:
        cases.append(("d=64 bf16, channels last", ((2, 4, 64, 60, 1000, 1000, 0), torch.bfloat16, "channels last")))
    for name, arguments in cases:
        yield Call(name, "linear_attention_fwd", partial(zeros, *arguments))
        yield Call(name, "linear_attention_bwd", partial(zeros, *arguments, grad=True))


@pytest.mark.parametrize("shape", [*SHAPES, (2, 4, 32, 32, 4096, 4096, 4)])
@pytest.mark.parametrize("dtype", DTYPES)
def gpu_values_and_gradients(dtype, shape):
    inputs = [t.cuda() for t in tensors(shape, dtype)]
    n, heads, _, width, length, *_ = shape
    grad = randn(n, heads, width, length, seed=4, dtype=dtype).cuda()
    actual, beside = gradients(linear_attention, inputs, grad), gradients(plain, inputs, grad)
    exact = gradients(plain, [t.double() for t in inputs], grad.double())
    for a, b, e in zip(actual, beside, exact, strict=True):
        assert_bar(a, b, e, {torch.float64: 1e-12, torch.float32: 2e-6}.get(dtype, 1e-3))
    again = gradients(linear_attention, inputs, grad)
    assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True))
