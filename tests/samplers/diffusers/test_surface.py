"""A stand-in is its parent in all but the step: classes, configurations through every compatible class, saving and loading."""

import json
import subprocess
import sys

import pytest
import torch

from fastgen.samplers import from_diffusers

from .cases import CLASSES, Case
from .parity import SHAPE, diffusers, error, model, ours, pair, parent, run

NAMES = sorted(ours.SCHEDULERS)


@pytest.mark.parametrize("name", NAMES)
def test_a_stand_in_is_of_its_parent_s_class(name):
    cls = ours.stand_in(parent(name))
    scheduler, theirs = pair(name)
    for kind in (parent(name), diffusers.SchedulerMixin, diffusers.ConfigMixin, ours.FusedScheduler):
        assert isinstance(scheduler, kind)
    assert type(scheduler) is cls is ours.stand_in(parent(name)) and cls.parent is parent(name)
    assert (cls.__name__, cls.__module__) == (name, parent(name).__module__)
    assert "fused steps" in cls.__doc__ and (parent(name).__doc__ or "") in cls.__doc__
    assert scheduler.config == theirs.config and repr(scheduler) == repr(theirs)
    assert scheduler.compatibles == theirs.compatibles and scheduler.order == theirs.order
    own = {n for n in vars(cls) if not n.startswith("__")}
    assert own - {"_abc_impl"} <= {"parent", "step", "set_timesteps", "scale_model_input"}


@pytest.mark.parametrize("name", [n for n in NAMES if n in ours.__all__])
def test_names_of_the_module(name):
    assert getattr(ours, name) is ours.stand_in(getattr(diffusers, name)) and name in dir(ours)


def test_other_classes_and_names():
    """Any scheduler of diffusers with such a step has a stand-in, listed or not."""
    parallel = from_diffusers(diffusers.DDIMParallelScheduler())
    assert isinstance(parallel, ours.FusedScheduler) and type(parallel) is ours.DDIMParallelScheduler
    for wrong in ("Nothing", "NothingScheduler", "UNet2DModel"):
        with pytest.raises(AttributeError, match=f"no attribute '{wrong}'"):
            getattr(ours, wrong)
    for wrong, message in ((torch.nn.Linear(1, 1), "got Linear"), (None, "got NoneType")):
        with pytest.raises(TypeError, match=f"must be one of diffusers' schedulers, {message}"):
            from_diffusers(wrong)
    for without in (diffusers.CogVideoXDPMScheduler, diffusers.ScoreSdeVeScheduler):  # another step, and none
        with pytest.raises(TypeError, match=f"no stand-in for {without.__name__}: its step takes"):
            from_diffusers(without())


def test_a_class_of_the_user_s():
    """Its own step, with diffusers' classes below it."""

    class Halved(diffusers.DDIMScheduler):
        def step(self, model_output, timestep, sample, **kwargs):
            return super().step(model_output * 0.5, timestep, sample, **kwargs)

    x, results = torch.randn(SHAPE), []
    for scheduler in (Halved(), from_diffusers(Halved())):
        scheduler.set_timesteps(4)
        results.append(scheduler.step(x, scheduler.timesteps[1], x)[0])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_following_draws_no_noise():
    """A step that draws by itself, and is then found not to be linear: its noise is the parent's, from any generator."""

    class Drawing(diffusers.DDPMScheduler):
        def step(self, model_output, timestep, sample, generator=None, **kwargs):
            spread = torch.rand(1) + torch.rand(1, generator=generator)
            return super().step(
                model_output * model_output * spread.item(), timestep, sample, generator=generator, **kwargs
            )

    x, results = torch.randn(SHAPE), []
    for scheduler in (Drawing(), from_diffusers(Drawing())):
        scheduler.set_timesteps(4)
        torch.manual_seed(0)
        results.append(scheduler.step(x, scheduler.timesteps[1], x, generator=torch.Generator().manual_seed(1))[0])
    assert torch.equal(*results) and sum(scheduler.fallbacks.values()) == 1


# ---- configurations ------------------------------------------------------------------------------------------------------------

SETTINGS = {
    "prediction_type": "v_prediction", "clip_sample": False, "steps_offset": 1, "timestep_spacing": "trailing", "beta_end": 0.013,
    "beta_schedule": "scaled_linear", "set_alpha_to_one": False, "skip_prk_steps": True, "use_karras_sigmas": True,
    "solver_order": 3, "a_setting_of_tomorrow": 7,
}  # fmt: skip
COMPATIBLE = [n for n in NAMES if n in ours.__all__ and len(parent(n)._compatibles) > 1]


@pytest.mark.parametrize("name", COMPATIBLE)
def test_round_trips_through_every_compatible_class(name):
    """Settings that a class lacks survive, and the numbers with them: through ours, or ours and theirs in turns."""
    start = parent(name).from_config(SETTINGS)
    for other in parent(name)._compatibles:
        if other not in COMPATIBLE:
            continue
        expected = parent(name).from_config(parent(other).from_config(start.config).config)
        for there in (getattr(ours, other), parent(other)):
            back = getattr(ours, name).from_config(there.from_config(from_diffusers(start).config).config)
            assert isinstance(back, ours.FusedScheduler) and back.config == expected.config, other
    assert back.config["clip_sample"] is False and back.config["prediction_type"] == "v_prediction"


