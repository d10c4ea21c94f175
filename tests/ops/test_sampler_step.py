"""`sampler_step`: values for every argument, dtype and layout, noise from seeds, memory, outputs that are given."""

import math

import pytest
import torch

from fastgen.ops import COLUMNS, philox_normal, sampler_step

from ..backends import requires_cpu
from .numerics import DTYPES, PLACES, assert_any_threads, assert_fake, assert_registered, place, randn
from .sampler_step_cases import OPTIONS, SHAPE, STEP, by_reference, check, make, make_table, raw


@pytest.mark.isa
@pytest.mark.parametrize("layout", PLACES)
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
    for layouts in (("contiguous",), ("channels_last",), PLACES, PLACES[::-1]):
        check(make(names, dtypes, layouts), make_table())


@pytest.mark.isa
@pytest.mark.parametrize("layout", PLACES)
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
@pytest.mark.parametrize("layout", PLACES)
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
@pytest.mark.parametrize("layout", PLACES)
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
@pytest.mark.parametrize("layout", PLACES)
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
@pytest.mark.parametrize("layout", PLACES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_infinity_is_clipped(dtype, layout, value):
    """A coefficient of zero takes nothing: the infinity that the clip tames does not come back as 0 * Inf."""
    arguments = make((), [dtype], [layout])
    arguments["model_output"] = place(torch.full(SHAPE, value, dtype=dtype), layout)
    only = {"output_sample": 0.0, "output_prediction": 1.0, "output_model": 0.0, "sample": 0.0, "model": 0.0}
    table = make_table(prediction_model=0.5, clip=0.75, **only)
    x, second = sampler_step(**arguments, table=table, step=STEP, return_prediction=True)
    assert torch.equal(second, torch.full(SHAPE, math.copysign(0.75, value), dtype=dtype)) and x.isfinite().all()
    for a, b in zip((x, second), by_reference(arguments, table, STEP, False)[:2], strict=True):
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
    arguments = make(OPTIONS["everything"], [torch.float32], PLACES)
    before = {k: [h.clone() for h in v] if k == "history" else v.clone() for k, v in arguments.items()}
    sampler_step(**arguments, table=make_table(), step=STEP, return_prediction=True)
    for name, t in arguments.items():
        pairs = zip(t, before[name], strict=True) if name == "history" else [(t, before[name])]
        assert all(torch.equal(a, b) for a, b in pairs), name


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
@pytest.mark.parametrize("layout", PLACES)
@pytest.mark.parametrize("shape", [(3, 4, 100, 101), (1, 3, 300, 301)])
@pytest.mark.parametrize("names", [OPTIONS["everything"], OPTIONS["everything of seeds"]], ids=["noise", "seeds"])
def test_bits_do_not_depend_on_threads(names, shape, layout):
    arguments = make(names, [torch.float32], [layout], shape)
    assert_any_threads(lambda: sampler_step(**arguments, table=make_table(), step=STEP, return_prediction=True))


OP = torch.ops.fastgen.sampler_step_fwd.default  # the form with out writes what this one returns


@pytest.mark.parametrize("second", [True, False])
@pytest.mark.parametrize("layout", PLACES)
@pytest.mark.parametrize("names", OPTIONS.values(), ids=OPTIONS)
def test_fake(names, layout, second):
    arguments = make(names, [torch.float32, torch.bfloat16], [layout])
    assert_fake(OP, raw(arguments, make_table(), STEP, (second, not second)))


@pytest.mark.parametrize(
    ("names", "layout"),
    [
        *((OPTIONS["everything of seeds"], layout) for layout in PLACES),
        (OPTIONS["everything"], "strided"),
        ((), "contiguous"),
    ],
)
def test_opcheck(names, layout):
    assert_registered(
        OP, raw(make(names, [torch.float32, torch.bfloat16], [layout]), make_table(), STEP, (True, False))
    )


@pytest.mark.isa
@pytest.mark.parametrize("layout", PLACES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("names", [OPTIONS["everything"], OPTIONS["everything of seeds"], ()])
def test_out_holds_what_would_be_returned(names, dtype, layout):
    arguments = make(names, [dtype], [layout])
    wanted = {"return_prediction": True, "return_corrected": True}
    expected = sampler_step(**arguments, table=make_table(), step=STEP, **wanted)
    for kind in PLACES:  # of the memory that is written, in the middle of NaN
        out = [place(torch.full(SHAPE, torch.nan, dtype=dtype), kind) for _ in range(3)]
        returned = sampler_step(**arguments, table=make_table(), step=STEP, **wanted, out=out)
        assert all(r is o for r, o in zip(returned, out, strict=True))
        assert all(torch.equal(o, e) for o, e in zip(out, expected, strict=True))


@pytest.mark.isa
@pytest.mark.parametrize("layout", PLACES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_out_may_be_the_sample(dtype, layout):
    arguments = make(OPTIONS["everything of seeds"], [dtype], [layout])
    expected = sampler_step(**arguments, table=make_table(), step=STEP)
    assert sampler_step(**arguments, table=make_table(), step=STEP, out=arguments["sample"]) is arguments["sample"]
    assert torch.equal(arguments["sample"], expected)


def test_out_is_copied_under_the_compiler():
    arguments = make(OPTIONS["history of 2"], [torch.float32], ["contiguous"])
    out, table = [torch.zeros(SHAPE) for _ in range(2)], make_table()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def function(arguments, out):
        sampler_step(**arguments, table=table, step=STEP, return_corrected=True, out=out)

    function(arguments, out)
    expected = sampler_step(**arguments, table=table, step=STEP, return_corrected=True)
    assert all(torch.equal(o, e) for o, e in zip(out, expected, strict=True))


@pytest.mark.isa
def test_threshold_divides_each_sample_before_the_clip():
    arguments = make((), [torch.float32], ["contiguous"])
    only = {"output_sample": 0.0, "output_prediction": 1.0, "output_model": 0.0}
    free = sampler_step(**arguments, table=make_table(clip=math.inf, **only), step=STEP, return_prediction=True)[1]
    threshold = torch.tensor([0.5, 2.0])
    _, scaled = sampler_step(
        **arguments, table=make_table(clip=1.0, **only), step=STEP, return_prediction=True, threshold=threshold
    )
    torch.testing.assert_close(scaled, (free / threshold.reshape(2, 1, 1, 1)).clamp(-1, 1))
