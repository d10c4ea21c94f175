"""Moments that a convolution gathers for the norm after it: their values on every path, and when they are taken for true."""

import copy
import io
import pickle
import sys

import pytest
import torch

from fastgen.nn import ResBlock
from fastgen.ops import _moments, conv2d, conv2d_plan, group_norm_affine, upsample_conv2d
from fastgen.reference import _moments as reference
from fastgen.reference import group_norm_affine as affine_reference

from ..backends import requires_cpu
from ..modules import randomize
from .conv2d_cases import direct_arguments, packed_arguments, weight_of
from .group_norm_affine_cases import parameters
from .numerics import (
    LAYOUTS,
    assert_any_threads,
    assert_bar,
    assert_fake,
    assert_registered,
    laid_out,
    poison_allocator,
    randn,
)
from .raw_calls import Recorder

# Odd, of one pixel or row, with more and fewer channels than a chunk; some are of several pieces.
SHAPES = [((2, 16, 8, 8), 32), ((3, 20, 1, 1), 17), ((2, 33, 13, 2), 40), ((1, 8, 1, 19), 3), ((2, 20, 37, 33), 24)]
PATHS = [
    *[("conv2d", outputs, dtype) for outputs in (1, 2, 4) for dtype in (torch.float32, torch.bfloat16, torch.float16)],
    *[("upsample_conv2d", outputs, dtype) for outputs in (2, 4) for dtype in (torch.float32, torch.bfloat16)],
    ("conv2d", "direct 1", torch.bfloat16), ("conv2d", "direct 3", torch.bfloat16), ("upsample_conv2d", "direct 3", torch.bfloat16),
]  # fmt: skip


def gathering(shape, k, family, path, dtype, layout="contiguous", **changes):
    """A raw op and its arguments."""
    if isinstance(path, str):
        args = list(direct_arguments(shape, k, int(path[-1]), family=family, **changes))
    else:
        args = list(packed_arguments(shape, k, path, dtype, family=family, **changes))
    args[0], args[8] = laid_out(args[0], layout), laid_out(args[8], layout)
    op = f"{family}_{'direct' if isinstance(path, str) else 'packed'}"
    return op, args


def run(op, args):
    return getattr(torch.ops.fastgen, op)(*args)


def assert_moments(actual, y, bound=3e-6):
    """Against float64: the mean in deviations, the squares relative; equal values where one is watched."""
    exact, pixels = reference.moments(y), y.shape[2] * y.shape[3]
    deviation = (exact[..., 1] / pixels).sqrt() + 1e-7 * exact[..., 0].abs()
    assert ((actual[..., 0] - exact[..., 0]).abs() <= bound * deviation).all()
    assert ((actual[..., 1] - exact[..., 1]).abs() <= bound * exact[..., 1]).all()
    assert torch.equal(actual[..., 2], exact[..., 2]) and actual[..., 2].count_nonzero() > 0


@pytest.mark.isa
@requires_cpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("family", "path", "dtype"), PATHS)
@pytest.mark.parametrize(("shape", "k"), SHAPES)
def test_values(shape, k, family, path, dtype, layout):
    op, args = gathering(shape, k, family, path, dtype, layout)
    poison_allocator(8 * args[8].numel())
    y, moments = run(f"{op}_moments", args)
    assert torch.equal(y, run(op, args)) and y.stride() == run(op, args).stride()
    assert_moments(moments, y)


@pytest.mark.isa
@requires_cpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mean", [1e2, 1e4])
@pytest.mark.parametrize("outputs", [1, 4])
def test_a_large_mean_leaves_the_deviation(outputs, mean, layout):
    op, args = gathering((2, 40, 21, 18), 40, "conv2d", outputs, torch.float32, layout, activation=0, scale=1.0)
    args[3] = torch.full((40,), mean)
    y, moments = run(f"{op}_moments", args)
    exact = reference.moments(y)
    assert ((moments[..., 1] - exact[..., 1]).abs() <= 1e-5 * exact[..., 1]).all()


@pytest.mark.isa
@requires_cpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("outputs", [1, 2, 4])
def test_huge_channels_pixels_and_steps(outputs, layout):
    """A channel of another size, a pixel far from all others in each corner of a piece, and rows that rise: no digits are lost."""
    shape, k = (2, 24, 12, 20), 24
    op, args = gathering(shape, k, "conv2d", outputs, torch.float32, layout, activation=0, scale=1.0)
    residual = torch.zeros(2, k, 12, 20)
    residual[:, 3] = randn(12, 20).float() * 1e6
    residual[:, 5, 0, 0] = residual[:, 6, 11, 19] = residual[:, 7, 4, 4] = 1e4
    residual[:, 9] += 1e3 * torch.arange(12.0)[:, None]
    residual[:, 11] = torch.where(torch.arange(12)[:, None] < 4, 1e4, -1e4)
    args[8] = laid_out(residual, layout)
    y, moments = run(f"{op}_moments", args)
    assert_moments(moments, y, 1e-5)


