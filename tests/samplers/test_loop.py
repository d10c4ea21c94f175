"""The loop: seeds, generators, guidance, inpainting and what it refuses."""

import pytest
import torch

from fastgen.ops import philox_normal
from fastgen.ops.philox_normal import INITIAL_NOISE_STEP, KNOWN_NOISE_STEP
from fastgen.samplers import DDIM, DDPM, ClassifierFreeGuidance, Solver, coefficient_table, sample, timestep_spacing

SHAPE = (3, 2, 4, 4)


def model(x, t, y=None):
    """Any function of the sample and the timestep, row by row, with a class that matters."""
    shift = 0.0 if y is None else (y.to(x.dtype) * 0.1).reshape(-1, 1, 1, 1)
    return torch.tanh(x) * (1 + t.to(x.dtype).reshape(-1, 1, 1, 1) / 1000) + shift


def draw(solver=None, shape=SHAPE, **kwargs):
    return sample(model, shape, solver or DDPM(), steps=6, progress=False, **kwargs)


@pytest.mark.parametrize("solver", [DDPM(), DDIM(), DDIM(eta=1.0)])
def test_an_image_depends_on_its_seed_alone(solver):
    seeds = [7, 8, 2**63 + 1]
    together = draw(solver, seeds=seeds)
    for k, seed in enumerate(seeds):
        assert torch.equal(draw(solver, (1, *SHAPE[1:]), seeds=[seed])[0], together[k])
    assert torch.equal(draw(solver, seeds=seeds[::-1]), together.flip(0))
    assert not torch.equal(together[0], together[1])


def test_seeds_are_philox_normals():
    """The fused noise equals the noise given from outside, drawn by the public generator."""
    seeds = torch.tensor([1, 2, 3])
    plan = DDPM().plan(6).to("cpu")
    x = philox_normal(seeds, SHAPE, INITIAL_NOISE_STEP)
    for i, t in enumerate(plan.timesteps):
        output = model(x, torch.full((3,), t))
        x = plan.step(output, i, x, noise=philox_normal(seeds, SHAPE, i) if plan.draws_noise[i] else None)
    torch.testing.assert_close(draw(seeds=seeds), x, rtol=1e-6, atol=1e-6)


def test_generators_one_and_one_a_sample():
    a = draw(generator=torch.Generator().manual_seed(3))
    assert torch.equal(a, draw(generator=torch.Generator().manual_seed(3)))
    each = draw(generator=[torch.Generator().manual_seed(k) for k in range(3)])
    alone = draw(shape=(1, *SHAPE[1:]), generator=torch.Generator().manual_seed(1))
    assert torch.equal(each[1:2], alone)


def test_guidance_is_the_formula():
    classes = torch.tensor([1, 2, 3])
    null = {"y": torch.tensor([0, 0, 0])}
    guided = draw(seeds=[1, 2, 3], classes=classes, uncond_kwargs=null, guidance_scale=2.5)

    def by_hand(x, t):
        cond, uncond = model(x, t, classes), model(x, t, null["y"])
        return uncond + 2.5 * (cond - uncond)

    expected = sample(by_hand, SHAPE, DDPM(), steps=6, seeds=[1, 2, 3], progress=False)
    torch.testing.assert_close(guided, expected, rtol=1e-5, atol=1e-5)
    assert (guided - draw(seeds=[1, 2, 3], classes=classes)).abs().max() > 1e-3


def test_guidance_with_learned_variance_takes_the_conditional_variance():
    """The mean is guided, the variance is the conditional output's: that of a model which guides its own mean."""

    def variance(x, y):
        return torch.tanh(x) * (y.to(x.dtype) * 0.3).reshape(-1, 1, 1, 1)

    def learned(x, t, y):
        return torch.cat([model(x, t, y), variance(x, y)], dim=1)

    def by_hand(x, t, y, of_variance):
        mean, null = model(x, t, y), model(x, t, torch.zeros(3).long())
        return torch.cat([null + 3 * (mean - null), variance(x, of_variance)], dim=1)

    classes, null = torch.tensor([1, 2, 3]), torch.zeros(3).long()
    kwargs = {"steps": 4, "seeds": [1, 2, 3], "progress": False}
    solver = DDPM(variance_type="learned_range")
    found = sample(learned, SHAPE, solver, classes=classes, uncond_kwargs={"y": null}, guidance_scale=3.0, **kwargs)
    of_classes, of_null = (
        sample(lambda x, t, v=v: by_hand(x, t, classes, v), SHAPE, solver, **kwargs) for v in (classes, null)
    )
    torch.testing.assert_close(found, of_classes, rtol=1e-5, atol=1e-5)
    assert (found - of_null).abs().max() > 1e-2


