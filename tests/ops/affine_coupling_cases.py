"""Arguments of `affine_coupling` for its tests on every device, and what a user writes without it."""

import itertools
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from fastgen._schema import (
    COUPLING_CENTERS,
    COUPLING_CODES,
    COUPLING_LAYOUTS,
    COUPLING_MASKS,
    COUPLING_ORDERS,
    COUPLING_SCALES,
)
from fastgen.ops import ScaleFn, affine_coupling

from .families import Call, OfTensors
from .numerics import DTYPES, LAYOUTS, STRIDES, assert_bar, dtype_name, laid_out, randn, strided

# Of the input: rows of vectors and part of one, of few features; images whose planes are long, short and odd, of one channel.
SHAPES = [(5, 64), (9, 7), (3, 6, 4, 4), (2, 12, 7, 9), (2, 5, 33), (2, 34, 3, 2, 5), (1, 2, 47, 51), (3, 24, 1, 1)]
SCALE_FNS: dict[str, ScaleFn] = {
    "exp": ScaleFn("exp"),
    "tanh": ScaleFn("tanh", bound=1.5),
    "soft_tanh": ScaleFn("soft_tanh", bound=2, gain=0.1),
    "atan": ScaleFn("atan", bound=2),
    "sigmoid_centered": ScaleFn("sigmoid_centered", bound=2),
    "soft_clip": ScaleFn("soft_clip"),
    "sigmoid": ScaleFn("sigmoid", offset=2),
    "sigmoid, divided": ScaleFn("sigmoid", offset=2, divide=True),
    "sigmoid + 1e-3": ScaleFn("sigmoid", offset=2, eps=1e-3),
    "sigmoid + 1e-4, divided": ScaleFn("sigmoid", offset=2, eps=1e-4, divide=True),
    "softplus": ScaleFn("softplus", eps=1e-3),
    "softplus, clamped": ScaleFn("softplus", eps=1e-3, bound=1),
    "softplus, divided": ScaleFn("softplus", eps=1e-2, divide=True),
    "gin": ScaleFn("exp", center="sample"),
    "gin of channels": ScaleFn("atan", bound=2, center="channels"),
}
WEIGHTED = ("tanh", "soft_tanh")
MASKS = ("none", "alternate", "scattered", "first_half", "second_half", "checkerboard", "checkerboard_inverse")


def masks_of(shape: tuple[int, ...]) -> list[str]:
    """Those of MASKS that fit an input of ``shape``."""
    return [m for m in MASKS if (len(shape) == 4 or "checker" not in m) and (shape[1] > 1 or m == "none")]


