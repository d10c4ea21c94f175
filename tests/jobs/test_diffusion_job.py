"""`DiffusionJob`: the images of `fastgen.samplers.sample`, in batches of its own; settings that tell solvers apart; refusals."""

import json

import numpy as np
import pytest
import torch

from fastgen.jobs import DiffusionJob
from fastgen.jobs.diffusion import described
from fastgen.jobs.job import settings_of
from fastgen.models import UNet
from fastgen.samplers import DDIM, SOLVERS, make_solver, sample, squared_cosine_betas

from ..modules import randomize

SHAPE = (1, 4, 4)


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = {"channel_mult": (1, 1), "num_res_blocks": 1, "attention_resolutions": (), "num_groups": 4}
    return randomize(UNet(1, 8, **config, num_classes=3, null_class=True)).eval()


def job(model, num=7, **options):
    return DiffusionJob(model, DDIM(betas=squared_cosine_betas()), SHAPE, num, **{"steps": 2, **options})


def test_images_are_those_of_the_sampler(model):
    labels = torch.tensor([2, 1, 0, 2, 1, 0, 2])
    made = job(model, seed=40, labels=labels, guidance_scale=2.0, shard_size=5, batch_size=2)
    drawn = made.draw(made.shard(1))
    expected = sample(
        model,
        (2, *SHAPE),
        DDIM(betas=squared_cosine_betas()),
        steps=2,
        seeds=[45, 46],
        classes=[0, 2],
        guidance_scale=2.0,
    )
    assert np.array_equal(drawn.data, ((expected.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1))
    assert drawn.seeds.tolist() == [45, 46] and drawn.labels.tolist() == [0, 2] and made.shape == SHAPE
    plain = job(model).draw(job(model).shard(0))
    assert plain.labels is None and plain.data.shape == (7, 4, 4, 1)


def test_settings_are_json_and_tell_jobs_apart(model):
    plain = json.dumps(settings_of(job(model)))
    others = [
        job(model, steps=3),
        job(model, threads=2),
        job(model, labels=torch.zeros(7, dtype=torch.int64)),
        job(model, labels=torch.zeros(7, dtype=torch.int64), guidance_scale=2.0),
        DiffusionJob(model, DDIM(betas=squared_cosine_betas(), eta=0.5), SHAPE, 7, steps=2),
        DiffusionJob(model, DDIM(betas=squared_cosine_betas(500)), SHAPE, 7, steps=2),
        DiffusionJob(model, make_solver("euler", betas=squared_cosine_betas()), SHAPE, 7, steps=2),
        DiffusionJob(model, DDIM(betas=squared_cosine_betas()), (1, 8, 4), 7, steps=2),
    ]
    assert len({plain, *(json.dumps(settings_of(other)) for other in others)}) == 9


@pytest.mark.parametrize("name", sorted(SOLVERS))
def test_every_solver_is_described(name):
    text = json.dumps(described(make_solver(name)), allow_nan=False)
    assert text == json.dumps(described(make_solver(name)), allow_nan=False)


def test_betas_of_another_processor_are_the_same():
    betas = squared_cosine_betas()
    nearly = betas * (1 + 1e-15)
    assert described(DDIM(betas=betas)) == described(DDIM(betas=nearly)) != described(DDIM(betas=betas * 0.999))


def test_a_function_is_named():
    solver = make_solver("sa_solver", tau=some_tau)
    assert described(solver)["tau"] == f"{__name__}.some_tau"


def some_tau(sigma):
    return 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_scale": 2.0}, "guidance_scale must be 1 without labels"),
        ({"steps": 0}, "steps must be"),
        ({"labels": torch.tensor([0, 1, 2, 3, 0, 0, 0])}, r"labels must be in \[0, 3\), got 0 to 3"),
        ({"threads": 0}, "threads must be an integer of at least 1, got 0"),
        ({"threads": True}, "threads must be an integer of at least 1, got True"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1"),
    ],
)
def test_refusals(model, options, message):
    with pytest.raises(ValueError, match=message):
        job(model, **options)


def test_models_that_do_not_fit(model):
    with pytest.raises(ValueError, match="model must be in evaluation mode"):
        job(model.train())
    config = {"channel_mult": (1,), "num_res_blocks": 1, "attention_resolutions": (), "num_groups": 4}
    with pytest.raises(ValueError, match="labels are needed, nothing is drawn without one of 3 classes"):
        job(UNet(1, 8, **config, num_classes=3).eval())
    with pytest.raises(ValueError, match="labels must be None for a model without classes"):
        job(UNet(1, 8, **config).eval(), labels=torch.zeros(7, dtype=torch.int64))
