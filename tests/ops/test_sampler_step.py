"""`sampler_step`: values for every argument, dtype and layout, gradients, noise from seeds, memory, errors."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from fastgen.ops import philox_normal, sampler_step
from fastgen.ops.sampler_step import COLUMNS
from fastgen.reference import sampler_step as reference
from fastgen.reference._layout import output_strides

from ..backends import requires_cpu
from .numerics import DTYPES, assert_bar, guarded, laid_out, poison_allocator, randn

LAYOUTS = ("contiguous", "channels_last", "strided")
TENSORS = ("sample", "model_output", "uncond", "noise", "variance", "mask", "known", "known_noise")
SHAPE = (2, 3, 5, 7)
STEP = 1
OPTIONS = {  # the optional arguments that make sense together
    "bare": (),
    "uncond": ("uncond",),
    "noise": ("noise",),
    "seeds": ("seeds",),
    "learned variance": ("noise", "variance"),
    "learned variance of seeds": ("seeds", "variance"),
    "inpainting": ("mask", "known"),
    "noised inpainting": ("mask", "known", "known_noise"),
    "history of 1": ("history 1",),
    "history of 2": ("history 2",),
    "history of 3": ("history 3",),
    "everything": ("uncond", "noise", "variance", "mask", "known", "known_noise", "history 3"),
    "everything of seeds": ("uncond", "seeds", "variance", "mask", "known", "known_noise", "history 2"),
}


def make_table(dtype: torch.dtype = torch.float64, history: int = 3, clip: float = 0.8, **columns: float) -> Tensor:
    """Three rows of coefficients of order one; another row than ``STEP`` gives another answer."""
    table = 0.4 + 0.5 * randn(3, len(COLUMNS) + history, seed=77).tanh()
    table[:, COLUMNS.index("clip_min")] = -clip
    table[:, COLUMNS.index("clip_max")] = clip
    table[:, COLUMNS.index("guidance_scale")] = 2.5
    for name, value in columns.items():
        table[:, COLUMNS.index(name)] = value
    return table.to(dtype)


def place(t: Tensor, layout: str) -> Tensor:
    """``t`` in a layout, in the middle of NaN; strided is every second column of a wider tensor."""
    if layout != "strided":
        return guarded(laid_out(t, layout))
    wide = torch.full((*t.shape[:-1], 2 * t.shape[-1]), float("nan"), dtype=t.dtype)
    wide[..., ::2] = t
    return wide[..., ::2]


def make(names, dtypes, layouts, shape=SHAPE) -> dict:
    """Arguments of `sampler_step` by keyword; ``dtypes`` and ``layouts`` are taken in turn, the sample first."""
    dtype, layout = itertools.cycle(dtypes), itertools.cycle(layouts)
    arguments = {}
    for i, name in enumerate(("sample", "model_output", *names)):
        if name == "seeds":
            arguments[name] = torch.tensor([2**40 + n if n % 2 else -n - 1 for n in range(shape[0])], dtype=torch.int64)
        elif name.startswith("history"):
            count = int(name.split()[1])
            arguments["history"] = [
                place(randn(*shape, seed=50 + k, dtype=next(dtype)), next(layout)) for k in range(count)
            ]
        else:
            value = randn(*shape, seed=i + 1)
            arguments[name] = place((value.sigmoid() if name == "mask" else value).to(next(dtype)), next(layout))
    return arguments


def by_reference(arguments: dict, table: Tensor, step: int, wide: bool) -> tuple[Tensor, Tensor]:
    """The reference on the same arguments, in float64 throughout where ``wide``."""

    def value(name):
        t = arguments.get(name)
        return t.double() if wide and t is not None and name != "seeds" else t

    history = [h.double() if wide else h for h in arguments.get("history", ())]
    sample, model, uncond, noise, variance, mask, known, known_noise = (value(name) for name in TENSORS)
    return reference.sampler_step_fwd(
        sample, model, table.double() if wide else table, step, uncond, history, noise, arguments.get("seeds"), variance,
        mask, known, known_noise, True,
    )  # fmt: skip


def raw(arguments: dict, table: Tensor, step: int, second: bool) -> tuple:
    sample, model, uncond, noise, variance, mask, known, known_noise = (arguments.get(name) for name in TENSORS)
    history, seeds = list(arguments.get("history", ())), arguments.get("seeds")
    return sample, model, table, step, uncond, history, noise, seeds, variance, mask, known, known_noise, second


def check(arguments: dict, table: Tensor, step: int = STEP) -> None:
    sample = arguments["sample"]
    poison_allocator(sample.numel() * sample.element_size())
    actual = sampler_step(**arguments, table=table, step=step, return_prediction=True)
    beside, exact = by_reference(arguments, table, step, False), by_reference(arguments, table, step, True)
    # nothing is more exact than float64 to compare it with; a float32 row of coefficients may be lucky in plain torch. The
    # normals drawn in the kernel are themselves only good to a few units in the last place of float32
    slack = {torch.float64: 1e-14, torch.float32: 1.2e-7}.get(sample.dtype, 2e-7)
    if "seeds" in arguments:
        slack += 1e-6
    for a, b, e in zip(actual, beside, exact, strict=True):
        assert a.dtype == sample.dtype and list(a.stride()) == output_strides(sample)
        assert_bar(a, b, e, slack)
    alone = sampler_step(**arguments, table=table, step=step)
    assert isinstance(alone, Tensor) and torch.equal(alone, actual[0])


@pytest.mark.isa
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("names", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("table_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values(dtype, table_dtype, names, layout):
    check(make(names, [dtype], [layout]), make_table(table_dtype))


@pytest.mark.isa
@pytest.mark.parametrize("shift", range(1, 4))
@pytest.mark.parametrize("names", [OPTIONS["everything"], OPTIONS["everything of seeds"], OPTIONS["learned variance"]])
@pytest.mark.parametrize("dtype", DTYPES)
def test_mixed_dtypes_and_layouts(dtype, names, shift):
    first = DTYPES.index(dtype)
    dtypes = [DTYPES[(first + shift * i) % 4] for i in range(4)]
    for layouts in (("contiguous",), ("channels_last",), LAYOUTS, LAYOUTS[::-1]):
        check(make(names, dtypes, layouts), make_table())


@pytest.mark.isa
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape", [(3,), (1, 1), (2, 17), (3, 5, 9), (2, 8, 16, 16), (2, 3, 2, 3, 4), (1, 4, 65, 33), (1, 4099)]
)
def test_shapes(shape, layout):
    for names in (OPTIONS["everything"], OPTIONS["everything of seeds"]):
        for dtype in (torch.float32, torch.bfloat16):
            check(make(names, [dtype], [layout], shape), make_table())


@pytest.mark.isa
@pytest.mark.parametrize("step", [0, 1, 2])
def test_rows_and_extra_columns(step):
    """A table wider than the history given: the columns past it are not used."""
    arguments = make(OPTIONS["history of 1"], [torch.float32], ["contiguous"])
    check(arguments, make_table(), step)
    assert torch.equal(
        sampler_step(**arguments, table=make_table(), step=step),
        sampler_step(**arguments, table=make_table()[:, : len(COLUMNS) + 1].contiguous(), step=step),
    )
    assert torch.equal(
        sampler_step(**arguments, table=make_table(), step=step),
        sampler_step(**arguments, table=make_table().T.contiguous().T, step=step),
    )


@pytest.mark.isa
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("names", [(), ("variance",), ("uncond", "variance", "mask", "known", "history 2")])
@pytest.mark.parametrize("shape", [SHAPE, (3, 6, 33, 31), (4, 13), (1, 2, 5)])
def test_seeds_are_philox_normal_bit_for_bit(shape, names, layout):
    arguments = make(names, [torch.float32], [layout], shape)
    seeds = [2**63 + 7, -3, 0, 2**33][: shape[0]]
    for step in range(3):
        noise = philox_normal(seeds, shape, step)
        drawn = sampler_step(**arguments, table=make_table(), step=step, seeds=seeds)
        given = sampler_step(**arguments, table=make_table(), step=step, noise=noise)
        assert torch.equal(drawn, given)
        assert torch.equal(drawn, sampler_step(**arguments, table=make_table(), step=step, noise=place(noise, layout)))


@pytest.mark.isa
def test_samples_do_not_depend_on_their_batch():
    shape = (4, 3, 9, 11)
    arguments = make(OPTIONS["uncond"], [torch.float32], ["contiguous"], shape)
    seeds = [11, 2**63, -5, 7]
    whole = sampler_step(**arguments, table=make_table(), step=2, seeds=seeds)
    for n in range(4):
        one = {name: t[n : n + 1] for name, t in arguments.items()}
        assert torch.equal(sampler_step(**one, table=make_table(), step=2, seeds=seeds[n : n + 1])[0], whole[n])


@pytest.mark.isa
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mask_shape", [(1, 1, 5, 7), (2, 1, 5, 7), (5, 7), (7,), (), (2, 1, 1, 1), (1, 3, 1, 1)])
def test_inpainting_broadcasts(mask_shape, layout):
    arguments = make(("noise",), [torch.float32], [layout])
    small = {
        "mask": (randn(*mask_shape, seed=9) > 0).float(),
        "known": randn(1, *SHAPE[1:], seed=10).float(),
        "known_noise": randn(1, 1, *SHAPE[2:], seed=11).float(),
    }
    full = {name: t.expand(SHAPE).contiguous() for name, t in small.items()}
    actual = sampler_step(**arguments, **small, table=make_table(), step=STEP)
    assert torch.equal(actual, sampler_step(**arguments, **full, table=make_table(), step=STEP))
    check({**arguments, **full}, make_table())


@pytest.mark.isa
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_mask_of_zero_takes_the_known_image(dtype, layout):
    arguments = make(("noise", "known"), [dtype], [layout])
    table = make_table(known=1.0)
    kept = sampler_step(**arguments, mask=torch.zeros(1, dtype=dtype), table=table, step=STEP)
    assert torch.equal(kept, arguments["known"])
    free = {name: t for name, t in arguments.items() if name != "known"}
    torch.testing.assert_close(
        sampler_step(**arguments, mask=torch.ones(1, dtype=dtype), table=table, step=STEP),
        sampler_step(**free, table=table, step=STEP),
    )


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES)
def test_second_output_and_clip(dtype):
    """The second output as the prediction itself: between the bounds, at them exactly, and untouched without bounds."""
    arguments = make((), [dtype], ["contiguous"])
    only = {"output_sample": 0.0, "output_prediction": 1.0, "output_model": 0.0}
    _, clipped = sampler_step(**arguments, table=make_table(clip=0.25, **only), step=STEP, return_prediction=True)
    _, free = sampler_step(**arguments, table=make_table(clip=math.inf, **only), step=STEP, return_prediction=True)
    assert (clipped == 0.25).any() and (clipped == -0.25).any() and (clipped.abs() < 0.25).any()
    assert free.abs().max() > 0.25 and torch.equal(clipped, free.clamp(-0.25, 0.25))
    check(arguments, make_table(clip=0.25, **only))
    check(arguments, make_table(clip=math.inf))


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["sample", "model_output"])
def test_nan_passes_the_clip(name, dtype):
    """A clip that swallowed NaN would hide a broken model. Every position of a vector and of its tail."""
    only = {"output_sample": 0.0, "output_prediction": 1.0, "output_model": 0.0, "sample": 0.0, "model": 0.0}
    arguments = make((), [dtype], ["contiguous"], (1, 1, 1, 67))
    for i in range(67):
        value = arguments[name].clone()
        value[0, 0, 0, i] = math.nan
        outputs = sampler_step(
            **{**arguments, name: value}, table=make_table(**only), step=STEP, return_prediction=True
        )
        for output in outputs:
            assert output[0, 0, 0].isnan().nonzero().tolist() == [[i]]


@pytest.mark.isa
@pytest.mark.parametrize("value", [math.inf, -math.inf])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_infinity_is_clipped(dtype, layout, value):
    """A coefficient of zero takes nothing: the infinity that the clip tames does not come back as 0 * Inf."""
    arguments = make((), [dtype], [layout])
    arguments["model_output"] = place(torch.full(SHAPE, value, dtype=dtype), layout)
    only = {"output_sample": 0.0, "output_prediction": 1.0, "output_model": 0.0, "sample": 0.0, "model": 0.0}
    table = make_table(prediction_model=0.5, clip=0.75, **only)
    x, second = sampler_step(**arguments, table=table, step=STEP, return_prediction=True)
    assert torch.equal(second, torch.full(SHAPE, math.copysign(0.75, value), dtype=dtype)) and x.isfinite().all()
    for a, b in zip((x, second), by_reference(arguments, table, STEP, False), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.isa
def test_infinity_that_a_coefficient_takes_stays():
    arguments = make((), [torch.float32], ["contiguous"])
    arguments["model_output"] = torch.full(SHAPE, -math.inf)
    table = make_table(model=0.5, output_model=0.5)
    for output in sampler_step(**arguments, table=table, step=STEP, return_prediction=True):
        assert torch.equal(output, arguments["model_output"])


def test_noise_is_not_used_unless_given():
    arguments = make((), [torch.float32], ["contiguous"])
    loud, quiet = (sampler_step(**arguments, table=make_table(noise=s), step=STEP) for s in (1e6, 0.0))
    assert torch.equal(loud, quiet)


def test_arguments_are_left_alone():
    arguments = make(OPTIONS["everything"], [torch.float32], LAYOUTS)
    before = {k: [h.clone() for h in v] if k == "history" else v.clone() for k, v in arguments.items()}
    sampler_step(**arguments, table=make_table(), step=STEP, return_prediction=True)
    for name, t in arguments.items():
        pairs = zip(t, before[name], strict=True) if name == "history" else [(t, before[name])]
        assert all(torch.equal(a, b) for a, b in pairs), name


GRADIENTS = (*TENSORS, "history 0", "history 1")


def as_function(chosen: list[str], names, layout: str, second: bool = True):
    """`sampler_step` in float64 as a function of some of its tensors, and their values."""
    shape = (2, 3, 2, 2)
    arguments = make(names, [torch.float64], [layout], shape)
    flat = {name: t for name, t in arguments.items() if name not in ("history", "seeds")}
    flat |= {f"history {k}": h for k, h in enumerate(arguments.get("history", ()))}

    def function(*values):
        every = {**flat, **dict(zip(chosen, values, strict=True))}
        history = [every.pop(name) for name in sorted(every) if name.startswith("history")]
        return sampler_step(
            **every,
            history=history,
            seeds=arguments.get("seeds"),
            table=make_table(),
            step=STEP,
            return_prediction=second,
        )

    # dense copies: gradcheck perturbs its inputs in place
    return function, tuple(flat[name].clone().requires_grad_() for name in chosen)


FULL = ("uncond", "noise", "variance", "mask", "known", "known_noise", "history 2")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", GRADIENTS)
def test_gradcheck_one_at_a_time(name, layout):
    function, values = as_function([name], FULL, layout)
    assert torch.autograd.gradcheck(function, values)
    assert torch.autograd.gradgradcheck(function, values)


@pytest.mark.parametrize("second", [True, False])
def test_gradcheck_all_at_once(second):
    function, values = as_function(list(GRADIENTS), FULL, "contiguous", second)
    assert torch.autograd.gradcheck(function, values)
    assert torch.autograd.gradgradcheck(function, values)


def test_gradcheck_of_seeds():
    names = ["sample", "model_output", "variance"]
    function, values = as_function(names, ("seeds", "variance"), "contiguous")
    assert torch.autograd.gradcheck(function, values)
    assert torch.autograd.gradgradcheck(function, values)


def test_gradient_of_a_broadcast_mask():
    arguments = make(("known",), [torch.float64], ["contiguous"], (2, 3, 2, 2))
    mask = randn(1, 1, 2, 2, seed=5).sigmoid().requires_grad_()
    function = lambda m: sampler_step(**arguments, mask=m, table=make_table(), step=STEP)  # noqa: E731
    assert torch.autograd.gradcheck(function, (mask,))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_have_the_dtype_of_their_tensor(dtype):
    arguments = make(FULL[:-1], [dtype, torch.float32], ["contiguous"])
    leaves = {name: t.clone().requires_grad_() for name, t in arguments.items()}
    sampler_step(**leaves, table=make_table(), step=STEP).double().square().sum().backward()
    exact = {name: t.double().requires_grad_() for name, t in arguments.items()}
    by_reference(exact, make_table(), STEP, False)[0].square().sum().backward()
    tolerance = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 5e-3}[dtype]
    for name, leaf in leaves.items():
        assert leaf.grad.dtype == leaf.dtype, name
        largest = exact[name].grad.abs().max()
        assert (leaf.grad.double() - exact[name].grad).abs().max() <= tolerance * largest, name


def test_no_gradient_is_made_where_none_is_asked():
    arguments = make((), [torch.float32], ["contiguous"])
    arguments["sample"].requires_grad_()
    assert sampler_step(**arguments, table=make_table(), step=STEP).requires_grad
    with torch.no_grad():
        assert not sampler_step(**arguments, table=make_table(), step=STEP).requires_grad


@pytest.mark.parametrize("names", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shape", [(0,), (0, 3, 4, 4), (2, 3, 0, 4), (2, 0)])
def test_nothing(shape, names):
    arguments = make(names, [torch.float32], ["contiguous"], shape)
    x, second = sampler_step(**arguments, table=make_table(), step=STEP, return_prediction=True)
    assert x.shape == second.shape == shape
    leaf = arguments["sample"].clone().requires_grad_()
    sampler_step(**{**arguments, "sample": leaf}, table=make_table(), step=STEP).sum().backward()
    assert leaf.grad.shape == shape


@pytest.mark.isa
@requires_cpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 4, 100, 101), (1, 3, 300, 301)])
@pytest.mark.parametrize("names", [OPTIONS["everything"], OPTIONS["everything of seeds"]], ids=["noise", "seeds"])
def test_bits_do_not_depend_on_threads(names, shape, layout):
    arguments, before, results = make(names, [torch.float32], [layout], shape), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            results.append(sampler_step(**arguments, table=make_table(), step=STEP, return_prediction=True))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("second", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("names", OPTIONS.values(), ids=OPTIONS)
def test_opcheck(names, layout, second):
    op = torch.ops.fastgen.sampler_step_fwd
    arguments = raw(make(names, [torch.float32, torch.bfloat16], [layout]), make_table(), STEP, second)
    torch.library.opcheck(op.default, arguments)
    # opcheck does not always compare strides: the fake's own rule against the kernel's
    real = op(*arguments)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        faked = torch.utils._pytree.tree_map_only(Tensor, mode.from_tensor, arguments)
        fake = op(*faked)
    for r, f in zip(real, fake, strict=True):
        assert (r.shape, r.stride(), r.dtype) == (f.shape, f.stride(), f.dtype)


X = (2, 3)


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (TypeError, "sample must be a floating-point tensor, got torch.int64", {"sample": torch.zeros(X).long()}),
        (TypeError, "sample must be a floating-point tensor, got list", {"sample": [1.0]}),
        (ValueError, r"sample must be \[N, \*\], got a scalar", {"sample": torch.tensor(1.0)}),
        (
            ValueError,
            "sample must be float64, float32, bfloat16 or float16, got torch.float8_e4m3fn",
            {"sample": torch.zeros(X).to(torch.float8_e4m3fn)},
        ),
        (TypeError, "table must be a float32 or float64 tensor, got torch.float16", {"table": make_table().half()}),
        (TypeError, "table must be a float32 or float64 tensor, got list", {"table": [[1.0]]}),
        (ValueError, r"table must be \[steps, >= 16 \+ 0 of the history\]", {"table": make_table()[:, :15]}),
        (ValueError, "table must be .* 16 \\+ 0", {"table": make_table()[0]}),
        (ValueError, r"table must be \[steps, >= 16 \+ 4", {"history": [torch.zeros(X)] * 4}),
        (ValueError, "table must be on the device of sample", {"table": make_table().to("meta")}),
        (IndexError, r"step must be in \[0, 3\), got 3", {"step": 3}),
        (IndexError, r"step must be in \[0, 3\), got -1", {"step": -1}),
        (TypeError, "model_output must be a floating-point tensor, got NoneType", {"model_output": None}),
        (
            ValueError,
            r"model_output must have the shape of sample \(2, 3\), got shape \(2, 4\)",
            {"model_output": torch.zeros(2, 4)},
        ),
        (ValueError, "model_output must be on the device", {"model_output": torch.zeros(X, device="meta")}),
        (ValueError, "uncond must have the shape of sample", {"uncond": torch.zeros(1, 3)}),
        (TypeError, "uncond must be a floating-point tensor, got torch.bool", {"uncond": torch.zeros(X).bool()}),
        (
            ValueError,
            r"history\[1\] must have the shape of sample",
            {"history": [torch.zeros(X), torch.zeros(3)]},
        ),
        (ValueError, "noise must have the shape of sample", {"noise": torch.zeros(3)}),
        (ValueError, "give noise or seeds, not both", {"noise": torch.zeros(X), "seeds": [1, 2]}),
        (ValueError, r"seeds must be one per sample, got 3 for shape \(2, 3\)", {"seeds": [1, 2, 3]}),
        (TypeError, "seeds must be integers of at most 64 bits", {"seeds": [1, 2.5]}),
        (TypeError, "seeds must be an int64 tensor", {"seeds": torch.zeros(2)}),
        (ValueError, "seeds must be one-dimensional", {"seeds": torch.zeros(2, 1).long()}),
        (ValueError, "seeds must be on the device of sample", {"seeds": torch.zeros(2, device="meta").long()}),
        (ValueError, "variance scales the noise: give noise or seeds", {"variance": torch.zeros(X)}),
        (ValueError, "variance must have the shape", {"variance": torch.zeros(3), "noise": torch.zeros(X)}),
        (ValueError, "mask and known come together", {"mask": torch.ones(X)}),
        (ValueError, "mask and known come together", {"known": torch.ones(X)}),
        (ValueError, "known_noise comes with mask and known", {"known_noise": torch.ones(X)}),
        (
            ValueError,
            r"mask must broadcast to shape \(2, 3\) of sample, got shape \(2, 2\)",
            {"mask": torch.ones(2, 2), "known": torch.ones(X)},
        ),
        (ValueError, "known must broadcast", {"mask": torch.ones(X), "known": torch.ones(1, 2, 3)}),
        (
            ValueError,
            "known_noise must broadcast",
            {"mask": torch.ones(X), "known": torch.ones(X), "known_noise": torch.ones(5)},
        ),
        (
            TypeError,
            "mask must be a floating-point tensor, got torch.bool",
            {"mask": torch.ones(X).bool(), "known": torch.ones(X)},
        ),
        (TypeError, "mask must be a floating-point tensor, got float", {"mask": 1.0, "known": torch.ones(X)}),
    ],
)
def test_errors(error, message, changes):
    arguments = {"sample": torch.zeros(X), "model_output": torch.zeros(X), "table": make_table(), "step": 0}
    with pytest.raises(error, match=f"sampler_step: {message}"):
        sampler_step(**{**arguments, **changes})
