"""What a fused step returns: diffusers' own outputs and tuples, whose further values are worked out late; and its memory."""

import copy
import inspect
import pickle

import pytest
import torch

from fastgen.samplers import diffusers as ours

from .cases import CLASSES, Case
from .parity import SHAPE, model, pair

LARGE = (2, 4, 128, 128)  # past the size from which outputs recycle memory


def stepped(name, steps=6, **options):
    """Output of the second step, of the stand-in and of its parent."""
    made = []
    for scheduler in pair(name, **Case(name).config):
        scheduler.set_timesteps(steps)
        x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
        generator = torch.Generator().manual_seed(0)
        draws = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
        for t in scheduler.timesteps[:2]:
            result = scheduler.step(model(x, float(t)), t, x, **draws, **options)
            x = result[0]
        made.append(result)
    return made


@pytest.mark.parametrize("name", CLASSES)
def test_every_field_is_the_parent_s(name):
    mine, theirs = stepped(name)
    assert isinstance(mine, type(theirs)) and type(mine).__name__ == type(theirs).__name__
    assert list(mine.keys()) == list(theirs.keys()) and len(mine) == len(theirs)
    for key in theirs:
        assert_near(mine[key], theirs[key])
        assert mine[key] is getattr(mine, key) is mine.get(key)
    assert [key for key, _ in mine.items()] == list(theirs.keys())
    assert all(a is b for a, b in zip(mine.values(), mine.to_tuple(), strict=True))
    plain, theirs = stepped(name, return_dict=False)
    assert type(theirs) is tuple and isinstance(plain, tuple) and len(plain) == len(theirs)
    for a, b in zip(plain, theirs, strict=True):
        assert_near(a, b)


def assert_near(mine, theirs):
    """To 1e-5 of the largest value: of terms of its size, a small one is what is left."""
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5 * max(1.0, float(theirs.abs().max())))


def test_outputs_are_indexed_sliced_unpacked_and_asked():
    mine, _ = stepped("DDIMScheduler")
    sample, clean = mine.to_tuple()
    assert mine[0] is sample is mine["prev_sample"] and mine[1] is clean is mine[-1]
    assert mine[:1] == (sample,) and mine[1:] == (clean,)
    assert "pred_original_sample" in mine and mine.get("nothing", 3) == 3
    for error, wrong in ((AttributeError, lambda: mine.denoised), (KeyError, lambda: mine["denoised"])):
        with pytest.raises(error):
            wrong()
    plain, _ = stepped("DDIMScheduler", return_dict=False)
    first, second = plain
    assert plain[0] is first and plain[-1] is second is plain[1:][0] and len(plain[:]) == 2
    assert plain + (None,) == (first, second, None)  # noqa: RUF005
    assert plain == (first, second) and hash(plain) == hash((first, second))
    assert repr(plain).startswith("(tensor(")


def test_outputs_are_copied_pickled_and_trees():
    mine, _ = stepped("DDIMScheduler")
    plain, _ = stepped("DDIMScheduler", return_dict=False)
    for made in (copy.deepcopy(mine), copy.copy(mine), pickle.loads(pickle.dumps(mine))):
        assert torch.equal(made.prev_sample, mine.prev_sample)
        assert torch.equal(made["pred_original_sample"], mine.pred_original_sample)
    again = pickle.loads(pickle.dumps(plain))
    assert type(again) is tuple and all(map(torch.equal, again, plain))
    assert b"fastgen" not in pickle.dumps(again)
    doubled = torch.utils._pytree.tree_map(lambda x: 2 * x, [mine, plain])
    assert isinstance(doubled[0], type(mine).__mro__[1]) and type(doubled[1]) is tuple
    for made in (doubled[0].to_tuple(), doubled[1]):
        assert all(torch.equal(a, 2 * b) for a, b in zip(made, plain, strict=True))


def test_a_late_value_of_changed_operands_is_refused():
    scheduler, _ = pair("DDIMScheduler")
    scheduler.set_timesteps(4)
    for operand in (0, 1):
        operands = [torch.randn(SHAPE), torch.randn(SHAPE)]
        asked, late, plain = (
            scheduler.step(operands[0], scheduler.timesteps[0], operands[1], return_dict=r) for r in (True, True, False)
        )
        before = asked.pred_original_sample.clone()
        operands[operand].add_(1)
        assert torch.equal(asked.pred_original_sample, before)
        for value in (lambda late=late: late.pred_original_sample, lambda plain=plain: plain[1]):
            with pytest.raises(RuntimeError, match=r"(pred_original_sample|1) is worked out.*changed in place"):
                value()
        assert late.prev_sample.isfinite().all()  # what the kernel has written stays


# ---- memory that is given out again --------------------------------------------------------------------------------------------


def trajectory(scheduler, keep=lambda x: x, steps=8):
    """(what is kept of every sample, copies of the samples)."""
    scheduler.set_timesteps(steps)
    x = torch.randn(LARGE, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    draws = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    kept, copies = [], []
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, float(t)), t, x, return_dict=False, **draws)[0]
        kept.append(keep(x))
        copies.append(x.clone())
    return kept, copies


KEEPING = {
    "tensors": lambda x: x,
    "views": lambda x: x[:, :1],
    "detached": lambda x: x.detach(),
    "NumPy": lambda x: x.numpy(),
    "DLPack": lambda x: torch.utils.dlpack.to_dlpack(x),
}


@pytest.mark.parametrize("how", KEEPING)
@pytest.mark.parametrize("name", ["DDIMScheduler", "UniPCMultistepScheduler", "HeunDiscreteScheduler", "DDPMScheduler"])
def test_what_the_caller_keeps_is_never_written_over(name, how):
    """Nor by the rest of the trajectory, nor by the next two."""
    scheduler, _ = pair(name)
    with torch.no_grad():
        kept, copies = trajectory(scheduler, KEEPING[how])
        for _ in range(2):
            trajectory(scheduler)
    for x, expected in zip(kept, copies, strict=True):
        x = torch.from_dlpack(x) if how == "DLPack" else torch.as_tensor(x)
        assert torch.equal(x, expected[:, :1] if how == "views" else expected)


@pytest.mark.parametrize("name", CLASSES)
def test_all_samples_of_every_class_stay(name):
    scheduler, parent = pair(name)
    with torch.inference_mode():
        kept, copies = trajectory(scheduler)
        trajectory(scheduler, steps=4)
    assert all(map(torch.equal, kept, copies)) and scheduler.fallbacks == {}
    for x, expected in zip(kept, trajectory(parent)[0], strict=True):
        torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("name", CLASSES)
def test_no_memory_is_held_after_the_last_step(name):
    scheduler, _ = pair(name)
    with torch.no_grad():
        trajectory(scheduler)
    assert vars(scheduler)["_fastgen"].pool._own == []
    assert isinstance(scheduler, ours.FusedScheduler)
