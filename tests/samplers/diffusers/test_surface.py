"""What pipelines and users do with a scheduler beside stepping: configure, save, swap, ask, and err."""

import copy
import importlib
import inspect
import json
import pickle
import subprocess
import sys
import types

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastgen.samplers import diffusers as ours
from fastgen.samplers import from_diffusers

from ...backends import import_peer
from .parity import SHAPE, pair, run

NAMES = [name for name in ours.__all__ if name.endswith("Scheduler") and name != "Scheduler"]
diffusers = import_peer("diffusers")


def peer(name):
    """The diffusers class; two of them are hidden where torchsde is not installed, which only their own noise needs."""
    found = getattr(diffusers, name)
    if "dummy" not in found.__module__:
        return found
    module = {
        "DPMSolverSDEScheduler": "dpmsolver_sde",
        "CosineDPMSolverMultistepScheduler": "cosine_dpmsolver_multistep",
    }[name]
    sys.modules.setdefault("torchsde", types.ModuleType("torchsde"))
    loaded = importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde")
    if module != "dpmsolver_sde":
        loaded = importlib.import_module(f"diffusers.schedulers.scheduling_{module}")
    return getattr(loaded, name)


@pytest.mark.parametrize("name", NAMES)
def test_arguments_and_defaults_are_those_of_diffusers(name):
    theirs = inspect.signature(peer(name).__init__).parameters
    expected = {k: p.default for k, p in theirs.items() if k not in ("self", "kwargs")}
    mine = getattr(ours, name).defaults
    assert set(mine) == set(expected)
    for key, value in expected.items():
        assert mine[key] == value or (key == "disable_corrector" and not mine[key] and not value), key
    assert list(inspect.signature(getattr(ours, name)).parameters) == list(mine)


@pytest.mark.parametrize("name", NAMES)
def test_step_takes_what_diffusers_takes(name):
    theirs = inspect.signature(peer(name).step).parameters
    mine = inspect.signature(getattr(ours, name).step).parameters
    missing = [p for p in theirs if p not in mine]
    assert missing in ([], ["pred_original_sample"])  # EDMEuler's, a precomputed prediction
    positional = [p for p, v in mine.items() if v.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert positional == [p for p in theirs if p in mine]
    assert mine["return_dict"].default is True


@pytest.mark.parametrize("name", NAMES)
def test_from_an_instance_and_through_a_folder(name, tmp_path):
    scheduler = peer(name)()
    mine = from_diffusers(scheduler)
    assert type(mine).__name__ == name and from_diffusers(mine) is mine
    mine.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["_class_name"] == name
    assert [p.name for p in tmp_path.iterdir()] == ["scheduler_config.json"]
    again = getattr(ours, name).from_pretrained(tmp_path)
    assert json.dumps([again.config[k] for k in mine.defaults]) == json.dumps([mine.config[k] for k in mine.defaults])
    theirs = peer(name).from_pretrained(str(tmp_path))
    for key, value in ((k, mine.config[k]) for k in mine.defaults):
        assert theirs.config[key] == value or not value, key
    scheduler.save_pretrained(tmp_path / "b" / "scheduler")
    assert (
        getattr(ours, name).from_pretrained(tmp_path / "b", subfolder="scheduler").config["_use_default_values"] == []
    )


def test_swapping_classes_by_configuration():
    config = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", prediction_type="v_prediction", steps_offset=1
    ).config
    mine = ours.DPMSolverMultistepScheduler.from_config(config, use_karras_sigmas=True)
    theirs = diffusers.DPMSolverMultistepScheduler.from_config(config, use_karras_sigmas=True)
    assert all(mine.config[k] == theirs.config[k] for k in mine.defaults)
    assert ours.EulerDiscreteScheduler in mine.compatibles and ours.LCMScheduler not in mine.compatibles
    back = ours.DDIMScheduler.from_config(mine.config)
    assert back.config["prediction_type"] == "v_prediction"


