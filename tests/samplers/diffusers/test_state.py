"""What a stand-in remembers: calls are followed once a process, and whatever a program does to a scheduler in between is seen."""

import copy
import pickle
import threading
from unittest import mock

import pytest
import torch

from fastgen.samplers.diffusers import scheduler as module
from fastgen.samplers.diffusers.session import HIDDEN, MEMORY, Memory, Session
from fastgen.samplers.diffusers.symbolic import NotLinear

from .cases import CLASSES, Case
from .parity import SHAPE, diffusers, error, model, ours, pair, parent, run

MULTISTEP = ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler"]


def follow_counted():
    return mock.patch.object(module, "follow", wraps=module.follow)


LEFT_OVER = {"UniPCMultistepScheduler": 2, "SASolverScheduler": 2}  # steps that read timesteps of the trajectory before


@pytest.mark.parametrize("name", CLASSES)
def test_a_second_image_follows_nothing(name):
    """Neither by the same scheduler nor by one that is made anew, nor does it work out its schedule."""
    MEMORY.clear()
    case, scheduler = Case(name), pair(name)[0]
    with follow_counted() as follows, mock.patch.object(module, "Twin", wraps=module.Twin) as schedules:
        samples = run(scheduler, case, steps=6)
        assert follows.call_count > 0 and schedules.call_count == 1
        follows.reset_mock()
        run(scheduler, case, steps=6)
        assert follows.call_count == LEFT_OVER.get(name, 0)
        follows.reset_mock()
        assert schedules.call_count == 1 + (
            name == "DPMSolverSinglestepScheduler"
        )  # its first corrects its configuration
        schedules.reset_mock()
        for again in (scheduler, pair(name)[0], ours.from_diffusers(pair(name)[1])):
            assert all(map(torch.equal, run(again, case, steps=6), samples))
        assert follows.call_count == schedules.call_count == 0
    assert scheduler.fallbacks == {}


@pytest.mark.parametrize("kind", ["dtype", "configuration", "steps", "channels"])
def test_what_a_call_hangs_on_is_followed_anew(kind):
    """Each gives the parent's numbers, right after another."""
    x = torch.randn(SHAPE)
    for value in range(2):
        config = {"prediction_type": "v_prediction"} if kind == "configuration" and value else {}
        mine, theirs = pair("EulerDiscreteScheduler", **config)
        results = []
        for scheduler in (mine, theirs):
            scheduler.set_timesteps(7 if kind == "steps" and value else 5)
            sample = x.double() if kind == "dtype" and value else x[:, :2] if kind == "channels" and value else x
            t = scheduler.timesteps[0]
            results.append(scheduler.step(torch.tanh(scheduler.scale_model_input(sample, t)), t, sample)[0])
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-4)


# ---- what programs do to a scheduler in mid-trajectory -------------------------------------------------------------------------


def replace_history(scheduler):
    """By new tensors, as pipelines that edit predictions do."""
    scheduler.model_outputs = [None if m is None else m * 0.5 for m in scheduler.model_outputs]


def edit_history(scheduler):
    scheduler.model_outputs[-1] = scheduler.model_outputs[-1] * 0.5


def edit_history_in_place(scheduler):
    scheduler.model_outputs[-1].mul_(0.5)


def forget_derivatives(scheduler):
    del scheduler.derivatives[:-1]


def forget_a_prediction(scheduler):
    scheduler.model_outputs[-1] = torch.zeros(1, dtype=torch.float64).expand(SHAPE)


def edit_levels(scheduler):
    scheduler.sigmas[4:].mul_(1.1)


def replace_levels(scheduler):
    scheduler.sigmas = scheduler.sigmas * 1.1


def edit_bars(scheduler):
    scheduler.alphas_cumprod.pow_(1.1)


def outdated_config(scheduler):
    """As pipelines correct an outdated configuration."""
    config = {**scheduler.config, "clip_sample": False, "steps_offset": 1}
    scheduler._internal_dict = diffusers.configuration_utils.FrozenDict(config)


def register(scheduler):
    scheduler.register_to_config(prediction_type="v_prediction")


def jump(scheduler):
    scheduler._step_index = scheduler._step_index + 2


def begin_later(scheduler):
    scheduler._step_index = None
    scheduler.set_begin_index(4)


def shorten(scheduler):
    scheduler.timesteps = scheduler.timesteps[2:]


def replace_timesteps(scheduler):
    scheduler.timesteps = scheduler.timesteps.clone() - 1


def lower_order(scheduler):
    scheduler.lower_order_nums = 0


