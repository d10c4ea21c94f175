"""`ActNorm`: its initialisation, when it happens and what remembers that, and as a module."""

import copy
import pickle

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor

from fastgen.nn import ActNorm


def images(seed: int = 1, n: int = 6) -> Tensor:
    x = torch.randn(n, 12, 5, 6, generator=torch.Generator().manual_seed(seed))
    return x * torch.arange(1.0, 13.0)[:, None, None] + 3


@pytest.mark.parametrize("x", [images(), images().contiguous(memory_format=torch.channels_last), images()[:, :, 0, 0]])
def test_the_first_batch_has_mean_0_and_deviation_1(x):
    norm = ActNorm(12)
    y, log_det = norm(x)
    flat = y.detach().movedim(1, 0).flatten(1)
    assert flat.mean(1).abs().max() <= 1e-6 and (flat.std(1) - 1).abs().max() <= 1e-5
    second, _ = norm(images(2))
    assert torch.equal(second, norm(images(2))[0]) and norm.initialized
    back, negative = norm.inverse(y)
    assert (back - x).abs().max() <= 1e-5 and torch.equal(log_det, -negative)


def test_in_evaluation_mode_parameters_are_used_as_they_are():
    norm = ActNorm(12).eval()
    y, log_det = norm(images())
    assert torch.equal(y, images()) and not log_det.any() and not norm.initialized
    assert not torch.equal(norm.train()(images())[0], images())


def test_without_data():
    norm = ActNorm(12, data_dependent=False)
    assert torch.equal(norm(images())[0], images()) and norm.initialized


def test_a_constant_channel_and_a_single_vector_keep_scale_1():
    x = images()
    x[:, 3] = 7.0
    norm, alone = ActNorm(12), ActNorm(12)
    norm(x)
    assert norm.log_scale[3] == 0 and norm.shift[3] == -7
    y, _ = alone(torch.ones(1, 12))
    assert not alone.log_scale.any() and not y.any()


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_twins_remember(twin_of, trained):
    norm = ActNorm(12)
    if trained:
        norm(images())
    twin = twin_of(norm)
    assert torch.equal(twin(images(2))[0], norm(images(2))[0])


def test_a_state_dict_remembers():
    norm, other = ActNorm(12), ActNorm(12)
    norm(images())
    other.load_state_dict(norm.state_dict())
    assert torch.equal(other(images(2))[0], norm(images(2))[0])
    other.load_state_dict(ActNorm(12).state_dict())  # and forgets
    assert (other(images(3))[0].movedim(1, 0).flatten(1).mean(1)).abs().max() <= 1e-5


def test_the_buffer_is_asked_once():
    """After the first call nothing is read back from the device, which a number out of a tensor would be."""
    norm, other = ActNorm(12), ActNorm(12)
    norm(images())
    other.load_state_dict(norm.state_dict())
    for module, expected in ((norm, 0), (other, 1), (other, 0)):
        with torch.profiler.profile() as profile:
            module(images())
        found = {event.key: event.count for event in profile.key_averages()}
        assert found.get("aten::_local_scalar_dense", 0) == expected


def test_gradients_reach_the_parameters():
    norm = ActNorm(12)
    y, log_det = norm(images())
    (y.square().sum() + log_det.sum()).backward()
    assert norm.log_scale.grad.abs().min() > 0 and norm.shift.grad is not None


def test_on_the_meta_device_and_in_print():
    meta = ActNorm(12, device="meta")
    assert meta(images().to("meta"))[0].shape == images().shape and repr(meta) == "ActNorm(12)"
    norm = ActNorm(12)
    norm(images())
    loaded = ActNorm(12, device="meta").to_empty(device="cpu")
    loaded.load_state_dict(norm.state_dict())
    assert torch.equal(loaded(images(2))[0], norm(images(2))[0])


def test_compiled_after_the_first_batch():
    torch._dynamo.reset()
    norm = ActNorm(12)
    norm(images())
    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images(2))[0], norm(images(2))[0])


def test_it_is_nflows():
    nflows = pytest.importorskip("nflows.transforms")
    ours, theirs = ActNorm(12), nflows.ActNorm(12)
    for seed in (1, 2):
        for a, b in zip(ours(images(seed)), theirs(images(seed)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    ours.load_state_dict(theirs.state_dict())
    for a, b in zip(ours.inverse(images(3)), theirs.inverse(images(3)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def rank(index: int, store: str, results: mp.Queue) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=index, world_size=2)
    norm = ActNorm(12)
    norm(images(n=6)[4 * index : 4 + 2 * index])  # four samples and two
    results.put((norm.log_scale.tolist(), norm.shift.tolist()))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_ranks_agree(tmp_path):
    """Batches of different sizes on two ranks initialise both as one batch of all would."""
    context = mp.get_context("spawn")
    results = context.Queue()
    workers = [context.Process(target=rank, args=(i, str(tmp_path / "store"), results)) for i in range(2)]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join()
    together = ActNorm(12)
    together(images(n=6))
    for log_scale, shift in found:
        torch.testing.assert_close(torch.tensor(log_scale), together.log_scale.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.tensor(shift), together.shift.detach(), rtol=1e-5, atol=1e-5)