@pytest.mark.isa
@requires_cpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("family", "path", "dtype"), PATHS)
def test_bits_do_not_depend_on_threads_or_time(family, path, dtype, layout):
    op, args = gathering((2, 80, 37, 29), 72, family, path, dtype, layout)
    assert_any_threads(lambda: run(f"{op}_moments", args)[1])


@pytest.mark.isa
@requires_cpu
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("path", [1, 4, "direct 3"])
def test_nan_and_infinity_are_nan(path, layout, value):
    dtype = torch.bfloat16 if isinstance(path, str) else torch.float32
    op, args = gathering((2, 20, 9, 10), 24, "conv2d", path, dtype, layout, activation=0, scale=1.0)
    args[8][1, 3, 4, 4] = value
    y, moments = run(f"{op}_moments", args)
    assert moments[1, 3, 1].isnan() and not moments[1, 3, 0].isfinite()
    assert moments[0, :, :2].isfinite().all() and moments[1, 4:, :2].isfinite().all()
    known = run("group_norm_affine_known", (y, None, moments, None, 6, *[None] * 5, 1e-5))
    read = run("group_norm_affine", (y, None, 6, *[None] * 5, 1e-5))
    assert all(torch.equal(a.isnan(), b.isnan()) for a, b in zip(known, read, strict=True)) and known[0].isnan().any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fakes(layout):
    for path, dtype in ((4, torch.float32), ("direct 3", torch.bfloat16)):
        for family in ("conv2d", "upsample_conv2d"):
            op, args = gathering((2, 16, 8, 8), 20, family, path, dtype, layout)
            assert_registered(getattr(torch.ops.fastgen, f"{op}_moments").default, tuple(args))
    x = laid_out(randn(2, 6, 5, 7, dtype=torch.float32), layout)
    args = (x, None, reference.moments(x), None, 3, *parameters(x.shape, torch.float32).values(), 1e-5)
    assert_registered(torch.ops.fastgen.group_norm_affine_known.default, args)
    none = torch.zeros(0, 6, 5, 7)
    assert_fake(
        torch.ops.fastgen.group_norm_affine_known.default,
        (none, None, reference.moments(none), *args[3:5], *[None] * 5, 1e-5),
    )


@pytest.mark.isa
@pytest.mark.parametrize("seam", [None, 8])
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_norm_of_moments_is_that_of_the_image(dtype, full, seam):
    x = randn(3, 24, 9, 7, dtype=dtype) * 3 + 2
    given = list(parameters(x.shape, dtype).values()) if full else [None] * 5
    parts = (x, None) if seam is None else (x[:, :seam].clone(), x[:, seam:].clone())
    known = [None if part is None else reference.moments(part) for part in parts]
    actual = torch.ops.fastgen.group_norm_affine_known(*parts, *known, 6, *given, 1e-5)
    wide = [None if t is None else t.double() for t in given]
    exact = affine_reference.group_norm_affine(x.double(), None, 6, *wide, 1e-5)
    beside = affine_reference.group_norm_affine(x, None, 6, *given, 1e-5)
    for a, b, e in zip(actual, beside, exact, strict=True):
        assert a.dtype == torch.float32
        assert_bar(a, b, e, 3e-7)


@pytest.fixture
def every_size(monkeypatch):
    """Moments are gathered of small images too."""
    monkeypatch.setattr(_moments, "LEAST_BYTES", {"packed": 0, "direct": 0})


def made(mode=torch.no_grad, family=conv2d):
    """An output whose moments are known, and the mode it was made in."""
    with torch.inference_mode(False):  # of another weight nothing is kept
        weight = weight_of((2, 64), 64, 3, torch.float32)
    with mode():
        x = randn(2, 64, 16, 16, dtype=torch.float32)
        return family(x, weight, gather_moments=True, **({"padding": 1} if family is conv2d else {}))


def swapped(y):
    y.data = torch.zeros_like(y)


def behind(y):
    y.data.mul_(3)


def by_numpy(y):
    y.numpy()[...] *= 2


CHANGES = {
    "in place": lambda y: y.add_(1),
    "through a view": lambda y: y.view(-1).mul_(2),
    "through a detached one": lambda y: y.detach().mul_(2),
    "a slice": lambda y: y[:, 1:3].zero_(),
    "an element": lambda y: y.__setitem__((0, 1, 3, 3), 7e3),
    "a copy": lambda y: y.copy_(torch.ones_like(y)),
    "an output": lambda y: torch.mul(y, 2, out=y),
    "an activation": lambda y: torch.nn.functional.silu(y, inplace=True),
    "another shape": lambda y: y.resize_(2, 64, 8, 16),
    "other memory": swapped,
    "several": lambda y: torch._foreach_mul_([y], 2.0),
    "behind the counter": behind,
    "by numpy": by_numpy,
}


