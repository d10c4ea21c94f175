"""`FlowJob`: levels of images and rows in the units of a table, as the model's own `sample` draws them; settings; refusals."""

import json

import numpy as np
import pytest
import torch

from fastgen.data import from_unit_interval
from fastgen.jobs import FlowJob
from fastgen.jobs.job import settings_of, to_uint8
from fastgen.models import MAF, Glow, NeuralSplineFlow, find_weights

LABELS = torch.arange(7) % 10


@pytest.fixture
def glow():
    return Glow.load(find_weights("digits-glow"), dtype=torch.float32)


@pytest.fixture
def spline():
    return NeuralSplineFlow.load(find_weights("diabetes-spline"), dtype=torch.float32)


def test_images_are_levels(glow):
    job = FlowJob(glow, 7, temperature=0.7, levels=17, labels=LABELS, seed=20, shard_size=3)
    drawn = job.draw(job.shard(2))
    x = glow.sample(1, LABELS[6:], seeds=[26], temperature=0.7)
    assert np.array_equal(drawn.data, to_uint8(from_unit_interval(x, 17)))
    assert drawn.labels.tolist() == [6] and job.shape == (1, 8, 8)


def test_rows_are_in_units(spline):
    mean, scale = [float(k) for k in range(9)], [2.0**k for k in range(9)]
    rows = spline.sample(5, seeds=range(5))
    for units, expected in (
        ({}, rows),
        ({"scale": scale}, rows * torch.tensor(scale)),
        ({"mean": mean, "scale": scale}, rows.double() * torch.tensor(scale) + torch.tensor(mean)),
    ):
        drawn = FlowJob(spline, 5, **units).draw(FlowJob(spline, 5).shard(0))
        assert drawn.data.dtype == np.float32 and drawn.labels is None
        np.testing.assert_allclose(drawn.data, expected, rtol=1e-6)


def test_settings_tell_jobs_apart(glow, spline):
    ones, twos = [1.0] * 9, [2.0] * 9
    jobs = [
        *(FlowJob(spline, 5, **options) for options in ({}, {"mean": ones}, {"scale": ones}, {"scale": twos})),
        *(FlowJob(glow, 7, labels=LABELS, **options) for options in ({}, {"levels": 17}, {"temperature": 0.5})),
    ]
    assert len({json.dumps(settings_of(job)) for job in jobs}) == 7


def test_refusals(glow, spline):
    for model, options, message in (
        (glow, {}, "labels are needed, nothing is drawn without one of 10 classes"),
        (glow, {"labels": LABELS, "levels": 1}, "levels must be an integer of at least 2, got 1"),
        (glow, {"labels": LABELS, "mean": [0.0]}, r"mean must be of \[1, 8, 8\] numbers, got 1"),
        (spline, {"labels": LABELS}, "labels must be None for a model without classes"),
        (spline, {"temperature": -1}, "temperature must be finite and not negative, got -1"),
        (spline, {"scale": [1.0]}, r"scale must be of \[9\] numbers, got 1"),
        (MAF(4, context_features=2).eval(), {}, "model must take no context"),
    ):
        with pytest.raises(ValueError, match=message):
            FlowJob(model, 7, **options)
