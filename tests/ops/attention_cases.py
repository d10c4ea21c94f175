"""Arguments of `attention` for its tests on every device, and what a user writes without it."""

import itertools
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen import _dispatch
from fastgen.ops import attention
from fastgen.reference import attention as reference

from .families import Call, OfTensors
from .numerics import DTYPES, assert_bar, dtype_name, randn

# (N, H, Hk, L, S, E, Ev): whole vectors and tiles and not, one block of keys and several, one row and many.
SHAPES = [
    (2, 2, 2, 64, 64, 40, 40), (1, 1, 1, 1, 1, 8, 8), (1, 3, 3, 100, 77, 80, 80), (2, 4, 2, 33, 130, 64, 32),
    (1, 2, 1, 131, 257, 160, 160), (1, 1, 1, 5, 300, 512, 512), (2, 6, 3, 25, 17, 7, 13), (1, 2, 2, 200, 600, 13, 24),
]  # fmt: skip
MASKS = ("none", "causal", "boolean", "additive", "keys alone")
# The order of [N, H, L, E] in memory, and three ways of packing queries, keys and values into one tensor.
PLACES = {"heads": (0, 1, 2, 3), "tokens": (0, 2, 1, 3), "channels": (0, 1, 3, 2)}
PACKED = ("tokens packed", "tokens interleaved", "channels packed")


def placed(t: Tensor, place: str) -> Tensor:
    """``t`` [N, H, L, E] dense in the order of PLACES."""
    order = PLACES[place]
    return t.permute(order).contiguous().permute([order.index(d) for d in range(4)])


