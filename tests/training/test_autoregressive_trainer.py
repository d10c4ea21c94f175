"""`AutoregressiveTrainer`: its steps are plain Adam on bits a dimension, exact to resume, and it learns."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from fastgen.models import CheckpointError, GatedPixelCNN, PixelCNNPlusPlus
from fastgen.training import (
    AutoregressiveOptions,
    AutoregressiveTrainer,
    CheckpointEvery,
    TrainingOptions,
    begin_with_frequencies,
    mean_bits_per_dim,
)

from .tiny import data, make_trainer, state

LEVELS = 5


def examples(m=20):
    """The blobs of :func:`data` in five levels."""
    images, labels = data(m)
    return ((images.clamp(-1, 1) + 1) * 2).round() / 2 - 1, labels


def make_model(**config):
    torch.manual_seed(0)
    return GatedPixelCNN(1, 6, **{"dilations": [1, 2], "levels": LEVELS, "num_classes": 3, **config})


def make_autoregressive(dtype=torch.float32, model=None, **options):
    images, labels = examples()
    model = make_model() if model is None else model
    return AutoregressiveTrainer(
        model.to(dtype), AutoregressiveOptions(**{"batch_size": 4, **options}), images.to(dtype), labels
    )


def plain_losses(model, options, images, labels, steps):
    """The losses of a training written out in plain torch."""
    generator = torch.Generator().manual_seed(options.seed)
    optimizer = torch.optim.Adam(model.parameters())
    losses = []
    for step in range(steps):
        chosen = torch.randint(len(images), (options.batch_size,), generator=generator)
        logits = model(images[chosen], labels[chosen])
        levels = ((images[chosen] + 1) * (LEVELS - 1) / 2).round().long()
        loss = F.cross_entropy(logits, levels) / math.log(2)
        optimizer.param_groups[0]["lr"] = options.learning_rate(step)
        optimizer.zero_grad()
        loss.backward()
        norm = sum(p.grad.square().sum() for p in model.parameters()).sqrt()
        for parameter in model.parameters():
            parameter.grad *= min(1.0, options.clip_norm / (norm.item() + 1e-6))
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("clip_norm", [0.1, 10.0])
def test_the_losses_are_those_of_plain_torch(clip_norm):
    images, labels = examples()
    options = AutoregressiveOptions(batch_size=6, lr=1e-2, warmup=3, lr_decay_steps=9, seed=3, clip_norm=clip_norm)
    model = make_model().double()
    expected = plain_losses(copy.deepcopy(model), options, images.double(), labels, 10)
    trainer = AutoregressiveTrainer(model, options, images.double(), labels)
    torch.testing.assert_close([trainer.train_step() for _ in range(10)], expected, rtol=1e-9, atol=0)
    assert max(expected) / min(expected) > 1.1  # the weights took part


def test_it_learns_and_the_average_follows():
    trainer = make_autoregressive(lr=1e-2, warmup=0, batch_size=8, ema_decay=0.9)
    before = mean_bits_per_dim(trainer.ema.model, trainer.images, trainer.labels)
    trainer.fit(60)
    after = mean_bits_per_dim(trainer.ema.model, trainer.images, trainer.labels)
    assert after < 0.7 * before
    wrong = mean_bits_per_dim(trainer.ema.model, trainer.images, (trainer.labels + 1) % 3)
    assert wrong > after


def test_a_mixture_learns_too():
    torch.manual_seed(0)
    model = PixelCNNPlusPlus(1, 4, num_resnet=1, mixtures=2, levels=LEVELS, num_classes=3)
    trainer = make_autoregressive(model=model, lr=1e-2, warmup=0)
    losses = [trainer.train_step() for _ in range(40)]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


@pytest.mark.parametrize("split", [0, 2])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, split):
    """Dropout, of the mixture model, is part of it."""

    def make():
        torch.manual_seed(0)
        return make_autoregressive(model=PixelCNNPlusPlus(1, 4, num_resnet=1, mixtures=2, levels=LEVELS, num_classes=3))

    whole = make()
    whole.fit(4)
    make_and_stop = make()
    make_and_stop.fit(split, [CheckpointEvery(tmp_path / "c.safetensors", 100)])
    second = make()
    torch.manual_seed(1234)  # it must not depend on what this process drew in between
    second.restore(tmp_path / "c.safetensors")
    assert second.step == split
    second.fit(4)
    ours, theirs = state(second), state(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_checkpoint_of_another_training(tmp_path):
    make_trainer().save(tmp_path / "diffusion")
    with pytest.raises(CheckpointError, match="'options' in the metadata has"):
        make_autoregressive().restore(tmp_path / "diffusion")
    make_autoregressive().save(tmp_path / "c")
    with pytest.raises(CheckpointError, match=r"made with clip_norm=1\.0, this run has 2\.0"):
        make_autoregressive(clip_norm=2.0).restore(tmp_path / "c")
    with pytest.raises(CheckpointError, match="made with dilations="):
        make_autoregressive(model=make_model(dilations=[1, 1])).restore(tmp_path / "c")


def test_it_begins_with_the_frequencies_of_the_levels():
    images, _ = examples()
    model = make_model()
    begin_with_frequencies(model, images)
    counts = torch.bincount(model.indices(images).flatten(), minlength=LEVELS).double() + 1
    shares = model.out.bias.double().softmax(0)
    assert (shares - counts / counts.sum()).abs().max() <= 1e-6
    two = GatedPixelCNN(2, 6, dilations=[1], levels=LEVELS)
    begin_with_frequencies(two, images.expand(-1, 2, -1, -1))
    assert torch.equal(two.out.bias.view(LEVELS, 2)[:, 0], two.out.bias.view(LEVELS, 2)[:, 1])


def test_the_mean_does_not_depend_on_the_batch_size():
    images, labels = examples(7)
    model = make_model().double().eval()
    expected = model.bits_per_dim(images.double(), labels).mean().item()
    for size in (1, 3, 7, 100):
        assert mean_bits_per_dim(model, images.double(), labels, size) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("config", "images", "labels", "message"),
    [
        ({}, (0, 1, 8, 8), [], r"images must be \[M, 1, H, W\], got shape \(0, 1, 8, 8\)"),
        ({}, (2, 2, 8, 8), [0, 1], r"images must be \[M, 1, H, W\], got shape \(2, 2, 8, 8\)"),
        ({}, (2, 1, 8, 8), None, "labels must be given for a model with num_classes=3"),
        ({"num_classes": None}, (2, 1, 8, 8), [0, 1], "labels must be None for a model with num_classes=None"),
        ({}, (2, 1, 8, 8), [0, 3], r"labels must be in \[0, 3\), got 0 to 3"),
        ({}, (2, 1, 8, 8), [0], r"labels must be \[M\] = \[2\] int64, got shape \(1,\)"),
        ({"condition_channels": 2}, (2, 1, 8, 8), [0, 1], "the model must need no map, got condition_channels=2"),
    ],
)
def test_what_does_not_fit(config, images, labels, message):
    labels = None if labels is None else torch.tensor(labels, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"AutoregressiveTrainer: {message}"):
        AutoregressiveTrainer(make_model(**config), AutoregressiveOptions(), torch.zeros(images), labels)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"clip_norm": -1.0}, ValueError, "clip_norm must be finite and not negative, got -1.0"),
        ({"clip_norm": math.inf}, ValueError, "clip_norm must be finite and not negative, got inf"),
        ({"clip_norm": "1"}, TypeError, "clip_norm must be a number, got '1'"),
        ({"ema_decay": 1}, ValueError, r"ema_decay must be in \[0, 1\), got 1"),
        ({"batch_size": 0}, ValueError, "batch_size must be an integer of at least 1"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        AutoregressiveOptions(**options)
    assert not hasattr(AutoregressiveOptions(), "timesteps") and not hasattr(TrainingOptions(), "clip_norm")