def make_mask(mask: str, channels: int) -> str | Tensor | None:
    if mask == "alternate":
        return torch.arange(1, channels, 2)
    if mask == "scattered":
        order = torch.randperm(channels, generator=torch.Generator().manual_seed(5))
        return order[: max(2 * channels // 3, 1)]
    return None if mask == "none" else mask


def transformed(mask: str | Tensor | None, channels: int) -> int:
    if isinstance(mask, Tensor):
        return len(mask)
    return {"first_half": channels // 2, "second_half": channels - channels // 2}.get(mask, channels)


def log_scale(a: Tensor, fn: ScaleFn, weight: Tensor | None) -> Tensor:
    """log s as a user writes it."""
    w = fn.bound if weight is None else weight.reshape(-1, *[1] * (a.dim() - 2))
    if fn.kind == "exp":
        return a
    if fn.kind == "tanh":
        return w * torch.tanh(a)
    if fn.kind == "soft_tanh":
        return w * torch.tanh(a / w)
    if fn.kind == "atan":
        return fn.bound * (0.636 * torch.atan(a))
    if fn.kind == "sigmoid_centered":
        return fn.bound * (2.0 * (torch.sigmoid(a) - 0.5))
    if fn.kind == "soft_clip":
        return a / (1 + abs(a / fn.bound))
    if fn.kind == "sigmoid":
        return torch.log(torch.sigmoid(a + fn.offset) + fn.eps)
    return torch.log((softplus(a) + fn.eps).clamp(0, fn.bound))


def unpack(packed: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    if layout == "interleaved":
        return packed[:, 1::2], packed[:, 0::2]
    if layout == "interleaved_scale_first":
        return packed[:, 0::2], packed[:, 1::2]
    first, second = packed.chunk(2, 1)
    return (first, second) if layout == "scale_first" else (second, first)


def plain(
    x: Tensor, raw: Tensor, shift: Tensor | None = None, weight: Tensor | None = None, *, scale_fn: ScaleFn = SCALE_FNS["exp"],
    order: str = "scale_shift", layout: str = "scale_first", mask: str | Tensor | None = None, inverse: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same in plain torch, in the dtype of ``x``."""
    raw, shift = unpack(raw, layout) if shift is None else (raw, shift)
    log, t = log_scale(scale_fn.gain * raw, scale_fn, weight), scale_fn.gain * shift
    dims = list(range(1, x.dim()))
    keep = torch.ones(x.shape[2:], dtype=torch.bool, device=x.device)
    if isinstance(mask, str) and mask.startswith("checker"):
        h, w = (torch.arange(n, device=x.device) for n in x.shape[2:])
        keep = (h[:, None] + w) % 2 == int(mask == "checkerboard_inverse")
        log, t = torch.where(keep, log, 0), torch.where(keep, t, 0)
    if scale_fn.center is not None:
        over = dims if scale_fn.center == "sample" else [1]
        log = torch.where(
            keep, log - log.sum(over, keepdim=True) / keep.expand(log.shape).sum(over, keepdim=True).clamp_min(1), 0
        )
    log = -log if scale_fn.divide else log
    half = x.shape[1] // 2
    parts = {"first_half": (x[:, :half], x[:, half:]), "second_half": (x[:, half:], x[:, :half])}
    v = x[:, mask] if isinstance(mask, Tensor) else parts[mask][0] if mask in parts else x
    if inverse:
        v, log = ((v - t) * torch.exp(-log) if order == "scale_shift" else v * torch.exp(-log) - t), -log
    else:
        v = v * torch.exp(log) + t if order == "scale_shift" else (v + t) * torch.exp(log)
    if isinstance(mask, Tensor):
        y = x.index_copy(1, mask, v)
    elif mask in parts:
        y = torch.cat([v, parts[mask][1]] if mask == "first_half" else [parts[mask][1], v], 1)
    else:
        y = torch.where(keep, v, x)
    log_det = log.sum(dims)
    return y, 0 * log_det if scale_fn.center else log_det


def arguments(
    shape: tuple[int, ...], dtype: torch.dtype, mask: str = "none", packed: bool = True, weighted: bool = False,
    layout: str = "contiguous",
) -> tuple[list[Tensor | None], str | Tensor | None]:  # fmt: skip
    """[input, raw scale, shift, weight] and the mask."""
    chosen = make_mask(mask, shape[1])
    count = transformed(chosen, shape[1])
    beside = (shape[0], 2 * count if packed else count, *shape[2:])
    tensors: list[Tensor | None] = [
        laid_out(randn(*shape, dtype=dtype), layout),
        laid_out(randn(*beside, seed=1, dtype=dtype), layout),
        None if packed else laid_out(randn(*beside, seed=2, dtype=dtype), layout),
        (0.5 + randn(count, seed=3).abs()).to(dtype) if weighted else None,
    ]
    return tensors, chosen


def of_op(*tensors: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
    x, raw, shift, weight = tensors
    return affine_coupling(x, raw, shift, scale_weight=weight, **options)


def gradients(function, tensors: list[Tensor | None], grads: tuple[Tensor, Tensor], **options: Any) -> list[Tensor]:
    """[output, log_det, the gradient of each tensor]."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    results = function(*leaves, **options)
    given = [leaf for leaf in leaves if leaf is not None]
    found = torch.autograd.grad(results, given, [g.to(r.dtype) for g, r in zip(grads, results, strict=True)])
    return [r.detach() for r in results] + list(found)


def terms_of(found: list[Tensor], shape: tuple[int, ...]) -> list[float]:
    """How large what each of :func:`gradients` sums may be: log-determinants, and gradients of weights, which come last."""
    sums = [1.0] * len(found)
    sums[1] = math.sqrt(math.prod(shape[1:]))
    if found[-1].dim() == 1:
        largest = (
            max(1.0, float(found[3].abs().max())) if found[3].numel() else 1.0
        )  # by the raw scale, and so each term
        sums[-1] = largest * math.sqrt(shape[0] * math.prod(shape[2:]))
    return sums


def example(dtype: torch.dtype) -> dict[str, Any]:
    (x, raw, shift, weight), _ = arguments((2, 6, 5, 7), dtype, packed=False, weighted=True)
    return {"input": x, "raw_scale": raw, "shift": shift, "scale_fn": "tanh", "scale_weight": weight}


def examples() -> Iterator[dict[str, Any]]:
    (x, raw, _, _), mask = arguments((3, 6), torch.float32, "scattered")
    yield {"input": x, "raw_scale": raw, "mask": mask}


def _further() -> tuple[Any, ...]:
    (x, _, shift, _), mask = arguments((3, 6), torch.float32, "scattered", packed=False)
    return x, shift, mask, COUPLING_MASKS.index("indices"), False


UNSEEN = {"affine_coupling_additive": _further}
OWN_DTYPE = (1,)

_CODES = [0, 0, 0, 0, 0, 0, 0]


def _changed(position: int, value: int) -> dict[str, Any]:
    return {"codes": [value if i == position else code for i, code in enumerate(_CODES)]}


REFUSED = [
    *(
        ("affine_coupling_fwd", _changed(i, value), name)
        for i, (name, values) in enumerate(
            zip(COUPLING_CODES, [(-1, size) for size in (8, 3, 2, 4, 6, 2, 2)], strict=True)
        )
        for value in values
    ),
    ("affine_coupling_fwd", {"codes": [0, 0, 0]}, "codes must be"),
    ("affine_coupling_bwd", {"codes": []}, "codes must be"),
    ("affine_coupling_additive", {"mask": 6}, "mask must be"),
    ("affine_coupling_additive", {"mask": 0}, "indices go with"),
    ("affine_coupling_additive", {"shift": torch.zeros(3, 4).double()}, "shift must be"),
]  # fmt: skip


def harmless(op: str, name: str, how: str, arguments: dict[str, Any]) -> bool:
    """With indices an input may have any number of channels that they lie in."""
    longer = name == "input" and how == "dimension 1 too long" and not op.endswith("bwd")
    return longer and arguments.get("indices") is not None


def unknown_to_fakes(op: str, name: str, how: str) -> bool:
    """Whether indices lie in fewer channels only their values say."""
    return name == "input" and how == "dimension 1 too short"


MAPPED = OfTensors(
    lambda x, raw, shift: affine_coupling(x, raw, shift, scale_fn=SCALE_FNS["sigmoid + 1e-3"], mask="second_half"),
    lambda k: [
        randn(2, 6, 5, 3, seed=k).float(),
        randn(2, 3, 5, 3, seed=50 + k).float(),
        randn(2, 3, 5, 3, seed=90 + k).float(),
    ],
)
EXPORTED = {
    "affine_coupling": OfTensors(
        lambda x, raw: affine_coupling(x, raw, scale_fn="soft_tanh", mask="first_half"),
        lambda n: [randn(n, 6, 5, 3, dtype=torch.float32), randn(n, 6, 5, 3, dtype=torch.float32)],
    )
}

# Of the Triton kernels: several tiles of channels and of positions, and parts of one.
KERNEL_SHAPES = [(3, 12, 4, 6), (1, 6, 20, 55), (5, 48), (2, 6, 7), (1, 1500, 2)]
STORES_IN_A_LOOP: set[str] = set()


def forward(
    shape, dtype, fn="exp", mask="second_half", layout="scale_first", order="scale_shift", inverse=False, weighted=False,
    memory="contiguous", kind=None,
) -> tuple[Any, ...]:  # fmt: skip
    """Arguments of `affine_coupling_fwd`; both tensors apart where ``layout`` is None."""
    scale = SCALE_FNS[fn]
    tensors, chosen = arguments(shape, dtype, mask, layout is not None, weighted, memory)
    if kind is not None:
        tensors = [t if t is None or t.dim() < 4 else strided(t, kind) for t in tensors]
    name = "indices" if isinstance(chosen, Tensor) else chosen or "none"
    codes = [
        COUPLING_SCALES.index(scale.kind), COUPLING_CENTERS.index(scale.center), COUPLING_ORDERS.index(order),
        COUPLING_LAYOUTS.index(layout or "scale_first"), COUPLING_MASKS.index(name), int(scale.divide), int(inverse),
    ]  # fmt: skip
    indices = chosen if isinstance(chosen, Tensor) else None
    return *tensors, indices, codes, float(scale.bound), scale.offset, scale.eps, scale.gain


def backward(shape, dtype, *args, **options) -> tuple[Any, ...]:
    """Arguments of `affine_coupling_bwd` after that forward."""
    kind, grad = options.get("kind"), randn(*shape, seed=4, dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    return (
        grad if kind is None else strided(grad, kind),
        randn(shape[0], seed=5, dtype=wide),
        *forward(shape, dtype, *args, **options),
    )


def additive(shape, dtype, mask="second_half", inverse=False) -> tuple[Any, ...]:
    (x, _, shift, _), chosen = arguments(shape, dtype, mask, packed=False)
    indices = chosen if isinstance(chosen, Tensor) else None
    name = "indices" if indices is not None else chosen or "none"
    return x, shift, indices, COUPLING_MASKS.index(name), inverse


def calls() -> Iterator[Call]:
    ops = {"affine_coupling_fwd": forward, "affine_coupling_bwd": backward}
    for (op, make), fn, inverse in itertools.product(ops.items(), SCALE_FNS, (False, True)):
        order = COUPLING_ORDERS[inverse]
        yield Call(
            f"{fn} {inverse} fp32",
            op,
            partial(make, (3, 12, 4, 6), torch.float32, fn, "first_half", None, order, inverse),
            least=1.0,
        )
    fns = itertools.cycle(("soft_clip", "gin", "gin of channels", "tanh", "sigmoid + 1e-3"))
    for shape, memory in itertools.product(KERNEL_SHAPES, LAYOUTS):
        for mask, layout, fn in zip(masks_of(shape), itertools.cycle((None, *COUPLING_LAYOUTS)), fns, strict=False):
            for op, make in ops.items():
                name = f"{shape} {memory} {mask} {layout} {fn} fp32"
                yield Call(name, op, partial(make, shape, torch.float32, fn, mask, layout, memory=memory), least=1.0)
    for (op, make), dtype, fn in itertools.product(ops.items(), DTYPES, ("tanh", "atan")):
        weighted = fn in WEIGHTED
        yield Call(
            f"{fn} {dtype_name(dtype)}",
            op,
            partial(make, (3, 12, 4, 6), dtype, fn, "alternate", weighted=weighted),
            least=1.0,
        )
    for (op, make), kind in itertools.product(ops.items(), STRIDES):
        yield Call(kind, op, partial(make, (2, 8, 5, 6), torch.float32, kind=kind), least=1.0)
    for mask, inverse in itertools.product(MASKS, (False, True)):
        yield Call(
            f"{mask} {inverse}",
            "affine_coupling_additive",
            partial(additive, (3, 12, 4, 6), torch.float32, mask, inverse),
        )


def check_nothing(kernels):
    for shape in ((0, 4, 3), (2, 4, 0)):
        x, raw = torch.zeros(shape), torch.zeros(shape[0], 4, *shape[2:])
        args = (raw, None, None, None, [0, 0, 0, 0, COUPLING_MASKS.index("first_half"), 0, 0], 1.0, 0.0, 0.0, 1.0)
        y, log_det = kernels.affine_coupling_fwd(x, *args)
        assert y.shape == shape and log_det.shape == shape[:1] and not log_det.any()
        dx, d_raw, d_shift, d_weight = kernels.affine_coupling_bwd(x, log_det, x, *args)
        assert dx.shape == shape and d_raw.shape == raw.shape and d_shift.numel() == d_weight.numel() == 0


@pytest.mark.parametrize("indices", [[0, 6], [-1, 2], [1, 1]])
def check_wrong_indices(kernels, indices):
    """Nothing is read or written out of bounds, and the log-determinant says that something is wrong."""
    codes = [0, 0, 0, 0, COUPLING_MASKS.index("indices"), 0, 0]
    args = (torch.tensor(indices), codes, 1.0, 0.0, 0.0, 1.0)
    y, log_det = kernels.affine_coupling_fwd(torch.zeros(3, 6, 5), torch.zeros(3, 4, 5), None, None, *args)
    assert log_det.isnan().all() and not y.isnan().any()


def gates(arch: int) -> Iterator[Call]:
    """A RealNVP of vectors in every dtype and a Glow of images; for sm_90 also other forms of the scale."""
    for op, make in (("affine_coupling_fwd", forward), ("affine_coupling_bwd", backward)):
        for dtype in DTYPES:
            yield Call(
                f"vectors {dtype_name(dtype)}", op, partial(make, (65536, 64), dtype, "sigmoid + 1e-3", "alternate")
            )
        shape = (64, 12, 32, 32)
        yield Call("image bf16", op, partial(make, shape, torch.bfloat16, "sigmoid", "second_half", "interleaved"))
        if arch == 90:
            for fn in ("soft_tanh", "softplus", "atan", "gin"):
                yield Call(
                    f"{fn} bf16", op, partial(make, shape, torch.bfloat16, fn, "checkerboard", memory="channels_last")
                )
            yield Call("weights fp32", op, partial(make, shape, torch.float32, "tanh", "first_half", weighted=True))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def gpu_values_and_gradients(dtype, shape, layout, mask):
    if mask not in masks_of(shape):
        pytest.skip("a checkerboard lies on an image")
    tensors, chosen = arguments(shape, dtype, mask, layout=layout)
    tensors = [None if t is None else t.cuda() for t in tensors]
    chosen = chosen.cuda() if isinstance(chosen, Tensor) else chosen
    grads = randn(*shape, seed=3, dtype=dtype).cuda(), randn(shape[0], seed=4).cuda()
    options: dict[str, Any] = {"scale_fn": SCALE_FNS["sigmoid + 1e-3"], "mask": chosen}
    wide = [None if t is None else t.double() for t in tensors]
    actual, beside = (gradients(f, tensors, grads, **options) for f in (of_op, plain))
    exact = gradients(plain, wide, grads, **options)
    for a, b, e, terms in zip(actual, beside, exact, terms_of(exact, shape), strict=True):
        assert_bar(a, b, e, 1e-12 if dtype == torch.float64 else 1e-6, terms)
    again = gradients(of_op, tensors, grads, **options)
    assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True))