def test_an_image_after_a_swap_there_and_back():
    """DDIM without clipping, Euler, DDIM: the image is the one of diffusers."""
    config = {"clip_sample": False, "beta_schedule": "scaled_linear"}
    plain = from_diffusers(diffusers.DDIMScheduler(**config))
    back = ours.DDIMScheduler.from_config(ours.EulerDiscreteScheduler.from_config(plain.config).config)
    case = Case("DDIMScheduler", config)
    expected = run(diffusers.DDIMScheduler(**config), case)
    assert (
        error(run(back, case), expected)
        <= 1e-5
        < error(run(ours.DDIMScheduler(beta_schedule="scaled_linear"), case), expected)
    )


def test_overrides_unknown_arguments_and_bad_ones():
    given = ours.DPMSolverMultistepScheduler.from_config(
        diffusers.DDIMScheduler(steps_offset=1).config, use_karras_sigmas=True
    )
    assert given.config.use_karras_sigmas and given.config.steps_offset == 1
    scheduler, unused = ours.DDIMScheduler.from_config({"nothing_known": 1}, return_unused_kwargs=True)
    assert unused == {"nothing_known": 1} and isinstance(scheduler, ours.FusedScheduler)
    assert ours.DDPMScheduler(variance_type=None).config.variance_type is None
    assert len(ours.DDIMScheduler(trained_betas=[0.1] * 7).betas) == 7
    for cls in (ours.DDIMScheduler, diffusers.DDIMScheduler):
        with pytest.raises(NotImplementedError, match="nothing"):
            cls(beta_schedule="nothing")
        with pytest.raises(TypeError, match="unexpected keyword"):
            cls(etas=1)


@pytest.mark.parametrize("name", NAMES)
def test_from_diffusers_keeps_configuration_and_state(name):
    theirs = pair(name)[1]
    mine = from_diffusers(theirs)
    assert from_diffusers(mine) is mine and mine.config is theirs.config
    assert vars(mine).keys() == vars(theirs).keys()
    for attribute, value in vars(mine).items():
        other = vars(theirs)[attribute]
        assert value is other or (type(value) is list and value == other)
        assert not isinstance(value, list) or value is not other


@pytest.mark.parametrize("name", CLASSES)
def test_from_diffusers_goes_on_in_mid_trajectory(name):
    theirs = pair(name)[1]
    theirs.set_timesteps(8)
    x = torch.randn(SHAPE)
    steps = list(theirs.timesteps)

    def go(scheduler, x, steps):
        torch.manual_seed(0)
        for t in steps:
            inputs = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            x = scheduler.step(model(inputs, float(t)), t, x)[0]
        return x

    x = go(theirs, x, steps[:3])
    mine = from_diffusers(theirs)
    results = [go(scheduler, x, steps[3:7]) for scheduler in (mine, theirs)]
    assert error(*([r] for r in results)) <= 1e-5 and mine.fallbacks == {}


# ---- saving and loading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded(name, tmp_path):
    """The files are the parent's own; loaded by either class, they are that class."""
    mine, theirs = pair(name)
    mine.save_pretrained(tmp_path / "mine")
    theirs.save_pretrained(tmp_path / "theirs" / "scheduler")
    texts = [next(path.rglob("*.json")).read_text() for path in (tmp_path / "mine", tmp_path / "theirs")]
    assert texts[0] == texts[1] and json.loads(texts[0])["_class_name"] == name
    cls = ours.stand_in(parent(name))
    again = cls.from_pretrained(tmp_path / "mine", local_files_only=True)
    assert type(again) is cls and {**again.config, "_use_default_values": 0} == {
        **mine.config,
        "_use_default_values": 0,
    }
    assert type(cls.from_pretrained(tmp_path / "theirs", subfolder="scheduler")) is cls
    assert type(parent(name).from_pretrained(tmp_path / "mine")) is parent(name)
    assert cls.load_config(tmp_path / "mine")["_class_name"] == name


def test_what_is_saved_needs_no_fastgen(tmp_path):
    """Configurations are read in a process in which fastgen cannot be imported."""
    ours.UniPCMultistepScheduler(solver_order=3).save_pretrained(tmp_path)
    code = (
        "import sys; sys.modules['fastgen'] = None; import diffusers; "
        f"s = diffusers.UniPCMultistepScheduler.from_pretrained({str(tmp_path)!r}); print(s.config.solver_order)"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "3"


def test_without_diffusers():
    """The samplers need none; the stand-ins say how to get it."""
    code = (
        "import sys; sys.modules['diffusers'] = None; import fastgen.samplers as s; s.make_solver('ddim')\n"
        "for use in (lambda: s.diffusers, lambda: s.from_diffusers, lambda: __import__('fastgen.samplers.diffusers')):\n"
        "    try: use()\n"
        "    except ImportError as error: print(error)\n"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.splitlines()
    assert len(found) == 3 and all("pip install diffusers" in line for line in found)
