"""The packed weights that `conv2d` keeps: seen to be old after every change of the weight, let go with it, within a limit."""

import gc
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastgen
from fastgen import _library
from fastgen.ops import conv2d, conv2d_memory_limit, conv2d_plan
from fastgen.ops._convolution_plan import packed_bytes
from fastgen.ops._packed_weights import WEIGHTS

from ..backends import requires_cpu
from .conv2d_cases import weight_of
from .numerics import randn

pytestmark = requires_cpu
SHAPE, K = (1, 48, 16, 16), 40


@pytest.fixture(autouse=True)
def _empty():
    WEIGHTS.clear()
    yield
    WEIGHTS.clear()


def make(seed=20):
    return nn.Parameter(weight_of(SHAPE, K, 3, torch.float32, seed=seed))


def relative_error(weight, x=None):
    """Of a call with the weight as it is now, which Winograd computes."""
    x = randn(*SHAPE, dtype=torch.float32) if x is None else x
    with torch.no_grad():
        assert conv2d_plan(x, weight, padding=1).outputs == 4
        exact = F.conv2d(x.double(), weight.double(), padding=1)
        return ((conv2d(x, weight, padding=1) - exact).norm() / exact.norm()).item()


def in_place(weight):
    with torch.no_grad():
        weight[3, 5, 1, 1] += 10  # a single element


def by_load_state_dict(weight):
    module = nn.Conv2d(SHAPE[1], K, 3, bias=False)
    module.weight = weight
    module.load_state_dict({"weight": make(21).detach()})


def by_load_state_dict_of_the_weight_itself(weight):
    module = nn.Conv2d(SHAPE[1], K, 3, bias=False)
    module.weight = weight
    module.load_state_dict({"weight": make(22).detach()}, strict=True)


def by_an_optimizer(weight):
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], lr=0.1).step()
    weight.grad = None


def by_swapping_data(weight):
    weight.data = weight.data * 2


def by_swapping_data_twice(weight):
    """The second may lie where the first has lain, if that is not held."""
    for factor in (2, 3):
        weight.data = weight.data * factor


def by_other_strides(weight):
    weight.data = weight.data.transpose(2, 3)


def by_writing_through_data(weight):
    weight.data.mul_(0.5)


def by_copying_through_data(weight):
    weight.data.copy_(make(23).data)


def by_a_view(weight):
    with torch.no_grad():
        weight.view(-1)[7] = 5.0