def packed(n: int, heads: int, length: int, depth: int, kind: str, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """One tensor of queries, keys and values: [N, L, 3 H E], [N, L, H 3 E], or guided-diffusion's older [N, H 3 E, L]."""
    shape = (n, heads * 3 * depth, length) if kind == "channels packed" else (n, length, 3 * heads * depth)
    return randn(*shape, seed=seed, dtype=dtype)


def unpacked(qkv: Tensor, heads: int, kind: str) -> list[Tensor]:
    """Queries, keys and values [N, H, L, E] as views of what :func:`packed` made."""
    if kind == "channels packed":
        parts = qkv.unflatten(1, (heads, 3, -1)).permute(2, 0, 1, 4, 3)
    elif kind == "tokens packed":
        parts = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    else:
        parts = qkv.unflatten(2, (heads, 3, -1)).permute(3, 0, 2, 1, 4)
    return list(parts)


def tensors(shape: tuple[int, ...], dtype: torch.dtype, place: str = "heads") -> list[Tensor]:
    """Queries, keys and values of a shape as in SHAPES."""
    n, heads, kv_heads, rows, keys, depth, width = shape
    sizes = ((n, heads, rows, depth), (n, kv_heads, keys, depth), (n, kv_heads, keys, width))
    return [placed(randn(*size, seed=i + 1, dtype=dtype), place) for i, size in enumerate(sizes)]


def mask_of(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    """A mask of MASKS; the boolean one leaves a row without keys, where there is more than one."""
    n, heads, _, rows, keys, *_ = shape
    if kind == "boolean":
        mask = randn(n, 1, rows, keys, seed=7) > -0.5
        mask[:, :, rows // 2] &= rows == 1
        return mask
    if kind == "additive":
        return randn(heads, rows, keys, seed=8, dtype=dtype)
    if kind == "keys alone":
        mask = randn(n, 1, 1, keys, seed=9) > -0.5
        mask[..., 0] = True
        return mask
    return None


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False, scale=None) -> Tensor:
    """The same by torch, in the dtype of ``q``."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=scale)


def gradients(function, inputs: list[Tensor], mask: Tensor | None, grad: Tensor, **options) -> list[Tensor]:
    """The output and the gradients of queries, keys and values."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    y = function(*leaves, mask, **options)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))]


def example(dtype: torch.dtype) -> dict[str, Any]:
    query, key, value = tensors((2, 4, 2, 5, 7, 6, 3), dtype)
    return {"query": query, "key": key, "value": value, "attn_mask": randn(2, 4, 5, 7, dtype=dtype)}


def harmless(op: str, name: str, how: str, arguments: dict[str, Any]) -> bool:
    """Values may be of any width."""
    return op != "attention_bwd" and name == "value" and how.startswith("dimension 3")


THREE_HEADS = {"key": torch.zeros(2, 3, 7, 6), "value": torch.zeros(2, 3, 7, 3)}
REFUSED = [
    ("attention", THREE_HEADS, "heads of key must divide"),
    ("attention_fwd", THREE_HEADS, "heads of key must divide"),
    ("attention_bwd", THREE_HEADS, "heads of key must divide"),
    ("attention_fwd", {"key": torch.zeros(2, 2, 7, 6).double()}, "key must.* have the dtype of query"),
    ("attention_bwd", {"logsumexp": torch.zeros(2, 4, 5).double()}, "logsumexp must be"),
    ("attention_bwd", {"grad_output": torch.zeros(2, 4, 5, 3).double()}, "grad_output must be"),
    ("attention", {"attn_mask": torch.zeros(2, 4, 5, 7, dtype=torch.int32)}, "attn_mask must be"),
]
MAPPED = OfTensors(
    lambda q, k, v: attention(q, k, v, is_causal=True),
    lambda k: [
        randn(2, 2, *size, seed=10 * k + i, dtype=torch.float32) for i, size in enumerate(((5, 8), (6, 8), (6, 3)))
    ],
)
EXPORTED = {
    "attention": OfTensors(
        lambda q, k, v: attention(q, k, v),
        lambda n: [randn(n, 2, *size, seed=i, dtype=torch.float32) for i, size in enumerate(((5, 8), (6, 8), (6, 3)))],
    )
}

# Of the Triton kernels: tiles that are full and that are not, one tile of keys and several, every mask.
KERNEL_SHAPES = [
    ((2, 2, 1, 20, 23, 8, 8), "heads"),
    ((1, 2, 2, 70, 77, 40, 24), "tokens"),
    ((1, 4, 2, 33, 140, 16, 16), "channels"),
]
# Accumulators of rows by head dimension beside tiles of keys on their way: two programs of 4 warps a multiprocessor.
REGISTERS = {"attention.forward_kernel": 255, "_attention_bwd.rows_kernel": 255, "_attention_bwd.keys_kernel": 255}


def expanded(mask: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    n, heads, _, rows, keys, *_ = shape
    return None if mask is None else mask.expand(n, heads, rows, keys)


def forward(shape, place, dtype, kind="none") -> tuple[Any, ...]:
    """Arguments of `attention_fwd`; every row may look at a key, since a logsumexp of -inf has no error."""
    mask = mask_of(kind, shape, dtype)
    if kind == "boolean":
        mask[..., 0] = True
    return (*tensors(shape, dtype, place), expanded(mask, shape), kind == "causal", shape[5] ** -0.5)


def backward(shape, place, dtype, kind="none", wants_scores=False) -> tuple[Any, ...]:
    """Arguments of `attention_bwd` after that forward."""
    query, key, value, mask, is_causal, scale = forward(shape, place, dtype, kind)
    output, logsumexp = reference.attention_fwd(query, key, value, mask, is_causal, scale)
    grad = randn(*output.shape, seed=3, dtype=dtype)
    return (grad, query, key, value, output, logsumexp, mask, is_causal, scale, wants_scores)


def calls() -> Iterator[Call]:
    for (shape, place), dtype in itertools.product(KERNEL_SHAPES, DTYPES):
        # the first for every dtype, the others where arithmetic is plainest
        if dtype == torch.float32 or shape[0] == 2:
            yield Call(f"{shape} {place} {dtype_name(dtype)}", "attention_fwd", partial(forward, shape, place, dtype))
            # what was rounded is the output, of which D is made
            yield Call(
                f"{shape} {place} {dtype_name(dtype)}",
                "attention_bwd",
                partial(backward, shape, place, dtype),
                least=1.0,
            )
    for kind in MASKS[1:]:
        for shape, place in (((2, 2, 1, 20, 23, 8, 8), "tokens"), ((1, 2, 2, 40, 150, 8, 8), "heads")):
            arguments = (shape, place, torch.float32, kind)
            yield Call(f"{kind} {shape}", "attention_fwd", partial(forward, *arguments))
            yield Call(f"{kind} {shape}", "attention_bwd", partial(backward, *arguments, wants_scores=True), least=1.0)
    yield Call("short half", "attention_fwd", partial(forward, (1, 2, 2, 70, 77, 40, 40), "tokens", torch.float16))
    yield Call("output alone", "attention", partial(forward, *KERNEL_SHAPES[0], torch.float32))


def check_rows_without_keys(kernels):
    query, key, value = tensors((1, 2, 2, 20, 40, 8, 8), torch.float32)
    mask = torch.ones(20, 40, dtype=torch.bool)
    mask[3] = False
    y, logsumexp = kernels.attention_fwd(query, key, value, mask.expand(1, 2, 20, 40), False, 1.0)
    assert not y[:, :, 3].any() and (logsumexp[:, :, 3] == -math.inf).all()
    grads = kernels.attention_bwd(y, query, key, value, y, logsumexp, mask.expand(1, 2, 20, 40), False, 1.0, False)
    assert not grads[0][:, :, 3].any() and all(g.isfinite().all() for g in grads)
    y, logsumexp = kernels.attention_fwd(query, key[:, :, :0], value[:, :, :0], None, False, 1.0)
    assert not y.any() and (logsumexp == -math.inf).all()


@pytest.mark.parametrize("index", range(3))
def check_not_finite(kernels, index):
    """A NaN spoils its row, all rows of its head, or its column of that head."""
    inputs = tensors((2, 2, 2, 40, 70, 16, 16), torch.float32)
    inputs[index][0, 1, 5, 2] = math.nan
    y = kernels.attention(*inputs, None, False, 0.25)
    spoiled = y.isnan()
    expected = torch.zeros_like(spoiled)
    expected[(0, 1, 5) if index == 0 else (0, 1) if index == 1 else (0, 1, slice(None), 2)] = True
    assert torch.equal(spoiled, expected)


def check_reasons(kernels):
    large, mask = torch.zeros(1, 1, 2, 600), torch.zeros(1, 1, 2, 2, dtype=torch.bool)
    assert _dispatch.Triton.reasons("attention", large, large, large, mask, False, 1.0) == [
        "head dimensions up to 512 fit the registers of a program of attention in torch.float32, got 600"
    ]
    small = large[..., :512]
    assert _dispatch.Triton.reasons("attention_fwd", small, small, small, mask, False, 1.0) == []
    statistics = torch.zeros(1, 1, 2)
    backward_of = (small, small, small, small, small, statistics, None, False, 1.0, False)
    assert "up to 64" in _dispatch.Triton.reasons("attention_bwd", *backward_of)[0]
    byte = small.to(torch.uint8)
    assert len(_dispatch.Triton.reasons("attention", byte, byte, byte, None, False, 1.0)) == 3


def zeros(n, heads, rows, keys, depth, dtype, *, mask=None, causal=False, grad=False) -> tuple[Any, ...]:
    """Arguments of the forward or the backward without values, as a packed projection of self-attention has them."""
    query = torch.zeros(n, rows, 3, heads, depth, dtype=dtype)[:, :, 0].transpose(1, 2)
    key, value = (torch.zeros(n, keys, 3, heads, depth, dtype=dtype)[:, :, i].transpose(1, 2) for i in (1, 2))
    if mask is not None:
        mask = torch.zeros(1, 1, rows, keys, dtype=mask).expand(n, heads, rows, keys)
    rest = (mask, causal, depth**-0.5)
    if not grad:
        return (query, key, value, *rest)
    statistics = torch.zeros(n, heads, rows, dtype=torch.promote_types(dtype, torch.float32))
    output = torch.zeros(n, rows, heads, depth, dtype=dtype).transpose(1, 2)
    return (output, query, key, value, output, statistics, *rest, mask is not None)


def gates(arch: int) -> Iterator[Call]:
    """Every class of head dimension in bfloat16 for sm_90, the largest in all; float32 and float64 at both ends."""

    def both(name, *args, **options):
        yield Call(name, "attention_fwd", partial(zeros, *args, **options))
        yield Call(name, "attention_bwd", partial(zeros, *args, **options, grad=True))

    for dtype in DTYPES:
        halves = dtype in (torch.bfloat16, torch.float16)
        largest_of_backward = 160 if halves else 64 if dtype == torch.float32 else 128
        depths = (8, 40, 64, 80, 160) if arch == 90 and dtype == torch.bfloat16 else (40, largest_of_backward)
        for depth in depths:
            yield from both(f"self d={depth} {dtype_name(dtype)}", 2, 8, 1024, 1024, depth, dtype)
        largest = partial(zeros, 1, 2, 64, 64, 512, dtype)
        yield Call(f"self d=512 {dtype_name(dtype)}", "attention_fwd", largest)
        if halves:
            yield Call(f"self d=512 {dtype_name(dtype)}", "attention_bwd", partial(largest, grad=True))
    half = torch.bfloat16
    yield Call("77 keys d=40 bf16", "attention", partial(zeros, 2, 8, 4096, 77, 40, half))
    yield Call("77 keys d=160 bf16", "attention", partial(zeros, 2, 8, 256, 77, 160, half))
    yield from both("causal d=64 bf16", 2, 8, 1024, 1024, 64, half, causal=True)
    yield from both("boolean mask d=64 bf16", 2, 8, 1024, 1000, 64, half, mask=torch.bool)
    yield from both("additive mask d=64 bf16", 2, 8, 1024, 1000, 64, half, mask=half)
    yield from both("odd sizes fp32", 1, 3, 77, 131, 13, torch.float32)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 8, 8, 1024, 1024, 40, 40)])