@requires_cpu
@pytest.mark.usefixtures("every_size")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("how", CHANGES)
def test_what_has_changed_is_read(how, mode):
    with mode():
        y = made(mode)
        assert _moments.recall(y) is not None
        CHANGES[how](y)
        expected = torch.ops.fastgen.group_norm_affine(y.clone(), None, 8, *[None] * 5, 1e-5)
        assert all(torch.equal(a, b) for a, b in zip(group_norm_affine(y, 8), expected, strict=True))


@requires_cpu
@pytest.mark.usefixtures("every_size")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("family", [conv2d, upsample_conv2d])
def test_what_has_not_is_not_read(family, mode):
    with mode():
        y = made(mode, family)
        _ = y.mul(2), y[:, :3], y.sum()
        known = torch.ops.fastgen.group_norm_affine_known(y, None, _moments.recall(y), None, 8, *[None] * 5, 1e-5)
        assert all(torch.equal(a, b) for a, b in zip(group_norm_affine(y, 8), known, strict=True))
        assert not torch.equal(group_norm_affine(y, 8)[1], group_norm_affine(y.clone(), 8)[1])  # its bits are others


@requires_cpu
@pytest.mark.usefixtures("every_size")
def test_moments_stay_with_their_tensor():
    y = made()
    buffer = io.BytesIO()
    torch.save(y, buffer)
    buffer.seek(0)
    others = [
        copy.deepcopy(y),
        copy.copy(y),
        pickle.loads(pickle.dumps(y)),
        torch.load(buffer),
        y.clone(),
        y[:],
        y.view_as(y),
        y.to(torch.bfloat16),
    ]
    assert all(_moments.recall(other) is None for other in others) and _moments.recall(y) is not None
    assert vars(y) == {} and torch.equal(others[3], y)
    key = id(y)
    assert key in _moments._KNOWN
    del y, others  # of which some are views of it
    assert key not in _moments._KNOWN


@requires_cpu
@pytest.mark.usefixtures("every_size")
def test_nothing_is_gathered_where_others_look():
    x, weight = randn(2, 64, 16, 16, dtype=torch.float32), weight_of((2, 64), 64, 3, torch.float32)
    assert _moments.recall(conv2d(x.clone().requires_grad_(), weight, padding=1, gather_moments=True)) is None
    with torch.no_grad():
        assert _moments.recall(conv2d(x, weight, padding=1)) is None
        assert _moments.recall(conv2d(x, weight, padding=0, gather_moments=True)) is None  # of the library
        with torch.autocast("cpu"):
            assert _moments.recall(conv2d(x, weight, padding=1, gather_moments=True)) is None
        with Recorder() as recorder:
            y = conv2d(x, weight, padding=1, gather_moments=True)
        assert _moments.recall(y) is None and [op for op, _ in recorder.calls] == ["conv2d_fwd"]
        torch._dynamo.reset()
        compiled = torch.compile(
            lambda t: conv2d(t, weight, padding=1, gather_moments=True), fullgraph=True, backend="eager"
        )
        assert _moments.recall(compiled(x)) is None


@requires_cpu
def test_small_outputs_are_read():
    """By which nothing is lost: they lie in a cache."""
    assert _moments.recall(made()) is None


@requires_cpu
@pytest.mark.usefixtures("every_size")
@pytest.mark.parametrize("scale_shift", [False, True])
def test_a_block_reads_what_lies_within_it_once(monkeypatch, scale_shift):
    """Its second norm does not read what the first convolution gives; with a hook that changes it, it does."""
    block = randomize(ResBlock(64, embedding_channels=32, use_scale_shift_norm=scale_shift)).eval()
    x, embedding = randn(2, 64, 16, 16, dtype=torch.float32), randn(2, 32, dtype=torch.float32)
    module, seen = sys.modules["fastgen.ops.group_norm_affine"], []

    def spy(name):
        function = getattr(module, name)

        def call(*args):
            seen.append(name)
            return function(*args)

        monkeypatch.setattr(module, name, call)

    with torch.no_grad():
        assert conv2d_plan(x, block.conv1.weight, padding=1).outputs > 0
        plain = block(x, embedding)
        spy("_known"), spy("_forward")
        assert torch.equal(block(x, embedding), plain) and seen == ["_forward", "_known"]
        seen.clear()
        block.conv1.register_forward_hook(lambda module, args, output: output.mul_(2))
        block(x, embedding)
        assert seen == ["_forward", "_forward"]
