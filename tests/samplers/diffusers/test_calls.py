"""The ways in which programs call a step: positions, kinds of timesteps, schedules of their own, gradients, compilation, seeds."""

import inspect
import itertools

import numpy as np
import pytest
import torch

from fastgen.samplers.diffusers import move
from fastgen.samplers.diffusers.session import MEMORY

from .cases import CLASSES, Case
from .parity import NEED_TORCHSDE, SHAPE, diffusers, error, model, ours, pair, parent, run

NAMES = sorted(ours.SCHEDULERS)


def both(name, call, *, fallbacks=None, **config):
    """``call(scheduler, x, t)`` of the stand-in and of its parent returns the same, or raises the same."""
    results = []
    for scheduler in pair(name, **config):
        scheduler.set_timesteps(6)
        x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
        torch.manual_seed(1)
        try:
            results.append(call(scheduler, x, scheduler.timesteps[2]))
        except Exception as raised:
            results.append(f"{type(raised)} {raised}")
        else:
            assert getattr(scheduler, "fallbacks", fallbacks or {}) == (fallbacks or {})
    if isinstance(results[1], str):
        assert results[0] == results[1]
    else:
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


# ---- arguments -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_signature_is_the_parent_s_and_seeds(name):
    mine, theirs = (inspect.signature(scheduler.step) for scheduler in pair(name))
    parameters = dict(mine.parameters)
    assert parameters.pop("seeds").kind is inspect.Parameter.KEYWORD_ONLY
    assert list(parameters.values()) == list(theirs.parameters.values())
    for method in ("set_timesteps", "scale_model_input", "add_noise", "__init__"):
        if hasattr(parent(name), method):
            assert inspect.signature(getattr(ours.stand_in(parent(name)), method)) == inspect.signature(
                getattr(parent(name), method)
            )


@pytest.mark.parametrize("name", CLASSES)
def test_positional_arguments(name):
    """All of them, in the parent's order, with and without a dictionary."""

    def call(scheduler, x, t):
        rest = list(inspect.signature(parent(name).step).parameters.values())[4:]
        given = {p.name: p.default for p in rest} | {
            "generator": torch.Generator().manual_seed(0),
            "return_dict": False,
        }
        return scheduler.step(model(x, float(t)), t, x, *[given[p.name] for p in rest])[0]

    both(name, call)
    both(name, lambda scheduler, x, t: scheduler.step(model_output=model(x, float(t)), timestep=t, sample=x)[0])
    both(name, lambda scheduler, x, t: scheduler.step(x, t, x, *range(12)))
    both(name, lambda scheduler, x, t: scheduler.step(x, t, x, nothing=3))


KINDS = {
    "int": int,
    "float": float,
    "NumPy": lambda t: np.int64(int(t)),
    "tensor": lambda t: t.clone(),
    "tensor of one element": lambda t: t[None],
    "float32": lambda t: t.float(),
    "off the schedule": lambda t: int(t) - 1,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name",
    ["DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler", "LCMScheduler",
     "FlowMatchEulerDiscreteScheduler"],
)  # fmt: skip
def test_kinds_of_timesteps(name, kind):
    """What the parent takes is taken, what it refuses is refused in its words."""
    fallbacks = {"a timestep for each sample": 1} if kind == "tensor of one element" else None
    both(name, lambda scheduler, x, t: scheduler.step(model(x, 0.5), KINDS[kind](t), x)[0], fallbacks=fallbacks)


