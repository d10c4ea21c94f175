"""Several ranks train as one process does: the same losses, checkpoints that any number of them goes on from, shared failures.

In float64, so that nothing but the order of sums differs: 6 steps of Adam leave 1e-12 of it at most, where a lost example, a wrong
weight of a part or a stale one of a kernel would leave 1e-3.
"""

import json

import pytest
import torch

from fastgen._ranks import Ranks
from fastgen.models import UNet, load_state
from fastgen.ops._packed_weights import WEIGHTS
from fastgen.training import Spread

from ..launching import torchrun
from . import rank_cases
from .rank_cases import CASES, losses
from .rank_worker import HALF
from .tiny import state

ROUNDING = 1e-12  # relative; some 2e-16 are seen
OF_TWO = (
    "curves", "shared_curves", "accumulated_curves", "rounded_curves", "other_beginnings", "checkpoints", "dropout",
    "failures", "stops", "shares", "packed",
)  # fmt: skip

pytestmark = pytest.mark.long


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """As each rank has: threads cost these small sums more than they save, beside a busy neighbour many times as much."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints: of one process half way, and what ranks have made of it."""
    path = tmp_path_factory.mktemp("ranks")
    trainer = rank_cases.diffusion()
    trainer.fit(HALF)
    trainer.save(path / "one.safetensors")
    return path


def run(folder, ranks, *scenarios):
    """What rank 0 found in each scenario."""
    done = torchrun(ranks, "tests.training.rank_worker", folder, *scenarios)
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: json.loads((folder / f"{name}-{ranks}.json").read_text()) for name in scenarios}


@pytest.fixture(scope="module")
def of_two(folder):
    return run(folder, 2, *OF_TWO)


@pytest.fixture(scope="module")
def of_four(folder, of_two):
    """After two ranks have left their checkpoints."""
    return run(folder, 4, "few_curves", "other_number")


@pytest.fixture(scope="module")
def undisturbed():
    """A trainer that has done all steps in one process, and its losses."""
    trainer = rank_cases.diffusion()
    return trainer, losses(trainer)


def assert_same(ours, theirs, rounding=ROUNDING):
    assert len(ours) == len(theirs)
    torch.testing.assert_close(ours, theirs, rtol=rounding, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_have_the_losses_of_one(of_two, name):
    expected = losses(CASES[name]())
    assert max(expected) / min(expected) > 1.001  # the weights took part
    assert_same(of_two["curves"][name], expected)
    assert_same(of_two["shared_curves"][name], expected)


def test_four_ranks_have_the_losses_of_one(of_four):
    for name, seen in of_four["few_curves"].items():
        assert_same(seen, losses(CASES[name]()))


def test_micro_batches_have_the_losses_of_one(of_two):
    for name, seen in of_two["accumulated_curves"].items():
        assert_same(seen, losses(CASES[name.split(",")[0]]()))


@pytest.mark.parametrize("name", ["diffusion", "gated", "glow", "real_nvp"])
def test_micro_batches_in_one_process(name):
    """Of 7 examples: 2, 2 and 3, and each by itself."""
    expected = losses(CASES[name]())
    for parts in (3, 7):
        assert_same(losses(CASES[name](Spread(accumulate=parts))), expected)


def test_in_float32_and_bfloat16_the_losses_are_those_of_one_to_rounding(of_two):
    seen = of_two["rounded_curves"]
    # float32: roundings of 6e-8, some hundred of them a step; bfloat16: of 4e-3, of which means over a batch keep less
    assert_same(seen["float32"], losses(rank_cases.diffusion(dtype=torch.float32)), 1e-4)
    expected = losses(rank_cases.diffusion(dtype=torch.float32, autocast=True))
    assert_same(seen["autocast"], expected, 2e-2)
    assert_same(seen["autocast, fsdp"], expected, 2e-2)
    assert seen["float32"] != seen["autocast"]


def test_ranks_begin_with_the_weights_of_rank_0(of_two, undisturbed):
    for seen in of_two["other_beginnings"].values():
        assert_same(seen, undisturbed[1])


@pytest.mark.parametrize("kind", ["whole", "shared"])
def test_one_process_goes_on_from_what_two_ranks_have_saved(of_two, folder, undisturbed, kind):
    whole, expected = undisturbed
    trainer = rank_cases.diffusion()
    trainer.restore(folder / f"{kind}-2.safetensors")
    assert trainer.step == HALF
    assert_same(losses(trainer), expected[HALF:])
    ours, theirs = state(trainer), state(whole)
    for name in theirs:
        if not name.startswith("random.global"):  # which dropout of several ranks is not drawn from
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-10)


