"""`causal_transformer_inverse`: what it gives is what the whole transformer, run anew for every token, says of it."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.ops import causal_transformer_inverse
from fastgen.ops._packed_weights import WEIGHTS
from fastgen.reference import causal_transformer_inverse as reference

from .causal_transformer_inverse_cases import arguments, example, raw
from .numerics import assert_any_threads, assert_bar, assert_registered, guarded, poison_allocator

CASES = {
    "two layers": {},
    "no layer": {"layers": 0},
    "one token": {"tokens": 1},
    "volumes kept": {"scaled": False},
    "no condition": {"conditional": False},
    "guided": {"guided": True},
    "guided, volumes kept": {"guided": True, "scaled": False, "images": 9},
    "odd sizes": {"images": 1, "channels": 14, "heads": 2, "features": 3, "hidden": 17, "tokens": 19},
    "many tokens": {"tokens": 70, "channels": 16, "heads": 1, "hidden": 16, "layers": 1, "images": 2},
    "many images": {"images": 45, "guided": True, "layers": 1},
    "wide heads": {"channels": 160, "heads": 1, "hidden": 32, "layers": 1},
}


def whole(
    input: Tensor, position: Tensor, weights: list[Tensor], parameters: list[Tensor], *, heads: int,
    condition: Tensor | None, unconditional: Tensor | None, guidance: Tensor | None, unconditional_temperature: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """By the whole transformer, with a mask, for every token."""

    def said(x: Tensor, added: Tensor | None, temperature: float) -> tuple[Tensor, Tensor]:
        h = F.linear(x, weights[0], parameters[0]) + position
        h = h if added is None else h + added
        size = h.shape[2] // heads
        for i in range((len(weights) - 2) // 4):
            w1, b1, bqkv, bp, w2, b2, bu, bd = parameters[1 + 8 * i : 9 + 8 * i]
            wqkv, wp, wu, wd = weights[1 + 4 * i : 5 + 4 * i]
            q, k, v = (
                F.linear(F.layer_norm(h, h.shape[2:], w1, b1), wqkv, bqkv).unflatten(2, (3, heads, size)).unbind(2)
            )
            scores = torch.einsum("nihe,njhe->nhij", q, k) / size**0.5 / temperature
            later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            seen = torch.einsum("nhij,njhe->nihe", scores.masked_fill(later, -torch.inf).softmax(3), v)
            h = h + F.linear(seen.flatten(2), wp, bp)
            h = h + F.linear(F.gelu(F.linear(F.layer_norm(h, h.shape[2:], w2, b2), wu, bu)), wd, bd)
        out = F.linear(h, weights[-1], parameters[-1])
        a, b = out.chunk(2, 2) if out.shape[2] == 2 * x.shape[2] else (torch.zeros_like(x), out)
        return a, b

    x, log_det = input.clone(), input.new_zeros(len(input))
    for t in range(1, x.shape[1]):
        a, b = said(x, None if condition is None else condition[:, None], 1.0)
        if guidance is not None:
            a0, b0 = said(x, unconditional, unconditional_temperature)
            a, b = a + guidance[t, 0] * (a - a0), b + guidance[t, 1] * (b - b0)
        x[:, t] = input[:, t] * a[:, t - 1].exp() + b[:, t - 1]
        log_det += a[:, t - 1].sum(1)
    return x, log_det


@pytest.mark.isa
@pytest.mark.parametrize("name", CASES)
def test_in_float64(name):
    named = arguments(**CASES[name])
    for actual, expected in zip(causal_transformer_inverse(**named), whole(**named), strict=True):
        assert actual.dtype == torch.float64
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.isa
@pytest.mark.parametrize("name", CASES)
def test_in_float32(name):
    named = arguments(torch.float32, **CASES[name])
    exact = whole(**widened(named))
    for actual, plain, expected in zip(causal_transformer_inverse(**named), whole(**named), exact, strict=True):
        assert actual.dtype == torch.float32
        assert_bar(actual, plain, expected, slack=2e-6)


@pytest.mark.isa
@pytest.mark.parametrize("name", CASES)
def test_the_reference(name):
    named = arguments(**CASES[name])
    given = raw(named)
    for actual, expected in zip(reference.causal_transformer_inverse(*given), whole(**named), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype):
    named = arguments(dtype, guided=True)
    x, log_det = causal_transformer_inverse(**named)
    exact, exact_log_det = whole(**widened(named))
    assert (x.dtype, log_det.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(x.double(), exact.to(dtype).double(), rtol=2**-7, atol=1e-3)
    torch.testing.assert_close(log_det.double(), exact_log_det, rtol=1e-5, atol=1e-5)


def widened(named: dict) -> dict:
    def wide(value: object) -> object:
        if isinstance(value, list):
            return [wide(v) for v in value]
        return value.double() if isinstance(value, Tensor) else value

    return {name: wide(value) for name, value in named.items()}


@pytest.mark.isa
def test_a_sample_depends_on_itself_alone():
    """Bit for bit, whichever go together, and on how many threads."""
    named = arguments(torch.float32, images=37, guided=True)
    expected = causal_transformer_inverse(**named)
    for first, last in ((0, 1), (3, 8), (20, 37)):
        part = {**named, "input": named["input"][first:last], "condition": named["condition"][first:last]}
        for a, e in zip(causal_transformer_inverse(**part), expected, strict=True):
            assert torch.equal(a, e[first:last])


@pytest.mark.isa
def test_threads():
    named = arguments(torch.float32, images=20, tokens=9)
    assert_any_threads(lambda: causal_transformer_inverse(**named))


@pytest.mark.isa
def test_memory_around_is_left_alone():
    named = arguments(torch.float32, guided=True)
    expected = causal_transformer_inverse(**named)
    inside = {name: guarded(value) if isinstance(value, Tensor) else value for name, value in named.items()}
    for name in ("weights", "parameters"):
        inside[name] = [guarded(t) for t in named[name]]
    poison_allocator(4096)
    for a, e in zip(causal_transformer_inverse(**inside), expected, strict=True):
        assert torch.equal(a, e)


@pytest.mark.isa
def test_strides():
    named = arguments(torch.float32)
    expected = causal_transformer_inverse(**named)
    other = {**named, "input": named["input"].transpose(0, 1).contiguous().transpose(0, 1)}
    other["position"] = named["position"].T.contiguous().T
    other["condition"] = named["condition"].repeat_interleave(2, 1)[:, ::2]
    for a, e in zip(causal_transformer_inverse(**other), expected, strict=True):
        assert torch.equal(a, e)


@pytest.mark.isa
def test_nan_goes_as_far_as_it_must():
    """To the tokens after it, of its own image."""
    named = arguments(torch.float32, images=3, tokens=6)
    expected = causal_transformer_inverse(**named)
    named["input"][1, 2, 0] = torch.nan
    x, log_det = causal_transformer_inverse(**named)
    assert x[1, 2, 0].isnan() and x[1, 3:].isnan().all() and log_det[1].isnan()
    assert torch.equal(x[1, :2], expected[0][1, :2])
    assert torch.equal(x[::2], expected[0][::2]) and torch.equal(log_det[::2], expected[1][::2])


@pytest.mark.isa
def test_large_latents_overflow_as_torch_does():
    named = arguments(torch.float32, layers=0, conditional=False)
    named["parameters"][-1][:4] = 100.0  # e^100
    assert torch.equal(causal_transformer_inverse(**named)[0].isinf(), whole(**named)[0].isinf())


@pytest.mark.isa
def test_nothing():
    named = arguments(images=0)
    x, log_det = causal_transformer_inverse(**named)
    assert (x.shape, log_det.shape) == ((0, 5, 4), (0,))


@pytest.mark.isa
def test_registered():
    for dtype in (torch.float32, torch.float64):
        assert_registered(torch.ops.fastgen.causal_transformer_inverse.default, raw(arguments(dtype, guided=True)))


def test_weights_that_change_are_packed_anew():
    named = arguments(torch.float32)
    before = causal_transformer_inverse(**named)[0]
    taken = WEIGHTS.bytes
    assert torch.equal(causal_transformer_inverse(**named)[0], before) and WEIGHTS.bytes == taken
    named["weights"][1].mul_(0.5)
    after = causal_transformer_inverse(**named)[0]
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, whole(**named)[0], rtol=1e-5, atol=1e-5)


def test_weights_past_the_limit_of_memory(monkeypatch):
    named = arguments(torch.float32)
    expected = causal_transformer_inverse(**named)[0]
    WEIGHTS.clear()
    monkeypatch.setattr(WEIGHTS, "limit", 0)
    assert torch.equal(causal_transformer_inverse(**named)[0], expected) and WEIGHTS.bytes == 0


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"input": torch.zeros(3, 5)}, ValueError, r"input must be \[N, T, D\].* got shape \(3, 5\)"),
        ({"input": torch.zeros(3, 0, 4)}, ValueError, r"input must be \[N, T, D\] with T and D at least 1"),
        ({"position": torch.zeros(4, 24)}, ValueError, "position must have shape|position must be contiguous"),
        ({"heads": 7}, ValueError, "heads must divide C = 24, got 7"),
        ({"weights": torch.zeros(3)}, TypeError, "weights must be a sequence of tensors, got torch.float32"),
        ({"weights": [torch.zeros(3)] * 10}, ValueError, r"weights\[0\] must be \[outputs, inputs\], got shape"),
        ({"parameters": []}, ValueError, r"parameters 2 \+ 8 L"),
        ({"condition": torch.zeros(2, 24)}, ValueError, "condition must"),
        ({"guidance": torch.zeros(5, 3)}, ValueError, "guidance must"),
        ({"input": torch.zeros(3, 5, 4, requires_grad=True)}, ValueError, "no gradient in input: detach it"),
    ],
)
def test_errors(changes, error, message):
    with pytest.raises(error, match=f"causal_transformer_inverse: .*{message}"):
        causal_transformer_inverse(**{**example(torch.float32), **changes})