SCHEDULES = [
    ("DDPMScheduler", {}, {"timesteps": [900, 500, 20]}),
    ("EulerDiscreteScheduler", {}, {"timesteps": [900, 500, 20]}),
    ("EulerDiscreteScheduler", {}, {"sigmas": [10.0, 2.0, 0.5, 0.0]}),
    ("HeunDiscreteScheduler", {}, {"timesteps": [900, 500, 20]}),
    ("DPMSolverMultistepScheduler", {}, {"timesteps": [900, 500, 20]}),
    ("LCMScheduler", {}, {"num_inference_steps": 4, "strength": 0.6}),
    ("TCDScheduler", {}, {"timesteps": [900, 500, 20]}),
    ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}, {"sigmas": [0.9, 0.5, 0.1]}),
    ("FlowMatchEulerDiscreteScheduler", {}, {"sigmas": [0.9, 0.5, 0.1]}),
    ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}, {"num_inference_steps": 5, "mu": 0.7}),
    ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}, {"num_inference_steps": 5}),
    ("DDIMScheduler", {}, {"num_inference_steps": 2000}),
    ("DPMSolverMultistepScheduler", {}, {}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "config", "schedule"), SCHEDULES)
def test_schedules_of_one_s_own(name, config, schedule):
    """Twice: worked out, and from memory. What the parent refuses is refused in its words."""
    results = []
    for scheduler in [*pair(name, **config), pair(name, **config)[0]]:
        try:
            scheduler.set_timesteps(**schedule)
        except (ValueError, TypeError) as raised:
            results.append([(type(raised), str(raised))])
            continue
        x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * getattr(scheduler, "init_noise_sigma", 1.0)
        torch.manual_seed(1)
        samples = []
        for t in scheduler.timesteps:
            inputs = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            x = scheduler.step(model(inputs, float(t)), t, x)[0]
            samples.append(x)
        results.append([scheduler.timesteps, *samples])
        assert getattr(scheduler, "fallbacks", {}) == {}
    first, expected, again = results
    if isinstance(expected[0], tuple):
        assert first == expected == again
    else:
        assert torch.equal(first[0], expected[0]) and error(first[1:], expected[1:]) <= 1e-5
        assert all(map(torch.equal, first, again))


def test_a_schedule_on_a_device_and_a_scaled_input():
    mine, theirs = pair("EulerDiscreteScheduler")
    x = torch.randn(SHAPE)
    for scheduler in (mine, theirs):
        scheduler.set_timesteps(5, device="cpu")
    torch.testing.assert_close(
        mine.scale_model_input(sample=x, timestep=mine.timesteps[0]), theirs.scale_model_input(x, theirs.timesteps[0])
    )
    assert mine.is_scale_input_called and mine.step_index == 0
    assert (
        pair("DDIMScheduler")[0].scale_model_input(x, 3) is x
        and pair("DDIMScheduler")[0].scale_model_input(sample=x) is x
    )


# ---- noise ---------------------------------------------------------------------------------------------------------------------

DRAWING = [
    "DDPMScheduler",
    "EulerAncestralDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "LCMScheduler",
    "SASolverScheduler",
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("source", ["generator", "list", "list of one", "global"])
@pytest.mark.parametrize("name", DRAWING)
def test_the_parent_s_own_noise(name, source, dtype):
    """Drawn with the same generators in the same order; and they are left in the same state."""
    results, states = [], []
    for scheduler in pair(name):
        scheduler.set_timesteps(4)
        torch.manual_seed(2)
        generators = [torch.Generator().manual_seed(k) for k in range(2)]
        given = {"generator": generators[0], "list": generators, "list of one": generators[:1], "global": None}[source]
        x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype)
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, float(t)), t, x, generator=given)[0]
        results.append(x)
        states.append([torch.get_rng_state(), *(g.get_state() for g in generators)])
        assert getattr(scheduler, "fallbacks", {}) == {}
    assert all(map(torch.equal, *states))
    few = {torch.float16: 0.03, torch.bfloat16: 0.25}.get(dtype, 1e-5)  # rounding; other noise is more than 1 off
    assert results[0].dtype == results[1].dtype and error(results[:1], results[1:]) <= few


