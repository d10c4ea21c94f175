"""Arguments of `logistic_mixture` for its tests, and the same likelihood as pixel-cnn-pp writes it."""

import importlib
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
from fastgen.ops import logistic_mixture, logistic_mixture_sample
from fastgen.reference import logistic_mixture as reference

from .families import Call, OfTensors
from .numerics import DTYPES, LAYOUTS, STRIDES, dtype_name, laid_out, randn, strided

EACH = {1: 3, 3: 10}  # colors of a pixel -> parameters of a mixture


def grid(values: Tensor, levels: int) -> Tensor:
    """The nearest of ``levels`` values from -1 to 1."""
    return ((values.clamp(-1, 1) + 1) / 2 * (levels - 1)).round() * 2 / (levels - 1) - 1


def parameters(n: int, channels: int, mixtures: int, h: int, w: int, seed: int = 0, log_scale: float = -2.0) -> Tensor:
    """[N, 10 M or 3 M, H, W] in float64: means in and around [-1, 1], scales about exp(``log_scale``)."""
    logits = randn(n, EACH[channels] * mixtures, h, w, seed=seed)
    colors = logits[:, mixtures:].unflatten(1, (channels, -1, mixtures))
    colors[:, :, 0] *= 0.6
    colors[:, :, 1] = colors[:, :, 1] * 0.5 + log_scale
    return logits


def pictures(n: int, channels: int, h: int, w: int, levels: int = 256, seed: int = 9) -> Tensor:
    """Images [N, C, H, W] in float64, some of their pixels at the ends."""
    return grid(0.7 * randn(n, channels, h, w, seed=seed), levels)


def port(logits: Tensor, target: Tensor, levels: int = 256) -> Tensor:
    """`discretized_mix_logistic_loss` and `_1d` of pixel-cnn-pp, of each sample [N], with half a bin of 1 / (levels - 1)."""
    x, params = target.permute(0, 2, 3, 1), logits.permute(0, 2, 3, 1)
    channels, mixtures = x.shape[-1], params.shape[-1] // EACH[x.shape[-1]]
    logit_probs, half = params[..., :mixtures], 1 / (levels - 1)
    params = params[..., mixtures:].reshape(*x.shape, -1)
    means, log_scales = params[..., :mixtures], params[..., mixtures : 2 * mixtures].clamp(min=-7.0)
    x = x.unsqueeze(-1).expand(*x.shape, mixtures)
    if channels == 3:
        k = torch.tanh(params[..., 2 * mixtures :])
        second = means[..., 1, :] + k[..., 0, :] * x[..., 0, :]
        third = means[..., 2, :] + k[..., 1, :] * x[..., 0, :] + k[..., 2, :] * x[..., 1, :]
        means = torch.stack([means[..., 0, :], second, third], dim=-2)
    centered, inverse = x - means, torch.exp(-log_scales)
    plus, minus = inverse * (centered + half), inverse * (centered - half)
    delta = torch.sigmoid(plus) - torch.sigmoid(minus)
    middle = inverse * centered
    log_pdf = middle - log_scales - 2 * F.softplus(middle)
    inner = torch.where(delta > 1e-5, torch.log(delta.clamp(min=1e-12)), log_pdf + math.log(2 * half))
    log_probs = torch.where(x < -0.999, plus - F.softplus(plus), torch.where(x > 0.999, -F.softplus(minus), inner))
    joint = log_probs.sum(-2) + torch.log_softmax(logit_probs, -1)
    return -torch.logsumexp(joint, -1).sum((1, 2))


def example(dtype: torch.dtype) -> dict[str, Any]:
    return {"logits": parameters(2, 3, 2, 3, 5).to(dtype), "target": pictures(2, 3, 3, 5).to(dtype), "levels": 256}


def examples() -> list[dict[str, Any]]:
    return [{"logits": parameters(2, 1, 2, 3, 5).float(), "target": pictures(2, 1, 3, 5).float(), "levels": 16}]


UNSEEN = {
    "logistic_mixture_sample": lambda: (parameters(2, 3, 2, 3, 5).float(), torch.tensor([1, -5]), 3, 0, 0, 256, 1.0)
}
REFUSED = [
    ("logistic_mixture_fwd", {"levels": 1}, "levels must be at least 2"),
    ("logistic_mixture_bwd", {"levels": -3}, "levels must be at least 2"),
    ("logistic_mixture_sample", {"levels": 1}, "levels must be"),
    ("logistic_mixture_sample", {"channels": 2}, "channels must be 1 or 3"),
    ("logistic_mixture_sample", {"channels": 1}, "must have 3 channels a mixture"),
    ("logistic_mixture_sample", {"element": -1}, "element must not be negative"),
    ("logistic_mixture_sample", {"temperature": -1.0}, "temperature must be finite and not negative"),
    ("logistic_mixture_sample", {"temperature": math.nan}, "temperature"),
]