@pytest.mark.parametrize("dtype", DTYPES)
def gpu_values_and_gradients(dtype, shape, kind):
    inputs = [t.cuda() for t in tensors(shape, dtype, "tokens")]
    mask, options = mask_of(kind, shape, dtype), {"is_causal": kind == "causal"}
    mask = None if mask is None else mask.cuda()
    n, heads, _, rows, *_, width = shape
    grad = randn(n, heads, rows, width, seed=4, dtype=dtype).cuda()
    actual = gradients(attention, inputs, mask, grad, **options)
    beside = gradients(plain, inputs, mask, grad, **options)
    wide = mask.double() if mask is not None and mask.dtype != torch.bool else mask
    exact = gradients(plain, [t.double() for t in inputs], wide, grad.double(), **options)
    for a, b, e in zip(actual, beside, exact, strict=True):
        assert_bar(a, b, e, {torch.float64: 1e-12, torch.float32: 2e-6}.get(dtype, 1e-3))
    again = gradients(attention, inputs, mask, grad, **options)
    assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True))


def gpu_gradcheck():
    inputs = [t.cuda().requires_grad_() for t in tensors((1, 4, 2, 3, 5, 3, 2), torch.float64, "tokens")]
    assert torch.autograd.gradcheck(lambda *t: attention(*t, is_causal=True), inputs, nondet_tol=0.0)
