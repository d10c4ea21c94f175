"""`AutoregressiveJob`: the pixels of `fastgen.autoregressive.sample`, whatever the shards; settings; refusals."""

import json

import numpy as np
import pytest
import torch

from fastgen.autoregressive import sample
from fastgen.jobs import AutoregressiveJob
from fastgen.jobs.job import settings_of
from fastgen.models import GatedPixelCNN, PixelCNNPlusPlus, find_weights

LABELS = torch.arange(7) % 10


@pytest.fixture
def model():
    return GatedPixelCNN.load(find_weights("digits-pixelcnn"), dtype=torch.float32)


def job(model, **options):
    return AutoregressiveJob(model, (1, 8, 8), 7, **{"labels": LABELS, **options})


def test_pixels_do_not_depend_on_shards_and_batches(model):
    options = {"temperature": 0.8, "top_k": 5, "top_p": 0.9}
    images = sample(model, (7, 1, 8, 8), condition=LABELS, seeds=range(3, 10), **options)
    expected = ((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
    for shard_size, batch_size in ((7, 7), (3, 2)):
        made = job(model, seed=3, shard_size=shard_size, batch_size=batch_size, **options)
        shards = [made.draw(made.shard(i)) for i in range(len(made))]
        assert np.array_equal(np.concatenate([shard.data for shard in shards]), expected)
        assert np.array_equal(np.concatenate([shard.labels for shard in shards]), LABELS)


def test_settings_tell_jobs_apart(model):
    others = ({}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.5}, {"labels": LABELS.flip(0)})
    assert len({json.dumps(settings_of(job(model, **options))) for options in others}) == 5
    # the weights have the same shapes, whatever the dilations are
    other = GatedPixelCNN.from_config({**model.config, "dilations": [1, 1, 1, 1, 1]}).eval()
    assert settings_of(job(other)) != settings_of(job(model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": None}, "labels are needed, nothing is drawn without one of 10 classes"),
        ({"temperature": -1.0}, "temperature must be finite and not negative, got -1.0"),
        ({"top_k": 0}, "top_k must be an integer of at least 1, or None, got 0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], or None, got 0.0"),
    ],
)
def test_refusals(model, options, message):
    with pytest.raises(ValueError, match=message):
        job(model, **options)


def test_models_that_do_not_fit():
    with pytest.raises(ValueError, match="model must take no map"):
        job(GatedPixelCNN(channels=4, dilations=[1], levels=4, num_classes=10, condition_channels=2).eval())
    mixture = PixelCNNPlusPlus(in_channels=1, channels=2, num_resnet=1, mixtures=2, num_classes=10).eval()
    with pytest.raises(ValueError, match="top_k and top_p are not for mixtures"):
        job(mixture, top_k=3)