def harmless(op: str, name: str, how: str, arguments: dict[str, Any]) -> bool:
    """Twice the parameters are those of twice the mixtures; an image that is drawn may be of any size."""
    if name != "logits":
        return False
    return how == "dimension 1 too long" or (op.endswith("sample") and how.startswith(("dimension 2", "dimension 3")))


MAPPED = OfTensors(
    logistic_mixture,
    lambda k: [parameters(2, 3, 2, 3, 5, seed=k).float(), pictures(2, 3, 3, 5, seed=k + 50).float()],
)
EXPORTED = {
    "logistic_mixture": OfTensors(
        logistic_mixture, lambda n: [parameters(n, 3, 2, 3, 5).float(), pictures(n, 3, 3, 5).float()]
    ),
    "logistic_mixture sample": OfTensors(
        lambda seeds, logits: logistic_mixture_sample(logits, seeds=seeds, levels=16),
        lambda n: [torch.arange(n) * 2**40, parameters(n, 3, 2, 3, 5).float()],
    ),
}
NO_STORAGE_TYPE = {"logistic_mixture.logistic_mixture_finish_kernel"}  # it merges partial sums
# a mixture's gradient is written before the next one's parameters are read
STORES_IN_A_LOOP = {"logistic_mixture.logistic_mixture_bwd_kernel"}


def counted(step: int) -> Tensor:
    return logistic_mixture_sample(torch.linspace(-2, 1, 240).reshape(2, 20, 2, 3), seeds=torch.arange(2), step=step)


def forward(shape, dtype, layout, levels=256, kind=None) -> tuple[Any, ...]:
    n, channels, mixtures, h, w = shape
    logits, target = parameters(n, channels, mixtures, h, w).to(dtype), pictures(n, channels, h, w, levels).float()
    if kind is None:
        return laid_out(logits, layout), laid_out(target, layout), levels
    return strided(logits, kind), strided(target, kind), levels


def backward(shape, dtype, *args, **options) -> tuple[Any, ...]:
    grad = torch.linspace(0.5, 2, shape[0]).to(torch.promote_types(dtype, torch.float32))
    return (grad, *forward(shape, dtype, *args, **options))


def draw(shape, dtype, layout, levels, temperature=1.0, kind=None) -> tuple[Any, ...]:
    logits = forward(shape, dtype, layout, kind=kind)[0]
    return logits, torch.tensor([7, -3][: shape[0]]), shape[1], 5, 2, levels, temperature


def calls() -> Iterator[Call]:
    def all_three(name, shape, dtype, layout, levels=256, kind=None):
        yield Call(name, "logistic_mixture_fwd", partial(forward, shape, dtype, layout, levels, kind))
        yield Call(name, "logistic_mixture_bwd", partial(backward, shape, dtype, layout, levels, kind), least=1.0)
        yield Call(name, "logistic_mixture_sample", partial(draw, shape, dtype, layout, 0, 1.0, kind), least=4.0)

    for dtype, layout, channels in itertools.product(DTYPES, LAYOUTS, (1, 3)):
        name = f"{channels} {layout} {dtype_name(dtype)}"
        yield from all_three(name, (2, channels, 3, 5, 7), dtype, layout)
    for shape in ((1, 3, 10, 19, 17), (2, 1, 1, 1, 1), (1, 3, 1, 1, 9)):
        yield from all_three(f"{shape}", shape, torch.float32, "channels_last")
    for levels in (2, 16):
        yield from all_three(f"{levels} levels", (2, 3, 3, 4, 5), torch.float32, "contiguous", levels)
    for kind in STRIDES:
        yield from all_three(kind, (2, 3, 2, 5, 4), torch.float32, None, kind=kind)
    for temperature, levels in itertools.product((0.5, 0.0), (0, 16)):
        args = ((2, 3, 4, 5, 6), torch.float32, "contiguous", levels, temperature)
        yield Call(f"{temperature}, {levels} levels", "logistic_mixture_sample", partial(draw, *args), least=4.0)


def check_many_partial_sums(kernels):
    arguments = forward((2, 1, 2, 40, 41), torch.float32, "contiguous")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module("fastgen.kernels.logistic_mixture"), "FINISH_BLOCK", 4)
        losses = kernels.logistic_mixture_fwd(*arguments)
    expected = reference.logistic_mixture_fwd(arguments[0].double(), *arguments[1:])
    torch.testing.assert_close(losses.double(), expected, rtol=4e-6, atol=0.0)


@pytest.mark.parametrize("log_scale", [-9.0, -7.0, 0.0, 5.0, 60.0])
@pytest.mark.parametrize("channels", [1, 3])
def check_extreme_scales(kernels, channels, log_scale):
    logits, target = parameters(2, channels, 3, 3, 5, log_scale=log_scale).float(), pictures(2, channels, 3, 5).float()
    losses = kernels.logistic_mixture_fwd(logits, target, 256)
    exact = reference.logistic_mixture_fwd(logits.double(), target, 256)
    torch.testing.assert_close(losses.double(), exact, rtol=1e-5, atol=1e-5)
    gradient = kernels.logistic_mixture_bwd(torch.ones(2), logits, target, 256)
    exact = reference.logistic_mixture_bwd(torch.ones(2), logits.double(), target, 256)
    # narrow scales: a likelihood of hundreds of nats weighs its mixtures by the exponential of its rounding
    torch.testing.assert_close(gradient.double(), exact, rtol=1e-3, atol=1e-4 * exact.abs().max().item())