def new_attribute(scheduler):
    scheduler.custom_timesteps = True


EDITS = {
    "DDIMScheduler": [edit_bars, outdated_config, register, shorten, replace_timesteps],
    "DDPMScheduler": [edit_bars, outdated_config, register, shorten, new_attribute],
    "EulerDiscreteScheduler": [edit_levels, replace_levels, register, jump, begin_later, shorten],
    "EulerAncestralDiscreteScheduler": [edit_levels, replace_levels, register, jump, begin_later],
    "FlowMatchEulerDiscreteScheduler": [edit_levels, replace_levels, jump],
    "PNDMScheduler": [edit_bars, register],
    "LMSDiscreteScheduler": [edit_levels, register, jump, forget_derivatives],
    **{
        name: [
            replace_history, edit_history, edit_history_in_place, forget_a_prediction, edit_levels, replace_levels, register,
            jump, lower_order, begin_later,
        ]
        for name in MULTISTEP
    },
}  # fmt: skip
WITHOUT_EFFECT = (new_attribute,)


@pytest.mark.parametrize(("name", "edit"), [(n, e) for n, edits in EDITS.items() for e in edits])
def test_an_edit_in_mid_trajectory(name, edit):
    """The numbers are the parent's after it, with the memory of an unedited trajectory at hand; and with those of the edited."""
    mine, theirs = pair(name)
    run(mine, Case(name), steps=8)
    plain = edited(pair(name)[0], lambda _: None)
    expected, first, again = (edited(scheduler, edit) for scheduler in (theirs, mine, pair(name)[0]))
    assert error(first, expected) <= 2e-5 and error(again, expected) <= 2e-5
    assert [x.dtype for x in first] == [x.dtype for x in expected]
    assert error(edited(pair(name)[0], lambda _: None), plain) == 0  # and those of the unedited stay
    assert edit in WITHOUT_EFFECT or error(plain, expected) > 1e-3


def edited(scheduler, edit):
    scheduler.set_timesteps(8)
    steps, x, samples = list(scheduler.timesteps), torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)), []
    for i, t in enumerate(steps[:6]):
        if i == 3:
            edit(scheduler)
            steps[3:6] = list(scheduler.timesteps[3:6])
            t = steps[3]
        inputs = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        torch.manual_seed(i)
        x = scheduler.step(model(inputs, float(t)), t, x)[0]
        samples.append(x)
    return samples


def test_two_schedulers_side_by_side():
    """Of one configuration and of others, step by step in turns."""
    names = ["DDIMScheduler", "UniPCMultistepScheduler", "UniPCMultistepScheduler", "HeunDiscreteScheduler"]
    counts = [6, 6, 9, 6]
    alone = [run(pair(name)[0], Case(name), steps=n) for name, n in zip(names, counts, strict=True)]
    schedulers = [pair(name)[0] for name in names]
    states = []
    for scheduler, n in zip(schedulers, counts, strict=True):
        scheduler.set_timesteps(n)
        x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        states.append((x * float(scheduler.init_noise_sigma)).float())
    for i in range(max(len(s.timesteps) for s in schedulers)):
        for k, scheduler in enumerate(schedulers):
            if i < len(scheduler.timesteps):
                t, x = scheduler.timesteps[i], states[k]
                states[k] = scheduler.step(model(scheduler.scale_model_input(x, t), float(t)), t, x)[0]
    assert all(torch.equal(x, samples[-1]) for x, samples in zip(states, alone, strict=True))


