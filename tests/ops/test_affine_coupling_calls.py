"""`affine_coupling` and `additive_coupling` as calls: what is copied and kept, fakes, compilation, dtypes beside, errors."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from fastgen._schema import COUPLING_LAYOUTS, COUPLING_MASKS
from fastgen.ops import ScaleFn, additive_coupling, affine_coupling
from fastgen.reference._layout import is_channels_last

from ..backends import requires_cpu
from .affine_coupling_cases import (
    additive,
    arguments,
    backward,
    forward,
    make_mask,
    of_op,
    transformed,
)
from .numerics import (
    LAYOUTS,
    assert_fake,
    assert_registered,
    laid_out,
    randn,
)

ops = torch.ops.fastgen


@requires_cpu
@pytest.mark.parametrize("mask", ["none", "alternate", "second_half"])
def test_views_are_read_in_place(mask):
    """Halves of a conditioner's output, channel slices of either layout: no copy, which would be an op of torch's."""
    for big in (randn(3, 24, 6, 5, dtype=torch.float32), randn(7, 24, dtype=torch.float32)):
        for layout in LAYOUTS:
            x, wide = laid_out(big, layout)[:, 4:16], laid_out(torch.cat([big, big], 1), layout)
            chosen = make_mask(mask, 12)
            count = transformed(chosen, 12)
            code = COUPLING_MASKS.index("indices" if isinstance(chosen, Tensor) else chosen or "none")
            indices = chosen if isinstance(chosen, Tensor) else None
            rest = (None, indices, [0, 0, 0, 0, code, 0, 0], 1.0, 0.0, 0.0, 1.0)
            for raw, shift in ((wide[:, :count], wide[:, 24 : 24 + count]), (wide[:, 3 : 3 + 2 * count], None)):
                with torch.profiler.profile() as profile:
                    ops.affine_coupling_fwd(x, raw, shift, *rest)
                    ops.affine_coupling_bwd(x, big[:, 0].reshape(len(big), -1)[:, 0], x, raw, shift, *rest)
                assert not {event.key for event in profile.key_averages()} & {
                    "aten::copy_",
                    "aten::clone",
                    "aten::contiguous",
                }


def test_the_gradient_of_a_packed_tensor_is_packed():
    """One buffer in the layout of the conditioner's output, written once."""
    for layout in COUPLING_LAYOUTS:
        (x, raw, _, _), _ = arguments((2, 6, 5, 4), torch.float32, "second_half")
        raw = raw.requires_grad_()
        with torch.profiler.profile() as profile:
            by_raw = torch.autograd.grad(affine_coupling(x, raw, mask="second_half", layout=layout)[0].sum(), raw)[0]
        assert by_raw.is_contiguous() and by_raw.shape == raw.shape
        assert not {event.key for event in profile.key_averages()} & {"aten::cat", "aten::slice_backward"}


def test_only_the_arguments_are_kept_for_the_backward():
    kept = []
    x, raw = (
        randn(2, 6, 4, dtype=torch.float32).requires_grad_(),
        randn(2, 6, 4, seed=1, dtype=torch.float32).requires_grad_(),
    )
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()), lambda t: t):
        affine_coupling(x, raw, mask="first_half")
        additive_coupling(x, raw)
    assert kept == [x.data_ptr(), raw.data_ptr()]


def test_only_the_gradients_asked_for():
    (x, raw, shift, weight), _ = arguments((2, 6, 4), torch.float32, packed=False, weighted=True)
    for i, leaf in enumerate((x, raw, shift, weight)):
        given = [t.clone() for t in (x, raw, shift, weight)]
        given[i].requires_grad_()
        y, log_det = of_op(*given, scale_fn="tanh")
        assert torch.autograd.grad(y.sum() + log_det.sum(), given[i])[0].shape == leaf.shape
    with torch.no_grad():
        assert not affine_coupling(x.requires_grad_(), raw, shift)[0].requires_grad


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 6, 4, 5), (2, 6), (0, 6, 2), (1, 2, 3, 3)])
def test_fakes(shape, layout):
    for (op, make), name in itertools.product(
        ((ops.affine_coupling_fwd, forward), (ops.affine_coupling_bwd, backward)), (None, "interleaved")
    ):
        compare = assert_registered if shape == (2, 6, 4, 5) and name else assert_fake
        for dtype, mask in ((torch.float32, "first_half"), (torch.bfloat16, "alternate")):
            compare(op.default, make(shape, dtype, "tanh", mask, name, weighted=name is None, memory=layout))
    assert_fake(ops.affine_coupling_additive.default, additive(shape, torch.float32, "alternate"))
    if shape == (2, 6):
        assert_registered(ops.affine_coupling_additive.default, additive(shape, torch.float32))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled(backend):
    torch._dynamo.reset()
    (x, raw, _, _), _ = arguments((2, 8, 6, 6), torch.float32, "second_half", layout="channels_last")
    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()

    def model(t):
        y, log_det = affine_coupling(t * 2, raw, scale_fn=ScaleFn("sigmoid", offset=2, eps=1e-3), mask="second_half")
        return additive_coupling(y, y[:, :4], mask="first_half") + log_det[:, None, None, None]

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(leaf), model(other))
    torch.testing.assert_close(
        *(torch.autograd.grad(f(t).square().sum(), t)[0] for f, t in ((compiled, leaf), (model, other)))
    )


