"""`FlowTrainer`: its steps are plain Adam on bits a dimension or nats, exact to resume, and it learns."""

import copy
import math

import pytest
import torch

from fastgen.flows import dequantize
from fastgen.models import CheckpointError, Glow, RealNVP
from fastgen.training import (
    CheckpointEvery,
    FlowOptions,
    FlowTrainer,
    TrainingRecord,
    begin_with_statistics,
    mean_score,
)

from .tiny import data, make_trainer, state

LEVELS = 5


def images(m=20):
    """The blobs of :func:`data` in five levels."""
    blobs, labels = data(m)
    return ((blobs.clamp(-1, 1) + 1) * 2).round() / 2 - 1, labels


def rows(m=64):
    """Four columns, two of which hang together."""
    x = torch.randn(m, 4, generator=torch.Generator().manual_seed(0))
    return torch.cat([x[:, :2], x[:, :2].square() + 0.1 * x[:, 2:]], 1)


def make_glow(dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = Glow(1, 8, num_levels=2, num_steps=1, hidden_channels=6, num_classes=3).to(dtype)
    x, labels = images()
    x = x.to(dtype)
    begin_with_statistics(model, x, labels, levels=LEVELS)
    return FlowTrainer(model, FlowOptions(**{"batch_size": 4, "levels": LEVELS, **options}), x, labels)


def make_rows(dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = RealNVP(4, num_couplings=3, hidden_features=12, num_blocks=1).to(dtype)
    begin_with_statistics(model, rows().to(dtype))
    return FlowTrainer(model, FlowOptions(**{"batch_size": 16, **options}), rows().to(dtype))


def plain_losses(trainer, steps):
    """The losses of the trainer's training written out in plain torch."""
    options, model = trainer.options, copy.deepcopy(trainer.model)
    generator = torch.Generator().manual_seed(options.seed)
    optimizer = torch.optim.Adam(model.parameters())
    losses = []
    for step in range(steps):
        chosen = torch.randint(len(trainer.images), (options.batch_size,), generator=generator)
        x, loss = trainer.images[chosen], 0.0
        if options.levels:
            seeds = torch.randint(2**63 - 1, (options.batch_size,), generator=generator)
            x = dequantize(((x + 1) * (LEVELS - 1) / 2).round(), LEVELS, seeds=seeds, dtype=x.dtype)
            nats = model.log_prob(x, trainer.labels[chosen])
            loss = -nats.mean() / (64 * math.log(2)) + math.log2(LEVELS)
        else:
            loss = -model.log_prob(x).mean()
        optimizer.param_groups[0]["lr"] = options.learning_rate(step)
        optimizer.zero_grad()
        loss.backward()
        norm = sum(p.grad.square().sum() for p in model.parameters()).sqrt()
        for parameter in model.parameters():
            parameter.grad *= min(1.0, options.clip_norm / (norm.item() + 1e-6))
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("make", [make_glow, make_rows])
@pytest.mark.parametrize("clip_norm", [0.05, 100.0])
def test_the_losses_are_those_of_plain_torch(make, clip_norm):
    trainer = make(torch.float64, lr=1e-2, warmup=3, lr_decay_steps=9, seed=3, clip_norm=clip_norm)
    expected = plain_losses(trainer, 10)
    torch.testing.assert_close([trainer.train_step() for _ in range(10)], expected, rtol=1e-9, atol=0)
    assert max(expected) / min(expected) > 1.01  # the weights took part


@pytest.mark.parametrize(("make", "gained"), [(make_glow, 0.3), (make_rows, 1.0)])
def test_it_learns_and_the_average_follows(make, gained):
    trainer = make(lr=1e-2, warmup=0, ema_decay=0.9)
    options = {"levels": trainer.options.levels}
    before = mean_score(trainer.ema.model, trainer.images, trainer.labels, **options)
    trainer.fit(80)
    after = mean_score(trainer.ema.model, trainer.images, trainer.labels, **options)
    assert after < before - gained
    if trainer.labels is not None:
        assert mean_score(trainer.ema.model, trainer.images, (trainer.labels + 1) % 3, **options) > after


@pytest.mark.parametrize("make", [make_glow, make_rows])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, make):
    whole = make()
    whole.fit(4)
    stopped = make()
    stopped.fit(2, [CheckpointEvery(tmp_path / "c.safetensors", 100)])
    second = make()
    second.restore(tmp_path / "c.safetensors")
    assert second.step == 2
    second.fit(4)
    ours, theirs = state(second), state(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_checkpoint_of_another_training(tmp_path):
    make_trainer().save(tmp_path / "diffusion")
    with pytest.raises(CheckpointError, match="'options' in the metadata has"):
        make_glow().restore(tmp_path / "diffusion")
    make_glow().save(tmp_path / "c")
    with pytest.raises(CheckpointError, match="made with levels=5, this run has 4"):
        make_glow(levels=4).restore(tmp_path / "c")


def test_what_the_weights_say_of_the_training(tmp_path):
    trainer = make_glow()
    trainer.save_weights(tmp_path / "w", "blobs")
    record = TrainingRecord.read(tmp_path / "w")
    assert (record.recipe, record.image_shape, record.levels) == ("blobs", (1, 8, 8), LEVELS)
    make_rows().save_weights(
        tmp_path / "r", "rows", more={"columns": list("abcd"), "mean": [0.0] * 4, "scale": [1] * 4}
    )
    record = TrainingRecord.read(tmp_path / "r")
    assert (record.image_shape, record.levels, record.columns) == (None, None, ("a", "b", "c", "d"))
    assert record.mean == (0.0,) * 4 and record.scale == (1,) * 4


def test_it_begins_with_the_statistics_of_the_data():
    trainer = make_rows(torch.float64)
    first = trainer.model.transform.transforms[0]
    x = first(trainer.images)[0]
    assert x.mean(0).abs().max() <= 1e-5 and (x.std(0) - 1).abs().max() <= 1e-5
    for ours, average in zip(trainer.model.parameters(), trainer.ema.model.parameters(), strict=True):
        assert torch.equal(ours, average)
    scale = first.log_scale.clone()
    trainer.loss(trainer.draw_batch())
    assert torch.equal(first.log_scale, scale)  # once


def test_the_mean_does_not_depend_on_the_batch_size():
    trainer = make_glow(torch.float64)
    model, x, labels = trainer.model.eval(), trainer.images[:7], trainer.labels[:7]
    for draws in (1, 2):
        seeds = [range(draw * 7, draw * 7 + 7) for draw in range(draws)]
        noisy = [dequantize(((x + 1) * 2).round(), LEVELS, seeds=s, dtype=x.dtype) for s in seeds]
        expected = torch.stack([model.bits_per_dim(y, labels, levels=LEVELS) for y in noisy]).mean().item()
        for size in (1, 3, 100):
            score = mean_score(model, x, labels, levels=LEVELS, draws=draws, batch_size=size)
            assert score == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("levels", "shape", "labels", "message"),
    [
        (5, (0, 1, 8, 8), [], r"data must be images \[M, C, H, W\] with levels=5, got shape \(0, 1, 8, 8\)"),
        (5, (2, 64), [0, 1], r"data must be images \[M, C, H, W\] with levels=5, got shape \(2, 64\)"),
        (None, (2, 1, 8, 8), [0, 1], r"data must be rows \[M, D\] with levels=None, got shape \(2, 1, 8, 8\)"),
        (5, (2, 1, 8, 6), [0, 1], r"data must be \[M, 1, 8, 8\], got shape \(2, 1, 8, 6\)"),
        (5, (2, 1, 8, 8), None, "labels must be given for a model with num_classes=3"),
        (5, (2, 1, 8, 8), [0, 3], r"labels must be in \[0, 3\), got 0 to 3"),
    ],
)
def test_what_does_not_fit(levels, shape, labels, message):
    labels = None if labels is None else torch.tensor(labels, dtype=torch.int64)
    model = Glow(1, 8, num_levels=2, num_steps=1, hidden_channels=6, num_classes=3)
    with pytest.raises(ValueError, match=f"FlowTrainer: {message}"):
        FlowTrainer(model, FlowOptions(levels=levels), torch.zeros(shape), labels)


def test_labels_that_a_model_has_no_use_for():
    with pytest.raises(ValueError, match="labels must be None for a model with num_classes=None"):
        FlowTrainer(RealNVP(4), FlowOptions(), rows(8), torch.zeros(8, dtype=torch.int64))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"levels": 1}, ValueError, "levels must be None or at least 2, got 1"),
        ({"levels": 2.5}, TypeError, r"levels must be an integer, got 2\.5"),
        ({"clip_norm": -1.0}, ValueError, r"clip_norm must be finite and not negative, got -1\.0"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        FlowOptions(**options)
