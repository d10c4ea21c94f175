"""`EMA`: the formula, against its own sum."""

import torch
from torch import nn

from fastgen.training import EMA


def test_it_is_the_weighted_sum_of_what_it_has_seen():
    model = nn.Linear(3, 2, dtype=torch.float64)
    average = EMA(model, 0.9)
    expected = model.weight.detach().clone()
    for step in range(1, 200):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(step)))
        average.update(model, step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach()
    torch.testing.assert_close(average.model.weight, expected, rtol=1e-12, atol=1e-12)
    assert not average.model.weight.requires_grad and not average.model.training and model.training


def test_early_steps_follow_faster_and_zero_decay_is_the_model():
    model = nn.Linear(3, 2)
    slow, none = EMA(model, 0.999), EMA(model, 0.0)
    before = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(1.0)
    slow.update(model, 1)
    none.update(model, 1)
    torch.testing.assert_close(slow.model.weight, before + 1 - 2 / 11)
    assert torch.equal(none.model.weight, model.weight)


def test_buffers_are_copied():
    model = nn.BatchNorm1d(3)
    average = EMA(model, 0.5)
    model(torch.randn(8, 3))
    average.update(model, 1)
    assert torch.equal(average.model.running_mean, model.running_mean) and average.model.num_batches_tracked == 1