@pytest.mark.parametrize(("name", "options"), [("DDIMScheduler", {"eta": 1.0}), ("DPMSolverMultistepScheduler", {})])
def test_noise_that_is_given(name, options):
    """As a tensor like the sample it is an operand; one for the whole batch goes to the parent, which spreads it."""
    config = {"algorithm_type": "sde-dpmsolver++"} if name.startswith("DPM") else {}

    def call(of, dtype=torch.float32):
        noise = torch.randn(of, *SHAPE[1:], generator=torch.Generator().manual_seed(1)).to(dtype)
        return lambda scheduler, x, t: scheduler.step(model(x, 1.0), t, x, variance_noise=noise, **options)[0]

    both(name, call(2), **config)
    both(name, call(2, torch.float64), **config)
    both(
        name,
        call(1),
        fallbacks={"variance_noise of another shape or device than the sample, or with gradients": 1},
        **config,
    )
    if name.startswith("DDIM"):  # both cannot be
        both(name, lambda s, x, t: s.step(x, t, x, 1.0, generator=torch.Generator(), variance_noise=x))


SEEDED = [
    *((name, {}) for name in DRAWING),
    ("DDIMScheduler", {"eta": 0.8}),
    ("TCDScheduler", {}),
    ("EDMEulerScheduler", {"s_churn": 3.0}),
    ("CMStochasticIterativeScheduler", {}),
]


@pytest.mark.parametrize(("name", "options"), SEEDED)
def test_an_image_depends_on_its_seed_alone(name, options):
    """Not on the batch, its place in it, or the number of threads; and other seeds are other images."""

    def draw(seeds, start=None):
        scheduler = pair(name)[0]
        scheduler.set_timesteps(5)
        # an image's start hangs on its seed too
        starts = [torch.randn(SHAPE[1:], generator=torch.Generator().manual_seed(start or int(s))) for s in seeds]
        x = torch.stack(starts) * float(scheduler.init_noise_sigma)
        for t in scheduler.timesteps:
            inputs = scheduler.scale_model_input(x, t)
            x = scheduler.step(inputs.clamp(-1, 1) * 0.3, t, x, seeds=seeds, **options)[0]
        assert scheduler.fallbacks == {}
        return x

    together = draw([7, 8, 9, 7])
    assert torch.equal(together[0], together[3]) and not torch.equal(together[0], together[1])
    assert torch.equal(draw(torch.tensor([9, 8])), together[[2, 1]])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads % 3 + 1)
        assert torch.equal(draw([8]), together[1:2])
    finally:
        torch.set_num_threads(threads)
    one, other = draw([3, 4], start=1)
    assert not torch.equal(one, other)


# ---- sums by torch --------------------------------------------------------------------------------------------------------------


def _trajectory(name, dtype, shape=SHAPE, **options):
    """The images of a trajectory of six steps with a generator for each sample."""
    MEMORY.clear()
    scheduler = pair(name)[0]
    scheduler.set_timesteps(6)
    if "generator" in inspect.signature(scheduler.step).parameters:
        options["generator"] = [torch.Generator().manual_seed(k) for k in range(shape[0])]
    starts = [torch.randn(shape[1:], generator=torch.Generator().manual_seed(9 + k)) for k in range(shape[0])]
    x = torch.stack(starts).to(dtype) * float(getattr(scheduler, "init_noise_sigma", 1.0))
    for t in scheduler.timesteps:
        inputs = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(inputs.clamp(-1, 1) * 0.3, t, x, return_dict=False, **options)[0]
    assert scheduler.fallbacks == {}
    return x


@pytest.mark.parametrize("name", CLASSES)
def test_sums_by_torch_are_what_the_kernel_makes(name, monkeypatch):
    """What one call of torch does is left to it: the same to rounding, in float64 and float32."""
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
        by_torch = _trajectory(name, dtype)
        with monkeypatch.context() as patched:
            patched.setattr(move.Sum, "fits", lambda *_: False)
            by_kernel = _trajectory(name, dtype)
        assert (by_torch - by_kernel).abs().max() <= bound * by_kernel.abs().max()


