"""`TarFlowJob`: images as the model's own `sample` draws them, guided and without noise; settings; refusals."""

import json

import numpy as np
import pytest
import torch

from fastgen.flows import Guidance
from fastgen.jobs import TarFlowJob
from fastgen.jobs.job import settings_of, to_uint8
from fastgen.models import TarFlow

LABELS = torch.arange(7) % 3


def tarflow(num_classes=3):
    """With small random weights: of large ones the inverse explodes."""
    torch.manual_seed(0)
    model = TarFlow(1, 8, 4, 16, num_blocks=2, layers_per_block=1, num_classes=num_classes, head_channels=8)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model.eval()


def test_images_are_those_of_the_model():
    model = tarflow()
    job = TarFlowJob(model, 7, temperature=0.9, guidance_scale=2.5, noise_std=0.1, labels=LABELS, seed=20, shard_size=3)
    drawn = job.draw(job.shard(1))
    x = model.sample(3, LABELS[3:6], seeds=[23, 24, 25], temperature=0.9, guidance=Guidance(1.5), noise_std=0.1)
    assert np.array_equal(drawn.data, to_uint8(x)) and drawn.labels.tolist() == [0, 1, 2] and job.shape == (1, 8, 8)
    plain = TarFlowJob(model, 7, seed=20, labels=LABELS)
    assert np.array_equal(plain.draw(plain.shard(0)).data, to_uint8(model.sample(7, LABELS, seeds=range(20, 27))))


def test_without_classes():
    model = tarflow(num_classes=None)
    job = TarFlowJob(model, 2)
    assert np.array_equal(job.draw(job.shard(0)).data, to_uint8(model.sample(2, seeds=range(2))))


def test_settings_tell_jobs_apart():
    model = tarflow()
    options = ({}, {"temperature": 0.5}, {"guidance_scale": 2.0}, {"noise_std": 0.1})
    assert len({json.dumps(settings_of(TarFlowJob(model, 7, labels=LABELS, **each))) for each in options}) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature must be finite and at least 0, got -1.0"),
        ({"noise_std": float("inf")}, "noise_std must be finite and at least 0, got inf"),
        ({"guidance_scale": 0.5, "labels": LABELS}, "guidance_scale must be finite and at least 1, got 0.5"),
        ({"guidance_scale": 2.0}, "guidance_scale must be 1 without labels, got 2.0"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=f"^TarFlowJob: {message}$"):
        TarFlowJob(tarflow(), 7, **options)