def test_inpainting_ends_in_the_known_image():
    known = torch.linspace(-1, 1, 16).reshape(1, 1, 4, 4)
    mask = (torch.arange(16).reshape(1, 1, 4, 4) % 2).float()
    seen = []
    out = draw(DDIM(), seeds=[1, 2, 3], known=known, mask=mask, callback=lambda i, t, x: seen.append((i, t, x.clone())))
    keep = (mask == 0).expand(SHAPE)
    torch.testing.assert_close(out[keep], known.expand(SHAPE)[keep], rtol=1e-5, atol=1e-6)
    free = draw(DDIM(), seeds=[1, 2, 3])
    assert (out - free).abs()[~keep].max() < 10 and not torch.equal(out, free)
    # half way, the known part carries the noise of its level
    _, t, x = seen[2]
    a = torch.cumprod(1 - DDIM().betas, 0)[t - 1000 // 6].float()
    expected = a.sqrt() * known + (1 - a).sqrt() * philox_normal([1, 2, 3], SHAPE, KNOWN_NOISE_STEP)
    torch.testing.assert_close(x[keep], expected[keep], rtol=1e-5, atol=1e-5)
    assert [i for i, _, _ in seen] == list(range(6))


def test_start_can_be_given():
    start = torch.randn(SHAPE)
    assert torch.equal(draw(DDIM(), noise=start), draw(DDIM(), noise=start))
    assert not torch.equal(draw(DDIM(), noise=start), draw(DDIM(), noise=2 * start))


def test_one_kernel_a_step():
    """Between two calls of the model there is one kernel, into memory that is asked for and not filled."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Record(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names: list[str] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    output = torch.randn(3, 2, 64, 64)
    plan, seeds, x = DDPM().plan(5).to("cpu"), torch.tensor([1, 2, 3]), torch.randn(3, 2, 64, 64)
    with torch.no_grad(), Record() as record:
        for i in range(5):
            x = plan.step(output, i, x, seeds=seeds)
    assert record.names == ["aten.empty_like.default", "fastgen.sampler_step_out.default"] * 5


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"seeds": [1, 2]}, "seeds must be one a sample"),
        ({"seeds": [1, 2, 3], "generator": torch.Generator()}, "seeds or generator, not both"),
        ({"generator": [torch.Generator()] * 2}, "generator must be one, or one a sample"),
        ({"classes": [1, 2]}, "classes must be"),
        ({"classes": [1, 2, 3], "guidance_scale": 2.0}, "null_label"),
        ({"guidance_scale": 2.0}, "needs a condition"),
        ({"noise": torch.zeros(1)}, "noise must have the shape"),
        ({"known": torch.zeros(SHAPE)}, "known and mask come together"),
        ({"known": torch.zeros(5, 5), "mask": torch.zeros(SHAPE)}, "known must broadcast"),
    ],
)
def test_bad_input(kwargs, message):
    with pytest.raises(ValueError, match=message):
        draw(**kwargs)


def test_bad_solvers():
    for arguments, message in [
        ({"prediction_type": "noise"}, "prediction_type"),
        ({"betas": torch.tensor([2.0])}, "betas"),
        ({"clip_sample_range": 0.0}, "clip_sample_range"),
    ]:
        with pytest.raises(ValueError, match=message):
            DDIM(**arguments)
    with pytest.raises(ValueError, match="variance_type"):
        DDPM(variance_type="small")
    with pytest.raises(ValueError, match="eta"):
        DDIM(eta=2.0)
    with pytest.raises(ValueError, match="steps must be"):
        DDIM().plan(1001)
    with pytest.raises(ValueError, match="steps_offset"):
        DDIM(steps_offset=500).plan(10)
    with pytest.raises(TypeError):
        Solver()
    with pytest.raises(ValueError, match="spacing"):
        timestep_spacing(1000, 10, "log")
    plan = DDPM().plan(3)
    with pytest.raises(IndexError, match="step must be"):
        plan.step(torch.zeros(SHAPE), 3, torch.zeros(SHAPE))
    with pytest.raises(ValueError, match="draws noise"):
        plan.step(torch.zeros(SHAPE), 0, torch.zeros(SHAPE))
    with pytest.raises(ValueError, match="learned variance"):
        DDPM(variance_type="learned").plan(3).step(torch.zeros(SHAPE), 0, torch.zeros(SHAPE), noise=torch.zeros(SHAPE))


def test_tables_are_checked():
    with pytest.raises(ValueError, match="unknown columns"):
        coefficient_table([{"samples": 1.0}])
    with pytest.raises(ValueError, match="empty"):
        coefficient_table([])
    with pytest.raises(ValueError, match="NaN"):
        coefficient_table([{"sample": float("nan")}])
    with pytest.raises(ValueError, match="one entry a row"):
        coefficient_table([{}], history=[[1.0], [2.0]])
    assert coefficient_table([{}, {}], history=[[1.0, 2.0], [3.0, 4.0]]).shape == (2, 21)


def test_guidance_wrapper_refuses_unequal_conditions():
    with pytest.raises(ValueError, match="same names"):
        ClassifierFreeGuidance(model, {"y": 1}, {})
    with pytest.raises(ValueError, match="one shape"):
        ClassifierFreeGuidance(model, {"y": torch.zeros(3)}, {"y": torch.zeros(2)})
    with pytest.raises(ValueError, match="equal in both"):
        ClassifierFreeGuidance(model, {"y": 1}, {"y": 2})


@pytest.mark.parametrize("keeps", ["nothing", "its input", "a view of it"])
def test_a_step_writes_over_its_sample_only_where_nobody_holds_it(keeps):
    kept, copies, places = [], [], []

    def recording(x, t):
        places.append(x.data_ptr())
        if keeps != "nothing":
            kept.append(x if keeps == "its input" else x[:, 1:])
            copies.append(kept[-1].clone())
        return 0.1 * x

    start = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    before = start.clone()
    sample(recording, SHAPE, DDPM(), steps=6, noise=start, seeds=[1, 2, 3], progress=False)
    assert torch.equal(start, before)
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))
    assert len(set(places)) == (2 if keeps == "nothing" else 6)


def test_a_callback_may_keep_what_it_is_given():
    kept, copies = [], []

    def callback(i, t, x):
        kept.append(x)
        copies.append(x.clone())

    sample(model, SHAPE, DDPM(), steps=5, seeds=[1, 2, 3], callback=callback, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))