CHANGES = [
    in_place, by_load_state_dict, by_load_state_dict_of_the_weight_itself, by_an_optimizer, by_swapping_data,
    by_swapping_data_twice, by_other_strides, by_writing_through_data, by_copying_through_data, by_a_view,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(change):
    weight = make()
    assert relative_error(weight) <= 2e-5
    before = weight.detach().clone()
    change(weight)
    assert not torch.equal(before, weight.detach())
    assert relative_error(weight) <= 2e-5
    assert relative_error(weight) <= 2e-5  # by what the call before has kept


def test_a_new_weight_at_the_old_address_is_another():
    """Of the same memory and version; a single element differs, which is none of those compared."""
    memory = make().detach().numpy().copy()
    for alive in (False, True):
        weight = torch.from_numpy(memory)
        assert relative_error(weight) <= 2e-5
        place, version, old = weight.data_ptr(), weight._version, weight if alive else None
        del weight
        memory[20, 5, 1, 2] += 10
        weight = torch.from_numpy(memory)
        assert (weight.data_ptr(), weight._version) == (place, version) and weight is not old
        assert relative_error(weight) <= 2e-5


def test_a_new_weight_with_the_old_identity_is_another():
    """As when Python puts a new object where the old one has been, before the cache has heard of its death."""
    old, x = make(), randn(*SHAPE, dtype=torch.float32)
    with torch.no_grad():
        conv2d(x, old, padding=1)
    new = torch.from_numpy(old.detach().numpy())
    WEIGHTS._entries[id(new)] = WEIGHTS._entries.pop(id(old))
    assert WEIGHTS.find(new) == {} and WEIGHTS.bytes == 0


def test_kept_between_calls_and_released_with_the_weight():
    weight, x = make(), randn(*SHAPE, dtype=torch.float32)
    with torch.no_grad():
        conv2d(x, weight, padding=1)
        packed = WEIGHTS.find(weight)[1, 4]
        conv2d(x, weight, padding=1)
        assert WEIGHTS.find(weight)[1, 4] is packed
    assert (
        WEIGHTS.bytes
        == packed.nbytes
        == packed_bytes(1, 4, weight.shape)
        == conv2d_plan(x, weight.detach(), padding=1).weight_bytes
    )
    del weight
    gc.collect()
    assert WEIGHTS.bytes == 0 and not WEIGHTS._entries


def test_what_was_made_of_the_old_weight_is_released_with_a_change():
    weight, x = make(), randn(*SHAPE, dtype=torch.float32)
    with torch.no_grad():
        for _ in range(3):
            conv2d(x, weight, padding=1)
            weight.mul_(1.1)
    assert WEIGHTS.bytes == packed_bytes(1, 4, weight.shape)


def test_one_weight_in_two_sizes_keeps_both_forms():
    weight = make()
    with torch.no_grad():
        for height in (16, 3):
            x = randn(4, 48, height, height, dtype=torch.float32)
            exact = F.conv2d(x.double(), weight.double(), padding=1)
            assert (conv2d(x, weight, padding=1) - exact).norm() <= 2e-5 * exact.norm()
    assert set(WEIGHTS.find(weight)) == {(1, 4), (1, conv2d_plan(x, weight.detach(), padding=1).outputs)} - {(1, 0)}


def test_past_the_memory_limit_the_smaller_form_then_the_library():
    weight, x = make(), randn(*SHAPE, dtype=torch.float32)
    before = conv2d_memory_limit(packed_bytes(1, 2, weight.shape) + 1)
    try:
        with torch.no_grad():
            plan = conv2d_plan(x, weight, padding=1)
            assert plan.outputs == 2 and "F(4x4, 3x3)" in plan.reason and "memory limit" in plan.reason
            conv2d(x, weight, padding=1)
            assert list(WEIGHTS.find(weight)) == [(1, 2)]
            other = make(30)  # no room is left beside the first
            plan = conv2d_plan(x, other, padding=1)
            assert plan.outputs == 0 and "F(2x2, 3x3)" in plan.reason and "memory limit" in plan.reason
            torch.testing.assert_close(conv2d(x, other, padding=1), F.conv2d(x, other, padding=1))
            conv2d_memory_limit(0)
            assert conv2d_plan(x, weight, padding=1).outputs == 2  # what is kept stays
    finally:
        conv2d_memory_limit(before)
    with pytest.raises(ValueError, match="conv2d_memory_limit: limit must be None or a number of bytes, got -1"):
        conv2d_memory_limit(-1)
    conv2d_memory_limit(None)
    assert WEIGHTS.limit == before > 0


def test_weights_that_cannot_be_watched_are_the_librarys():
    x = randn(*SHAPE, dtype=torch.float32)
    with torch.inference_mode():
        weight = weight_of(SHAPE, K, 3, torch.float32).clone()
        assert "inference tensor" in conv2d_plan(x, weight, padding=1).reason
        assert torch.equal(conv2d(x, weight, padding=1), F.conv2d(x, weight, padding=1))
        assert conv2d_plan(x, make_outside, padding=1).outputs == 4  # a usual weight, in inference mode

    class Other(torch.Tensor):
        pass

    with torch.no_grad():
        assert "class Other" in conv2d_plan(x, make().detach().as_subclass(Other), padding=1).reason


make_outside = make(40)


def test_nan_is_equal_to_itself():
    """A weight that holds one is not packed anew at each call."""
    weight, x = make(), randn(*SHAPE, dtype=torch.float32)
    with torch.no_grad():
        weight.fill_(float("nan"))
        conv2d(x, weight, padding=1)
        packed = WEIGHTS.find(weight)[1, 4]
        conv2d(x, weight, padding=1)
    assert WEIGHTS.find(weight)[1, 4] is packed


def test_many_threads_at_once():
    weights, x, wrong = [make(seed) for seed in range(4)], randn(*SHAPE, dtype=torch.float32), []

    def run(i):
        for turn in range(12):
            if relative_error(weights[(i + turn) % 4], x) > 2e-5:
                wrong.append(i)
            if i == 0 and turn % 3 == 2:
                WEIGHTS.clear()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    WEIGHTS.clear()
    assert WEIGHTS.bytes == 0


def test_exact_turns_winograd_off_for_all_threads_and_back():
    weight, x, seen = make(), randn(*SHAPE, dtype=torch.float32), []
    with torch.no_grad():
        with fastgen.set_exact(True):
            thread = threading.Thread(target=lambda: seen.append(conv2d_plan(x, weight.detach(), padding=1)))
            thread.start(), thread.join()
            assert seen[0].outputs == 0 and "set_exact" in seen[0].reason
            assert torch.equal(conv2d(x, weight, padding=1), F.conv2d(x, weight, padding=1))
            with fastgen.set_exact(False):
                assert conv2d_plan(x, weight, padding=1).outputs == 4
            assert conv2d_plan(x, weight, padding=1).outputs == 0
            one = weight_of(SHAPE, K, 1, torch.float32)  # a matrix product is exact
            assert conv2d_plan(x, one).outputs == 1
        assert conv2d_plan(x, weight, padding=1).outputs == 4
        fastgen.set_exact(True)
        try:
            assert conv2d_plan(x, weight, padding=1).outputs == 0
        finally:
            fastgen.set_exact(False)
    with pytest.raises(TypeError, match="set_exact: mode must be a bool, got 1"):
        fastgen.set_exact(1)


@pytest.mark.parametrize(
    ("arguments", "outputs", "reason"),
    [
        (((1, 320, 64, 64), (320, 320, 3, 3), {"padding": 1}), 4, "times as fast as the library"),
        (((1, 3, 64, 64), (128, 3, 3, 3), {"padding": 1}), 0, "faster for this shape"),
        (((1, 64, 64, 64), (128, 64, 1, 1), {}), 1, "times as fast as the library"),
        (((1, 64, 64, 64), (64, 64, 3, 3), {"padding": 1, "stride": 2}), 0, "stride 1"),
        (((1, 64, 64, 64), (64, 32, 3, 3), {"padding": 1, "groups": 2}), 0, "one group"),
        (((1, 64, 64, 64), (64, 64, 3, 3), {}), 0, "padding that keeps the size"),
        (((1, 64, 64, 64), (64, 64, 5, 5), {"padding": 2}), 0, "3x3 and 1x1, not 5x5"),
    ],
)
def test_plans(arguments, outputs, reason, monkeypatch):
    """By the table of one variant, whichever is loaded."""
    monkeypatch.setattr(_library, "ISA", "avx2")
    shape, weight_shape, geometry = arguments
    plan = conv2d_plan(torch.zeros(shape), torch.zeros(weight_shape), **geometry)
    assert plan.outputs == outputs and reason in plan.reason
    assert (plan.weight_bytes > 0) == (outputs > 0)


def test_plans_of_calls_that_are_plain_torchs():
    x, weight = torch.zeros(1, 64, 64, 64), torch.zeros(64, 64, 3, 3)
    assert conv2d_plan(x, nn.Parameter(weight), padding=1).reason == "gradients go through plain torch"
    assert conv2d_plan(x.double(), weight.double(), padding=1).reason == "float64 is computed by the library"
    assert "no kernel for meta" in conv2d_plan(x.to("meta"), weight.to("meta"), padding=1).reason