def check_not_finite(kernels):
    """A NaN makes its own sample's loss NaN and its own pixel's draw, no other's; an infinity its own pixel's draw."""
    for channel in (0, 5, 9, 17):
        logits, target, levels = forward((3, 3, 2, 3, 5), torch.float32, "contiguous")
        logits[1, channel, 2, 3] = math.nan
        losses = kernels.logistic_mixture_fwd(logits, target, levels)
        assert losses.isnan().tolist() == [False, True, False]
        logits[0, channel, 0, 4] = math.inf
        images = kernels.logistic_mixture_sample(logits, torch.arange(3), 3, 0, 0, 0, 1.0)
        assert images.isnan().nonzero().tolist() == [[0, c, 0, 4] for c in range(3)] + [[1, c, 2, 3] for c in range(3)]


def check_nothing(kernels):
    for shape in ((2, 20, 0, 3), (0, 20, 2, 3)):
        logits, target = torch.zeros(shape), torch.zeros(shape[0], 3, *shape[2:])
        losses = kernels.logistic_mixture_fwd(logits, target, 256)
        assert losses.tolist() == [0.0] * shape[0]
        assert kernels.logistic_mixture_bwd(losses, logits, target, 256).shape == shape
        images = kernels.logistic_mixture_sample(logits, torch.zeros(shape[0]).long(), 3, 0, 0, 0, 1.0)
        assert images.shape == target.shape


def check_reasons(kernels):
    reasons, x, byte = _dispatch.Triton.reasons, torch.zeros(1, 10, 2, 2), torch.zeros(1, 10, 2, 2, dtype=torch.uint8)
    dtype = ["the kernels take float64, float32, bfloat16 and float16, not torch.uint8"]
    assert reasons("logistic_mixture_fwd", x, x[:, :3], 256) == []
    assert reasons("logistic_mixture_bwd", x[:, 0, 0, 0], x, byte[:, :3], 256) == dtype
    assert reasons("logistic_mixture_sample", byte, torch.zeros(1).long(), 3, 0, 0, 0, 1.0) == dtype
    assert reasons("logistic_mixture_sample", x, torch.zeros(1), 3, 0, 0, 0, 1.0) == [
        "seeds must be int64, got torch.float32"
    ]


def gates(arch: int) -> Iterator[Call]:
    def zeros(op, channels, mixtures, size, dtype, layout, temperature=1.0, levels=256):
        logits, target = (
            laid_out(torch.zeros(2, c, size, size, dtype=dtype), layout) for c in (EACH[channels] * mixtures, channels)
        )
        if op == "sample":
            return logits, torch.zeros(2, dtype=torch.int64), channels, 0, 1, levels, temperature
        grad = (torch.zeros(2, dtype=torch.promote_types(dtype, torch.float32)),) if op == "bwd" else ()
        return (*grad, logits, target, levels)

    for dtype, layout, channels, op in itertools.product(DTYPES, LAYOUTS, (3, 1), ("fwd", "bwd", "sample")):
        name = f"mixture of {channels}, {layout} {dtype_name(dtype)}"
        yield Call(name, f"logistic_mixture_{op}", partial(zeros, op, channels, 10, 64, dtype, layout))
    for op in ("fwd", "bwd", "sample"):
        args = (op, 3, 1, 1, torch.float32, "contiguous", 0.0, 0 if op == "sample" else 2)
        yield Call("one mixture", f"logistic_mixture_{op}", partial(zeros, *args))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def gpu_values_gradients_and_draws(dtype, channels, layout):
    logits, target, levels = forward((3, channels, 10, 33, 21), dtype, layout)
    leaf = logits.cuda().requires_grad_()
    losses = logistic_mixture(leaf, target.cuda())
    losses.sum().backward()
    exact = reference.logistic_mixture_fwd(logits.double(), target, levels)
    torch.testing.assert_close(losses.detach().cpu().double(), exact, rtol=4e-6, atol=1e-5)
    exact = reference.logistic_mixture_bwd(torch.ones(3), logits.double(), target, levels)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 8e-3)
    assert (leaf.grad.cpu().double() - exact).abs().max() <= tolerance * exact.abs().max()
    seeds = torch.tensor([1, -5, 2**40])
    images = logistic_mixture_sample(logits.cuda(), seeds=seeds.cuda(), channels=channels).cpu()
    expected = reference.logistic_mixture_sample(logits.double(), seeds, channels, 0, 0, 0, 1.0)
    differs = ((images - expected).abs() > 1e-5).any(1)
    assert differs.double().mean() < 1e-3  # another mixture, where a uniform falls within rounding of a step