def test_raw_scales_of_another_dtype():
    """As autocast leaves them: bfloat16 beside float32."""
    (x, raw, _, _), _ = arguments((4, 12), torch.float32, "first_half")
    narrow = raw.bfloat16().requires_grad_()
    y, log_det = affine_coupling(x, narrow, mask="first_half")
    assert y.dtype == log_det.dtype == torch.float32
    expected = affine_coupling(x, narrow.detach().float(), mask="first_half")
    assert torch.equal(y, expected[0]) and torch.equal(log_det, expected[1])
    assert torch.autograd.grad(y.sum(), narrow)[0].dtype == torch.bfloat16
    assert not is_channels_last(y)


@pytest.mark.parametrize("indices", [[0, 6], [-1, 2], [1, 1]])
def test_wrong_indices(indices):
    with pytest.raises(RuntimeError, match=r"indices must (be in \[0, 6\)|differ), got "):
        affine_coupling(torch.zeros(2, 6, 3), torch.zeros(2, 4, 3), mask=torch.tensor(indices))


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, r"scale_fn must be a ScaleFn or one of \('exp', .*'gin'\), got 'relu'", {"scale_fn": "relu"}),
        (ValueError, r"scale_fn must be .*, got \['exp'\]", {"scale_fn": ["exp"]}),
        (ValueError, r"order must be one of \('scale_shift', 'shift_scale'\), got 'both'", {"order": "both"}),
        (ValueError, r"layout must be one of .*, got 'packed'", {"layout": "packed"}),
        (ValueError, r"mask must be None, an int64 tensor of indices or one of \('first_half', .*\), got 'half'", {"mask": "half"}),
        (ValueError, r"mask must be .*, got \[0, 1\]", {"mask": [0, 1]}),
        (TypeError, "mask must be an int64 tensor of indices, got torch.bool", {"mask": torch.zeros(6).bool()}),
        (ValueError, r"mask must be \[C'\] with 1 <= C' <= 6, got shape \(7,\)", {"mask": torch.arange(7)}),
        (ValueError, r"mask must be \[C'\] with 1 <= C' <= 6, got shape \(0,\)", {"mask": torch.arange(0)}),
        (ValueError, "mask must be on the device of input .* got meta", {"mask": torch.arange(6, device="meta")}),
        (ValueError, r"input must be \[N, C, H, W\] for a checkerboard, got shape \(2, 6, 3\)", {"mask": "checkerboard"}),
        (ValueError, r"the mask must leave a channel .* shape \(2, 1\)", {"input": torch.zeros(2, 1), "mask": "first_half"}),
        (TypeError, "input must be a floating-point tensor, got list", {"input": [1.0]}),
        (ValueError, r"input must be \[N, C\] or \[N, C, \*spatial\], got shape \(6,\)", {"input": torch.zeros(6)}),
        (TypeError, "raw_scale must be a floating-point tensor, got torch.int64", {"raw_scale": torch.zeros(2, 6, 3).long()}),
        (ValueError, r"raw_scale must be \(2, 6, 3\) .* this mask, got shape \(2, 3, 3\)", {"raw_scale": torch.zeros(2, 3, 3)}),
        (ValueError, r"raw_scale, which holds the shift too, must be \(2, 12, 3\) .*, got shape \(2, 6, 3\)", {"shift": None}),
        (ValueError, r"shift must be \(2, 6, 3\) .*, got shape \(2, 6, 1\)", {"shift": torch.zeros(2, 6, 1)}),
        (ValueError, "shift must be on the device of input .* got meta", {"shift": torch.zeros(2, 6, 3, device="meta")}),
        (ValueError, r"scale_weight must be \[C'\] with C' = 6", {"scale_weight": torch.zeros(3), "scale_fn": "tanh"}),
        (ValueError, r"scale_weight goes with the scale functions \('tanh', 'soft_tanh'\) alone", {"scale_weight": torch.zeros(6)}),
    ],
)  # fmt: skip
def test_errors(error, message, change):
    given_ = {"input": torch.zeros(2, 6, 3), "raw_scale": torch.zeros(2, 6, 3), "shift": torch.zeros(2, 6, 3)} | change
    with pytest.raises(error, match=f"affine_coupling: {message}"):
        affine_coupling(**given_)


@pytest.mark.parametrize(
    ("message", "fields"),
    [
        ("kind must be one of .*, got 'relu'", {"kind": "relu"}),
        ("bound must be positive, got 0", {"bound": 0}),
        ("bound must be a number, got nan", {"bound": math.nan}),
        ("gain must be a number, got '1'", {"gain": "1"}),
        ("eps must be 0 or at least 1e-30, got -1", {"kind": "sigmoid", "eps": -1}),
        ("eps must be 0 or at least 1e-30, got 1e-40", {"kind": "sigmoid", "eps": 1e-40}),
        ("center must be one of .*, got 'batch'", {"center": "batch"}),
        ("no center is taken from sigmoid", {"kind": "sigmoid", "center": "sample"}),
    ],
)
def test_errors_of_a_scale_fn(message, fields):
    with pytest.raises(ValueError, match=f"ScaleFn: {message}"):
        ScaleFn(**fields)


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, "mask must be None, .*, got 'half'", {"mask": "half"}),
        (TypeError, "shift must be a floating-point tensor, got int", {"shift": 1}),
        (ValueError, r"shift must be \(2, 3, 3\) .*, got shape \(2, 6, 3\)", {"mask": "first_half"}),
    ],
)
def test_errors_of_additive_coupling(error, message, change):
    with pytest.raises(error, match=f"additive_coupling: {message}"):
        additive_coupling(**{"input": torch.zeros(2, 6, 3), "shift": torch.zeros(2, 6, 3)} | change)