def test_inside_unmodified_pipelines():
    """The same images as with diffusers' own scheduler, and with img2img's later beginning."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(32, 32), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    for name, pipeline in (("DDPMScheduler", diffusers.DDPMPipeline), ("DDIMScheduler", diffusers.DDIMPipeline)):
        images = []
        for stand_in in (False, True):
            pipe = pipeline(unet=unet, scheduler=peer(name)())
            pipe.set_progress_bar_config(disable=True)
            if stand_in:
                pipe.scheduler = from_diffusers(pipe.scheduler)
            generator = torch.Generator().manual_seed(4)
            images.append(pipe(batch_size=2, generator=generator, num_inference_steps=6, output_type="np").images)
        assert abs(images[0] - images[1]).max() < 1e-5


def test_outputs():
    scheduler = ours.DDIMScheduler()
    scheduler.set_timesteps(10)
    x, out = torch.randn(SHAPE), torch.randn(SHAPE)
    result = scheduler.step(out, scheduler.timesteps[0], x)
    pair = scheduler.step(out, scheduler.timesteps[0], x, return_dict=False)
    peer = diffusers.DDIMScheduler()
    peer.set_timesteps(10)
    expected = peer.step(out, peer.timesteps[0], x)
    previous, clean = pair
    torch.testing.assert_close((previous, clean), (expected.prev_sample, expected.pred_original_sample))
    assert torch.equal(result.prev_sample, result["prev_sample"]) and torch.equal(
        result[1], result.pred_original_sample
    )
    assert len(result) == 2 and torch.equal(result.to_tuple()[0], pair[0])
    with pytest.raises(AttributeError, match="denoised"):
        result.denoised  # noqa: B018
    late = scheduler.step(out, scheduler.timesteps[0], x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        late.pred_original_sample  # noqa: B018


@pytest.mark.parametrize("name", ["LCMScheduler", "TCDScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler"])
def test_second_outputs(name):
    x, out = torch.randn(SHAPE), torch.randn(SHAPE)
    values = []
    for cls in (getattr(ours, name), peer(name)):
        scheduler = cls()
        scheduler.set_timesteps(6)
        values.append(scheduler.step(out, scheduler.timesteps[0], x, return_dict=False)[1])
    torch.testing.assert_close(*values, rtol=1e-5, atol=1e-4)


def test_second_order_state():
    scheduler = ours.HeunDiscreteScheduler()
    scheduler.set_timesteps(4)
    assert scheduler.state_in_first_order and scheduler.order == 2
    scheduler.step(torch.ones(SHAPE), scheduler.timesteps[0], torch.ones(SHAPE))
    assert not scheduler.state_in_first_order and scheduler.step_index == 1


STEPS = [
    n for n in NAMES if n not in ("RePaintScheduler", "CosineDPMSolverMultistepScheduler", "DPMSolverSDEScheduler")
]


@pytest.mark.parametrize("name", STEPS)
def test_one_kernel_a_step(name):
    shape = (2, 4, 16, 16)

    class Count(TorchDispatchMode):
        names: list[str] = []  # noqa: RUF012

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            first = out[0] if isinstance(out, tuple) else out
            written = isinstance(first, torch.Tensor) and first.shape == shape and "empty" not in str(func)
            if written or func is torch.ops.fastgen.sampler_step_out.default:
                self.names.append(str(func))
            return out

    scheduler = getattr(ours, name)()
    scheduler.set_timesteps(6)
    out, x = torch.randn(shape), torch.randn(shape)
    seeded = {"seeds": torch.tensor([1, 2])} if "seeds" in inspect.signature(scheduler.step).parameters else {}
    steps = list(scheduler.timesteps)
    with torch.no_grad(), Count() as count:
        for t in steps:
            x = scheduler.step(out, t, x, return_dict=False, **seeded)[0]
    assert len(count.names) == len(steps), count.names
    assert all("sampler_step" in n or "aten.add" in n for n in count.names)


@pytest.mark.parametrize("name", ["DPMSolverSDEScheduler", "CosineDPMSolverMultistepScheduler"])
def test_brownian_samplers_given_the_peer_s_noise(name):
    """diffusers' own needs torchsde; with one noise for both, the trajectories are the same."""
    calls: list[tuple[float, float]] = []

    def noise(sigma, sigma_next):
        calls.append((float(sigma), float(sigma_next)))
        seed = int(float(f"{float(sigma):.4g}") * 1e5) + int(float(f"{float(sigma_next):.4g}") * 1e7)
        return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))

    results = []
    for cls in (getattr(ours, name), peer(name)):
        scheduler = cls()
        scheduler.set_timesteps(8)
        scheduler.noise_sampler = noise
        results.append(run(scheduler, torch.float32))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)
    assert calls


