"""The bytes of a shard do not depend on how many threads its process has, but on how many the job asks for."""

import pytest
import torch

from fastgen.jobs import AutoregressiveJob, DiffusionJob, FlowJob
from fastgen.jobs.job import Job
from fastgen.models import MAF, FlowModel, GatedPixelCNN, Glow, MultiScaleRealNVP, NeuralSplineFlow, UNet, find_weights
from fastgen.samplers import DDIM, squared_cosine_betas

# Weights, and the sizes of a batch at which some product was seen to round differently on other numbers of threads, or one size.
KINDS = {
    "digits-ddpm": (UNet, (7,)),
    "digits-glow": (Glow, (7,)),
    "digits-realnvp": (MultiScaleRealNVP, (2, 7)),
    "digits-pixelcnn": (GatedPixelCNN, (7,)),
    "breast-cancer-maf": (MAF, (7, 33)),
    "diabetes-spline": (NeuralSplineFlow, (7,)),
}


@pytest.fixture(autouse=True)
def as_before():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def job_of(name, num, threads) -> Job:
    kind, _ = KINDS[name]
    model = kind.load(find_weights(name), dtype=torch.float32)
    labels = torch.arange(num) % 10 if model.config.get("num_classes") else None
    options = {"labels": labels, "batch_size": num, "threads": threads}
    if isinstance(model, FlowModel):
        return FlowJob(model, num, **options)
    if isinstance(model, GatedPixelCNN):
        return AutoregressiveJob(model, (1, 8, 8), num, **options)
    return DiffusionJob(
        model, DDIM(betas=squared_cosine_betas()), (1, 8, 8), num, steps=4, guidance_scale=2.0, **options
    )


@pytest.mark.parametrize(("name", "num"), [(name, num) for name, (_, sizes) in KINDS.items() for num in sizes])
def test_numbers_are_equal_to_the_last_bit(name, num, monkeypatch):
    made = job_of(name, num, 1)
    unrounded = []
    draw_batch = type(made).draw_batch

    def watched(self, seeds, labels):
        assert torch.get_num_threads() == 1
        unrounded.append(draw_batch(self, seeds, labels))
        return unrounded[-1]

    monkeypatch.setattr(type(made), "draw_batch", watched)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        made.draw(made.shard(0))
        assert torch.get_num_threads() == threads
    assert all(torch.equal(unrounded[0], other) for other in unrounded[1:])


def test_threads_are_given_back_after_an_error():
    made = job_of("digits-realnvp", 2, 2)
    torch.set_num_threads(3)
    made.draw_batch = None
    with pytest.raises(TypeError):
        made.draw(made.shard(0))
    assert torch.get_num_threads() == 3


def test_that_they_are_a_setting():
    one, two = (job_of("diabetes-spline", 7, threads) for threads in (1, 2))
    assert one.settings["threads"] == 1 and two.settings["threads"] == 2