def test_which_sums_torch_makes(monkeypatch):
    """A sample and a multiple of the model's output, a multiple of a sample; none where it is clipped."""
    made: list[int] = []
    of = move.Sum.of
    monkeypatch.setattr(move.Sum, "of", lambda *args: made.append(1) or of(*args))
    for name, count in (("FlowMatchEulerDiscreteScheduler", 6), ("EulerDiscreteScheduler", 12), ("DDPMScheduler", 0)):
        made.clear()
        _trajectory(name, torch.float32)
        assert len(made) == count, name


@pytest.mark.parametrize("name", ["HeunDiscreteScheduler", "EulerAncestralDiscreteScheduler", "PNDMScheduler"])
def test_an_image_has_the_same_bits_in_any_batch(name):
    """Of 64 KiB a sample: four of them are past the size at which memory is recycled."""
    shape = (2, 64, 128)
    assert torch.equal(_trajectory(name, torch.float32, (4, *shape))[:1], _trajectory(name, torch.float32, (1, *shape)))


def test_seeds_where_they_cannot_be():
    x = torch.randn(SHAPE)
    repaint = pair("RePaintScheduler")[0]
    repaint.set_timesteps(10, jump_length=2, jump_n_sample=2)
    scheduler = pair("DDPMScheduler")[0]
    scheduler.set_timesteps(4)
    with pytest.raises(
        ValueError, match=r"seeds= is for fused steps, and this one is diffusers' own: .*product of two tensors"
    ):
        repaint.step(x, 0, x, x, x, seeds=[1, 2])
    with pytest.raises(ValueError, match=r"seeds must be one a sample \(2\), got 3"):
        scheduler.step(x, scheduler.timesteps[0], x, seeds=[1, 2, 3])
    with pytest.raises(ValueError, match="diffusers' own: gradients"):
        scheduler.step(x.clone().requires_grad_(), scheduler.timesteps[0], x, seeds=[1, 2])
    with pytest.raises(TypeError, match="seeds"):
        scheduler.step(x, scheduler.timesteps[0], x, seeds=[1.5, 2])


# ---- gradients, compilation, and what else goes to the parent -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"])
def test_gradients_are_the_parent_s(name):
    gradients = []
    for scheduler in pair(name):
        scheduler.set_timesteps(4)
        start = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).requires_grad_()
        x = start
        for t in scheduler.timesteps:
            x = scheduler.step(model(scheduler.scale_model_input(x, t), float(t)), t, x)[0]
        x.sum().backward()
        gradients.append(start.grad)
        assert set(getattr(scheduler, "fallbacks", {"gradients": 0})) == {"gradients"}
    assert torch.equal(*gradients)


def test_torch_compile_sees_the_parent():
    results = []
    for scheduler in pair("DDIMScheduler"):
        scheduler.set_timesteps(4)
        x, steps = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)), scheduler.timesteps.tolist()
        step = torch.compile(lambda m, t, x, s=scheduler: s.step(m, t, x, return_dict=False)[0], backend="eager")
        for t in steps:
            x = step(torch.tanh(x), t, x)
        results.append(x)
    torch.testing.assert_close(*results)


def _noise_between(sigma, sigma_next):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(int(1e3 * float(sigma + sigma_next))))


FALLBACKS = {
    "product of two tensors": ("RePaintScheduler", {}),
    "_internal_dict is a DDIMScheduler": ("UniPCMultistepScheduler", {"solver_p": "DDIMScheduler"}),
    "Tensor.__pow__": ("DDPMScheduler", {"variance_type": "learned"}),
    "a coefficient that is NaN": ("DDPMScheduler", {"variance_type": "fixed_large_log"}),
    "no combination of tensors like the sample": ("UniPCMultistepScheduler", {"solver_type": "bh1"}),
    r"a factor of shape": ("DPMSolverSDEScheduler", {}),
    r"a factor of shape (": ("CosineDPMSolverMultistepScheduler", {}),
}