@pytest.mark.parametrize("name", ["DPMSolverSDEScheduler", "CosineDPMSolverMultistepScheduler"])
def test_brownian_samplers_alone(name):
    scheduler = getattr(ours, name)()
    ends = []
    for _ in range(2):
        scheduler.set_timesteps(6)
        torch.manual_seed(3)
        ends.append(run(scheduler, torch.float32)[-1])
    assert torch.equal(*ends) and ends[0].isfinite().all()


def test_repaint():
    """Down, and back up again, with the known part replaced; every step of the jumps."""
    known, mask = torch.randn(SHAPE), (torch.rand(SHAPE) > 0.5).float()
    results = []
    for module in (ours, diffusers):
        scheduler = module.RePaintScheduler(eta=0.4)
        scheduler.set_timesteps(10, jump_length=3, jump_n_sample=2)
        generator = torch.Generator().manual_seed(0)
        x, last = torch.randn(SHAPE, generator=generator), int(scheduler.timesteps[0]) + 1
        for t in scheduler.timesteps:
            if t < last:
                out = torch.tanh(x) * 0.7
                x = scheduler.step(out, t, x, known, mask, generator).prev_sample
            else:
                x = scheduler.undo_step(x, last, generator)
            last = int(t)
        results.append(x)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"])
def test_copies_are_independent(name):
    scheduler = getattr(ours, name)()
    scheduler.set_timesteps(8)
    start = torch.randn(SHAPE)
    t = scheduler.timesteps
    x = scheduler.step(torch.tanh(start), t[0], start).prev_sample
    twin = pickle.loads(pickle.dumps(copy.deepcopy(scheduler)))
    a = scheduler.step(torch.tanh(x), t[1], x).prev_sample
    assert torch.equal(a, twin.step(torch.tanh(x), t[1], x).prev_sample)
    assert scheduler.step_index == twin.step_index == 2


def test_low_precision():
    """bfloat16 in, bfloat16 out, worked out in float32."""
    scheduler = ours.DPMSolverMultistepScheduler()
    scheduler.set_timesteps(8)
    x, wide = torch.randn(SHAPE).bfloat16(), None
    for t in scheduler.timesteps:
        x = scheduler.step(torch.tanh(x), t, x).prev_sample
    assert x.dtype == torch.bfloat16 and x.isfinite().all() and wide is None


def test_gradients_flow_through_a_step():
    scheduler = ours.DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(10)
    out = torch.randn(SHAPE, requires_grad=True)
    scheduler.step(out, scheduler.timesteps[2], torch.randn(SHAPE)).prev_sample.sum().backward()
    assert out.grad is not None and out.grad.abs().sum() > 0


def test_without_diffusers():
    code = "import sys; sys.modules['diffusers'] = None; from fastgen.samplers import diffusers as d; d.UniPCMultistepScheduler()"
    subprocess.run([sys.executable, "-c", code], check=True)


ONE = torch.ones(1, 1)