@pytest.mark.parametrize(
    "name", ["UniPCMultistepScheduler", "HeunDiscreteScheduler", "PNDMScheduler", "SASolverScheduler"]
)
def test_threads(name):
    """Four at once, each with a scheduler of its own, from an empty memory."""
    MEMORY.clear()
    expected = run(pair(name)[0], Case(name), steps=6)
    MEMORY.clear()
    results, schedulers = {}, [pair(name)[0] for _ in range(4)]

    def follow(k):
        scheduler = schedulers[k]
        scheduler.set_timesteps(6)
        x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        x, draws = (x * float(scheduler.init_noise_sigma)).float(), {}
        if name.startswith("SA"):
            draws["generator"] = torch.Generator().manual_seed(3)
        for t in scheduler.timesteps:
            x = scheduler.step(model(scheduler.scale_model_input(x, t), float(t)), t, x, **draws)[0]
        results[k] = x

    threads = [threading.Thread(target=follow, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [0, 1, 2, 3] and all(s.fallbacks == {} for s in schedulers)
    assert all(error([x], expected[-1:]) <= 1e-6 for x in results.values())


@pytest.mark.parametrize(
    "how", [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s)), ours.from_diffusers]
)
@pytest.mark.parametrize("name", [*MULTISTEP, "HeunDiscreteScheduler", "PNDMScheduler", "LCMScheduler"])
def test_copies_in_mid_trajectory_go_on_alone(name, how):
    """``from_diffusers`` takes over the parent's."""
    mine, theirs = pair(name)
    source = theirs if how is ours.from_diffusers else mine
    samples = []
    source.set_timesteps(8)
    x = torch.randn(SHAPE)
    steps = list(source.timesteps)[:6]
    for t in steps[:3]:
        x = source.step(model(x, float(t)), t, x)[0]
    twin = how(source)
    assert isinstance(twin, ours.FusedScheduler) and type(twin) is type(mine) and twin.fallbacks == {}
    assert how is copy.copy or twin.__dict__.get(HIDDEN) is not vars(source).get(HIDDEN)
    start = x
    if how is copy.copy:  # which shares lists, as it does in diffusers
        twin.model_outputs, source.model_outputs = (list(getattr(source, "model_outputs", [])) for _ in range(2))
        twin.ets, source.ets = (list(getattr(source, "ets", [])) for _ in range(2))
        twin.timestep_list = list(getattr(source, "timestep_list", []))
    for scheduler in (twin, source):
        torch.manual_seed(0)
        x, kept = start, []
        for t in steps[3:]:
            x = scheduler.step(model(x, float(t)), t, x)[0]
            kept.append(x)
        samples.append(kept)
    assert error(*samples) <= 1e-5


def test_a_copy_made_in_another_process_needs_no_memory():
    scheduler = pair("UniPCMultistepScheduler")[0]
    run(scheduler, Case("UniPCMultistepScheduler"), steps=4)
    assert HIDDEN.encode() not in pickle.dumps(scheduler)
    assert HIDDEN not in vars(pickle.loads(pickle.dumps(scheduler)))
    assert isinstance(copy.deepcopy(Session()), Session) and isinstance(pickle.loads(pickle.dumps(Session())), Session)


# ---- the memory of a process ---------------------------------------------------------------------------------------------------


def test_memory_is_bounded():
    memory, session = Memory(limit=3), Session()
    scheduler = type("Anything", (), {})()
    for i in range(10):
        scheduler.level = i
        memory.state(i)
        memory.keep(("call", i), ("level",), session.key(scheduler, ["level"]), i)
        memory.keep("one call", ("level",), session.key(scheduler, ["level"]), i)
        assert memory.find("one call", scheduler, session) == i
    assert len(memory._states) <= 3 and len(memory._moves) <= 3
    assert all(len(found) <= 3 for names in memory._moves.values() for found in names.values())
    scheduler.level = 0
    assert memory.find("one call", scheduler, session) is None and memory.find(("call", 0), scheduler, session) is None
    used = memory.state(8)
    memory.state(10), memory.state(11)
    assert memory.state(8) is used  # the least recently used goes first
    memory.clear()
    assert memory.find(("call", 9), scheduler, session) is None and memory.state(8) is not used


def test_a_small_memory_changes_no_number():
    expected = run(pair("UniPCMultistepScheduler")[0], Case("UniPCMultistepScheduler"))
    with (
        mock.patch.object(module, "MEMORY", Memory(limit=2)),
        mock.patch("fastgen.samplers.diffusers.session.MEMORY", Memory(limit=2)),
    ):
        scheduler = pair("UniPCMultistepScheduler")[0]
        for _ in range(2):
            assert all(map(torch.equal, run(scheduler, Case("UniPCMultistepScheduler")), expected))


def test_attributes_of_unknown_content_leave_the_step_to_the_parent():
    mine, theirs = pair("DDIMScheduler")
    x, results = torch.randn(SHAPE), []
    for scheduler in (mine, theirs):
        scheduler.set_timesteps(4)
        scheduler.note = {1, 2}
        results.append(scheduler.step(torch.tanh(x), scheduler.timesteps[0], x)[0])
    assert torch.equal(*results) and mine.fallbacks == {"note is a set": 1}
    del mine.note
    mine.step(torch.tanh(x), mine.timesteps[0], x)
    assert mine.fallbacks == {"note is a set": 1}
    with pytest.raises(NotLinear, match="note is a set"):
        module.key_of("note", {1})
    assert parent("DDIMScheduler") is type(theirs)
