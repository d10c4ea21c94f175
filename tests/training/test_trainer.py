"""`Trainer`: its step is algorithm 1 of Ho et al. 2020 as plain torch says it, and the loss falls."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F

from fastgen.models import UNet
from fastgen.ops import philox_normal
from fastgen.samplers import squared_cosine_betas, vlb_table
from fastgen.training import Trainer, TrainingOptions

from .tiny import CONFIG, data, make_model, make_trainer, state


def target_of(kind, images, noise, alpha, sigma):
    return {"epsilon": noise, "sample": images, "v_prediction": alpha * noise - sigma * images}[kind]


def plain_losses(model, options, images, labels, steps):
    """The losses of a training written out in plain torch, operation by operation."""
    generator = torch.Generator().manual_seed(options.seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=options.lr)
    alpha_bar = torch.cumprod(1 - squared_cosine_betas(options.timesteps), 0)
    losses = []
    for step in range(steps):
        chosen = torch.randint(len(images), (options.batch_size,), generator=generator)
        timesteps = torch.randint(options.timesteps, (options.batch_size,), generator=generator)
        x0 = images[chosen]
        seeds = torch.randint(2**63 - 1, (options.batch_size,), generator=generator)
        noise = philox_normal(seeds, x0.shape, dtype=x0.dtype)
        dropped = torch.rand(options.batch_size, generator=generator) < options.label_dropout
        y = torch.where(dropped, model.null_label, labels[chosen])
        bar = alpha_bar[timesteps][:, None, None, None]
        alpha, sigma = bar.sqrt().to(x0.dtype), (1 - bar).sqrt().to(x0.dtype)
        target = target_of(options.prediction_type, x0, noise, alpha, sigma)
        loss = F.mse_loss(model(alpha * x0 + sigma * noise, timesteps, y), target)
        for group in optimizer.param_groups:
            group["lr"] = options.lr * min(1.0, (step + 1) / max(1, options.warmup))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_the_losses_are_those_of_plain_torch(kind):
    images, labels = data()
    options = TrainingOptions(batch_size=8, lr=5e-3, warmup=4, label_dropout=0.5, prediction_type=kind, seed=3)
    model = make_model(torch.float64, dropout=0.0)
    expected = plain_losses(copy.deepcopy(model), options, images.double(), labels, 12)
    trainer = Trainer(model, options, images.double(), labels)
    # in float64 rounding has no part in it; float32 is the test below
    torch.testing.assert_close([trainer.train_step() for _ in range(12)], expected, rtol=1e-9, atol=0)
    assert max(expected) / min(expected) > 1.1  # the weights took part


def test_the_first_losses_in_float32_are_those_of_plain_torch_to_rounding():
    images, labels = data()
    options = TrainingOptions(batch_size=16, lr=1e-2, warmup=0)
    model = make_model(dropout=0.0)
    expected = plain_losses(copy.deepcopy(model), options, images, labels, 4)
    trainer = Trainer(model, options, images, labels)
    # the sums of 1,024 squares, and the weights of the steps before: some hundred roundings of 6e-8
    torch.testing.assert_close([trainer.train_step() for _ in range(4)], expected, rtol=1e-4, atol=0)


def test_the_rate_falls_to_nothing_at_the_last_step():
    trainer = make_trainer(warmup=2, lr_decay_steps=6)
    weights = []
    for _ in range(8):
        trainer.train_step()
        weights.append(trainer.model.out_conv.weight.detach().clone())
    rates = [(after - before).abs().max() for before, after in itertools.pairwise(weights)]
    assert rates[1] > rates[3] > rates[4] > 0 and rates[5] == rates[6] == 0


def test_autocast_computes_in_bfloat16_and_trains_float32_weights():
    plain, cast = make_trainer({"dropout": 0.0}, lr=5e-3), make_trainer({"dropout": 0.0}, lr=5e-3, autocast=True)
    dtypes = []
    for trainer in (plain, cast):
        trainer.model.out_conv.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    losses = [[trainer.train_step() for _ in range(4)] for trainer in (plain, cast)]
    assert set(dtypes[:4]) == {torch.float32} and set(dtypes[4:]) == {torch.bfloat16}
    assert losses[0] != losses[1]
    torch.testing.assert_close(losses[0], losses[1], rtol=0.02, atol=0)
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in cast.model.parameters())


def test_weights_in_half_the_bits_are_the_average_rounded(tmp_path):
    trainer = make_trainer()
    trainer.fit(2)
    trainer.save_weights(tmp_path / "w.safetensors", dtype=torch.float16)
    half, single = UNet.load(tmp_path / "w.safetensors"), UNet.load(tmp_path / "w.safetensors", dtype=torch.float32)
    for name, average in trainer.ema.model.state_dict().items():
        assert average.dtype == single.state_dict()[name].dtype == torch.float32
        assert torch.equal(half.state_dict()[name], average.half())
        assert torch.equal(single.state_dict()[name], average.half().float())
    with torch.no_grad():
        trainer.ema.model.out_conv.bias.fill_(1e5)
    with pytest.raises(FloatingPointError, match=r"out_conv\.bias is not finite at step 2 and was not saved"):
        trainer.save_weights(tmp_path / "large.safetensors", dtype=torch.float16)
    assert not (tmp_path / "large.safetensors").exists()


def test_dropped_labels_are_the_null_class():
    trainer = make_trainer(label_dropout=0.5, batch_size=64)
    batch = trainer.draw_batch()
    dropped = batch.labels == 3
    assert 10 < dropped.sum() < 54 and batch.images.shape == batch.noise.shape == (64, 1, 8, 8)
    assert (make_trainer(label_dropout=0.0).draw_batch().labels < 3).all()


def test_the_loss_falls():
    trainer = make_trainer(batch_size=16, warmup=5, lr=5e-3)
    losses = [trainer.train_step() for _ in range(60)]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


def test_the_seed_decides():
    states = []
    for seed in (3, 3, 4):
        trainer = make_trainer(seed=seed)
        trainer.fit(3)
        states.append(state(trainer))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["model.out_conv.weight"], states[2]["model.out_conv.weight"])


def test_the_average_follows_the_model():
    trainer = make_trainer(lr=1e-2, warmup=0)
    start = trainer.model.out_conv.bias.detach().clone()
    trainer.train_step()
    after = trainer.model.out_conv.bias.detach()
    torch.testing.assert_close(trainer.ema.model.out_conv.bias, start + (after - start) * (1 - 2 / 11))


def test_without_classes():
    images, _ = data()
    trainer = Trainer(make_model(num_classes=None, null_class=False), TrainingOptions(batch_size=4), images)
    trainer.fit(2)
    assert trainer.draw_batch().labels is None


def test_a_learned_variance_is_trained_by_the_hybrid_loss():
    trainer = make_trainer({"learn_sigma": True, "dropout": 0.0}, lr=1e-2, warmup=0, timesteps=100)
    batch = trainer.draw_batch()
    with torch.no_grad():
        simple = batch.noise.square().mean()  # the model begins by predicting nothing
        # v = 0, half way between the two log variances; KL of equal means, or a likelihood at t = 0, in bits
        assert (batch.timesteps > 0).all()
        half = vlb_table(torch.cumprod(1 - squared_cosine_betas(100), 0))[batch.timesteps]
        width = half[:, 2] / 2
        mean = (half[:, 0] * half[:, 1])[:, None, None, None] * _error_of_nothing(trainer, batch)
        kl = (
            0.5 * (width + torch.exp(-width) - 1)[:, None, None, None]
            + 0.5 * mean**2 * torch.exp(-width)[:, None, None, None]
        )
        expected = simple + 0.1 * kl.mean() / torch.log(torch.tensor(2.0))
    torch.testing.assert_close(trainer.loss(batch), expected.float(), rtol=1e-4, atol=0)
    before = trainer.model.out_conv.bias.detach().clone()
    trainer.train_step()
    assert (trainer.model.out_conv.bias != before).all()


def _error_of_nothing(trainer, batch):
    """What is predicted for x0 where the noise is taken for 0, less x0."""
    bar = torch.cumprod(1 - squared_cosine_betas(100), 0)[batch.timesteps][:, None, None, None]
    return (1 - bar).sqrt() / bar.sqrt() * batch.noise


def test_a_loss_that_is_not_finite_stops_before_the_weights_are_touched():
    trainer = make_trainer(lr=1e-2, warmup=0)
    trainer.fit(1)
    trainer.images[:] = torch.nan
    before = state(trainer)
    with pytest.raises(FloatingPointError, match="the loss is nan at step 1: try a smaller learning rate"):
        trainer.fit(3)
    after = state(trainer)
    assert all(torch.equal(before[name], after[name]) for name in before if not name.startswith("random."))
    assert trainer.step == 1


def test_weights_that_are_not_finite_are_not_written_over_good_ones(tmp_path):
    trainer = make_trainer()
    trainer.save(tmp_path / "c.safetensors")
    trainer.save_weights(tmp_path / "w.safetensors")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with torch.no_grad():
        trainer.ema.model.out_conv.bias.fill_(torch.inf)
    for write, name in ((trainer.save, "c.safetensors"), (trainer.save_weights, "w.safetensors")):
        with pytest.raises(FloatingPointError, match=r"out_conv\.bias is not finite at step 0 and was not saved"):
            write(tmp_path / name)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        ({}, {"images": torch.zeros(20, 8, 8)}, r"images must be \[M, 1, H, W\], got shape \(20, 8, 8\)"),
        ({}, {"images": torch.zeros(20, 3, 8, 8)}, r"images must be \[M, 1, H, W\], got shape \(20, 3, 8, 8\)"),
        ({}, {"images": torch.zeros(0, 1, 8, 8), "labels": torch.zeros(0).long()}, r"images must be \[M, 1, H, W\]"),
        ({}, {"labels": torch.zeros(19).long()}, r"labels must be \[M\] = \[20\] int64, got shape \(19,\)"),
        ({}, {"labels": torch.zeros(20)}, r"labels must be \[M\] = \[20\] int64, got .* of torch.float32"),
        ({}, {"labels": torch.full((20,), 3)}, r"labels must be in \[0, 3\), got 3 to 3"),
        ({"null_class": False}, {}, r"label_dropout=0\.1 needs a model with null_class=True"),
        ({"null_class": False}, {"labels": None}, "labels are needed, the model has 3 classes and no null class"),
        ({"num_classes": None, "null_class": False}, {}, "labels must be None for a model without classes"),
    ],
)
def test_data_that_does_not_fit(config, change, message):
    images, labels = data()
    arguments = {"images": images, "labels": labels, **change}
    with pytest.raises(ValueError, match=rf"Trainer: {message}"):
        Trainer(UNet.from_config({**CONFIG, **config}), TrainingOptions(), **arguments)