def stepped(scheduler, steps=4, **kwargs):
    scheduler.set_timesteps(steps, **kwargs)
    return scheduler


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: ours.DDIMScheduler(etas=1), TypeError, "has no argument.*'etas'.*its arguments are"),
        (lambda: ours.DDIMScheduler.from_config({"betta_start": 1}), ValueError, "does not know.*betta_start"),
        (lambda: ours.DDIMScheduler(beta_schedule="x"), ValueError, "beta_schedule must be one of"),
        (
            lambda: ours.DDIMScheduler(prediction_type="x").step(ONE, 1, ONE),
            ValueError,
            "set_timesteps",
        ),
        (
            lambda: stepped(ours.DDIMScheduler(prediction_type="x")).step(ONE, 0, ONE),
            ValueError,
            "prediction_type must be",
        ),
        (
            lambda: stepped(ours.DDIMScheduler()).step(torch.ones(1, 2), 0, ONE),
            ValueError,
            "model_output must have the shape of sample",
        ),
        (
            lambda: stepped(ours.DDIMScheduler()).step(ONE, 7, ONE),
            ValueError,
            "timestep 7 is not in the schedule",
        ),
        (
            lambda: stepped(ours.EulerDiscreteScheduler()).step(ONE, 7, ONE),
            ValueError,
            "not the number of the step",
        ),
        (lambda: stepped(ours.DDIMScheduler(), 1001), ValueError, "num_inference_steps must be in"),
        (lambda: stepped(ours.DDPMScheduler(), None, timesteps=[1, 5]), ValueError, "descending"),
        (lambda: stepped(ours.EulerDiscreteScheduler(), 4, timesteps=[5.0]), ValueError, "give one of"),
        (
            lambda: ours.EulerDiscreteScheduler(use_karras_sigmas=True, use_beta_sigmas=True),
            ValueError,
            "at most one of",
        ),
        (
            lambda: ours.DPMSolverMultistepScheduler(algorithm_type="dpmsolver"),
            ValueError,
            "final_sigmas_type='sigma_min'",
        ),
        (lambda: ours.DPMSolverMultistepScheduler(solver_order=4), ValueError, "solver_order must be"),
        (lambda: ours.UniPCMultistepScheduler(solver_p=1), ValueError, "solver_p must be None"),
        (
            lambda: ours.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).set_timesteps(3),
            ValueError,
            "mu must be given",
        ),
        (lambda: ours.DDIMScheduler.from_pretrained("/nowhere"), FileNotFoundError, "from_diffusers"),
        (lambda: from_diffusers(torch.nn.Linear(1, 1)), TypeError, "no stand-in for Linear"),
        (lambda: ours.DDIMScheduler().config.update({}), TypeError, "cannot be changed"),
        (lambda: ours.HeunDiscreteScheduler().set_timesteps(0), ValueError, "positive integer"),
    ],
)
def test_bad_input(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.parametrize(
    "name", [n for n in STEPS if n not in ("DDPMScheduler", "DDIMScheduler", "DDIMInverseScheduler")]
)
def test_past_the_end(name):
    scheduler = stepped(getattr(ours, name)(), 5)
    x = torch.ones(1, 1, 2, 2)
    for t in scheduler.timesteps:
        scheduler.step(x, t, x)
    with pytest.raises(IndexError, match="call set_timesteps"):
        scheduler.step(x, scheduler.timesteps[-1], x)


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler", "LCMScheduler", "TCDScheduler"])
def test_velocity(name):
    x, noise, at = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.tensor([10, 700])
    expected = getattr(diffusers, name)().get_velocity(x, noise, at)
    torch.testing.assert_close(getattr(ours, name)().get_velocity(x, noise, at), expected, rtol=1e-5, atol=1e-5)


def test_previous_timestep_shift_and_load_config(tmp_path):
    scheduler, peer = stepped(ours.DDPMScheduler(), 7), stepped(diffusers.DDPMScheduler(), 7)
    assert [scheduler.previous_timestep(t) for t in scheduler.timesteps] == [
        int(peer.previous_timestep(t)) for t in peer.timesteps
    ]
    flow, flow_peer = ours.FlowMatchEulerDiscreteScheduler(), diffusers.FlowMatchEulerDiscreteScheduler()
    for each in (flow, flow_peer):
        each.set_shift(3.0)
        each.set_timesteps(5)
    torch.testing.assert_close(flow.sigmas, flow_peer.sigmas)
    flow.save_pretrained(tmp_path)
    assert type(flow).load_config(tmp_path)["_class_name"] == "FlowMatchEulerDiscreteScheduler"


@pytest.mark.parametrize(("name", "options"), [("DDIMScheduler", {"eta": 1.0}), ("DPMSolverMultistepScheduler", {})])
def test_variance_noise_of_one_sample_is_spread_over_the_batch(name, options):
    """As an addition does it in diffusers; what does not broadcast, or is elsewhere or no tensor, is refused."""
    config = {"algorithm_type": "sde-dpmsolver++"} if name.startswith("DPM") else {}
    output, x = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    results = []
    for scheduler in pair(name, **config):
        scheduler.set_timesteps(5)
        noise = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(1))
        results.append(scheduler.step(output, scheduler.timesteps[0], x, variance_noise=noise, **options).prev_sample)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    mine = pair(name, **config)[0]
    mine.set_timesteps(5)
    for wrong, error, message in (
        (torch.zeros(3, 3, 4, 4), ValueError, "noise must broadcast"),
        (torch.zeros(2, 3, 4, 4, device="meta"), ValueError, "noise must be on the device"),
        (torch.zeros(2, 3, 4, 4).numpy(), TypeError, "noise must be a tensor, got ndarray"),
    ):
        with pytest.raises(error, match=message):
            mine.step(output, mine.timesteps[0], x, variance_noise=wrong, **options)