@pytest.mark.parametrize("reason", FALLBACKS)
def test_what_goes_to_the_parent(reason):
    """All that does, of what the classes offer: with the parent's numbers, NaN included, and counted by its reason."""
    name, config = FALLBACKS[reason]
    config = {k: getattr(diffusers, v)() if k == "solver_p" else v for k, v in config.items()}
    mine, theirs = pair(name, **config)
    samples = []
    for scheduler in (mine, theirs):
        scheduler.set_timesteps(6, *((2, 2) if name.startswith("RePaint") else ()))
        if name in NEED_TORCHSDE:  # their own noise
            scheduler.noise_sampler = _noise_between
        x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
        more = {"original_image": x, "mask": (x > 0).float()} if name.startswith("RePaint") else {}
        channels = 2 if config.get("variance_type") == "learned" else 1
        kept = []
        torch.manual_seed(0)
        for t in scheduler.timesteps:
            x = scheduler.step(model(scheduler.scale_model_input(x, t), float(t), channels), t, x, **more)[0]
            kept.append(x)
        samples.append(kept)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-4, equal_nan=True) for a, b in zip(*samples, strict=True))
    assert [key for key in mine.fallbacks if reason in key] and len(mine.fallbacks) == 1


ODD = {
    "a sample of one dimension": lambda: (torch.ones(6), torch.ones(6)),
    "nothing in it": lambda: (torch.ones(0, 3, 2, 2), torch.ones(0, 3, 2, 2)),
    "complex numbers": lambda: (torch.ones(2, 3, dtype=torch.complex64), torch.ones(2, 3, dtype=torch.complex64)),
    "another shape": lambda: (torch.ones(1, 3, 2, 2), torch.ones(2, 3, 2, 2)),
    "a subclass of Tensor": lambda: (torch.nn.Parameter(torch.ones(2, 3), requires_grad=False), torch.ones(2, 3)),
    "integers": lambda: (torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3)),
}


@pytest.mark.parametrize("what", ODD)
def test_odd_tensors_go_to_the_parent(what):
    output, sample = ODD[what]()
    results = []
    for scheduler in pair("DDIMScheduler", clip_sample=False):
        scheduler.set_timesteps(4)
        results.append(scheduler.step(output, scheduler.timesteps[0], sample)[0])
    assert torch.equal(*results) and type(results[0]) is type(results[1])
    mine = pair("DDIMScheduler", clip_sample=False)[0]
    mine.set_timesteps(4)
    mine.step(output, mine.timesteps[0], sample)
    assert sum(mine.fallbacks.values()) == 1


LAYOUTS = {
    "channels-last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "a view": lambda x: x.repeat(1, 2, 1, 1)[:, ::2],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "expanded": lambda x: x[:1].expand(SHAPE),
    "two dimensions": lambda x: x.flatten(1),
    "a video": lambda x: x[:, :, None],
}


@pytest.mark.parametrize(("layout", "other"), [*itertools.product(LAYOUTS, (False, True))])
@pytest.mark.parametrize("name", ["DDIMScheduler", "UniPCMultistepScheduler", "EulerDiscreteScheduler"])
def test_layouts(name, layout, other):
    """Of the sample, and of the model's output with it or alone."""
    lay = LAYOUTS[layout]
    keep = lay if layout in ("two dimensions", "a video") or not other else lambda x: x

    def call(scheduler, x, t):
        x = x[:1].expand(SHAPE) if layout == "expanded" else x
        first = keep(x)
        second = scheduler.step(lay(model(x, float(t))), t, first)[0]
        t = scheduler.timesteps[3]
        return scheduler.step(lay(model(second.reshape(SHAPE), float(t))), t, second)[0]

    both(name, call)


def test_nothing_but_the_parent_s_arguments_is_taken():
    with pytest.raises(TypeError, match="missing"):
        pair("DDIMScheduler")[0].step(torch.ones(SHAPE))
    assert run(pair("DDIMScheduler")[0], Case("DDIMScheduler"), steps=2)