def test_two_and_four_ranks_go_on_from_what_others_have_saved(of_two, of_four, undisturbed):
    """From one process to two ranks and to two with FSDP2; from either to four."""
    for seen in (*of_two["checkpoints"].values(), *of_four["other_number"].values()):
        assert_same(seen, undisturbed[1][HALF:])


@pytest.mark.parametrize("kind", ["whole", "shared"])
def test_the_weights_file_of_ranks_is_that_of_one(of_two, folder, undisturbed, kind):
    path = folder / f"{kind}-weights-2.safetensors"
    model, expected = UNet.load(path), undisturbed[0].ema.model
    assert model.config == expected.config and '"a": 1' in load_state(path)[1]["training"]
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=1e-6, atol=1e-10)


def test_a_resumed_run_with_dropout_is_the_undisturbed_one_bit_for_bit(of_two):
    assert of_two["dropout"] == {"equal": True, "differs": True}


def test_every_rank_hears_of_a_failure_and_goes_on_in_step(of_two):
    first, second = of_two["failures"]
    for rank in (first, second):
        assert rank["nan"] == ["FloatingPointError", "the loss is nan at step 1: try a smaller learning rate"]
        assert rank["untouched"]
        assert rank["few"][0] == rank["not begun"][0] == "ValueError"
        assert "ranks times accumulate, 2 x 4 = 8, got 7" in rank["few"][1]
        assert "call begin_with_statistics" in rank["not begun"][1]
    for what, kind in (("unwritable", "OSError"), ("missing", "FileNotFoundError")):
        assert first[what][0] == kind and second[what] == ["RankError", f"rank 0: {first[what][1]}"]


def test_all_ranks_end_after_the_same_step_where_one_wishes_to(of_two):
    assert of_two["stops"] == [3, 3]


def test_with_fsdp_a_rank_keeps_half_of_everything(of_two):
    for kind, share in of_two["shares"].items():
        assert 0.45 < share < 0.55, (kind, share)


def test_no_packed_weights_of_another_step_are_used_with_fsdp(of_two):
    """Gathered weights lie where the last ones did, with their version counter."""
    seen = of_two["packed"]
    trainer, kept = rank_cases.pixel_cnn(dtype=torch.float32), []
    trainer.model.out.register_forward_hook(lambda *_: kept.append(WEIGHTS.bytes))
    before = WEIGHTS.bytes
    assert_same(seen["losses"], losses(trainer), 1e-3)
    assert seen["between"] == 0
    assert (seen["within"] > 0) == (min(kept) > before)  # no kernels, no packed weights


def test_several_ranks_need_a_process_group():
    two = Ranks(0, 2, 0, torch.distributed.HashStore(), launched=True)
    with pytest.raises(ValueError, match="spread is over 2 ranks, which need a process group"):
        rank_cases.diffusion(Spread(two))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"accumulate": 0}, ValueError, "accumulate must be at least 1, got 0"),
        ({"accumulate": 1.5}, TypeError, r"accumulate must be an integer, got 1\.5"),
        ({"fsdp": 1}, TypeError, "fsdp must be True or False, got 1"),
    ],
)
def test_bad_spreads(arguments, error, message):
    with pytest.raises(error, match=message):
        Spread(**arguments)


def test_parts_are_contiguous_and_of_sizes_that_differ_by_one():
    for n, ranks, accumulate in ((7, 2, 3), (64, 3, 1), (9, 4, 2)):
        parts = []
        for rank in range(ranks):
            spread = Spread(Ranks(rank, ranks, 0, torch.distributed.HashStore(), launched=True), accumulate)
            own = [*spread.micro_batches(n)]
            assert len(own) == accumulate and slice(own[0].start, own[-1].stop) == spread.own(n)
            assert spread.own(n).stop - spread.own(n).start in (n // ranks, n // ranks + 1)
            parts += own
        assert [i for part in parts for i in range(n)[part]] == [*range(n)]
        assert all(part.start < part.stop for part in parts)


def test_what_a_step_draws_does_not_depend_on_the_rank():
    whole = rank_cases.diffusion().draw_batch()
    for rank in range(2):
        trainer = rank_cases.diffusion()
        trainer.spread = Spread(Ranks(rank, 2, 0, torch.distributed.HashStore(), launched=True))
        own, part = trainer.draw_batch(), trainer.spread.own(7)
        assert len(own.images) == (3, 4)[rank]
        assert all(torch.equal(x, y[part]) for x, y in zip(own, whole, strict=True))
