"""The trainer on a CUDA device: the batches of the CPU, the same losses to rounding, and an exact resume."""

import pytest
import torch

from fastgen.training import Trainer, TrainingOptions

from ..backends import requires_cuda
from ..training.tiny import data, make_model, state

pytestmark = [pytest.mark.gpu, requires_cuda]


def trainer_on(device, dropout=0.0):
    images, labels = data()
    model = make_model(dropout=dropout)
    return Trainer(model, TrainingOptions(batch_size=8, lr=5e-3, warmup=0), images, labels, device=device)


def test_the_losses_are_those_of_the_cpu():
    ours, theirs = trainer_on("cuda"), trainer_on("cpu")
    torch.testing.assert_close(ours.draw_batch().noise.cpu(), theirs.draw_batch().noise, rtol=1e-5, atol=1e-6)
    losses = [[trainer.train_step() for _ in range(3)] for trainer in (ours, theirs)]
    torch.testing.assert_close(*losses, rtol=1e-2, atol=0)  # convolutions in TF32


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    whole, first, second = (trainer_on("cuda", dropout=0.5) for _ in range(3))
    torch.cuda.manual_seed(0)
    whole.fit(4)
    torch.cuda.manual_seed(0)
    first.fit(2)
    first.save(tmp_path / "c.safetensors")
    torch.cuda.manual_seed(1)
    second.restore(tmp_path / "c.safetensors")
    second.fit(4)
    ours, theirs = state(second), state(whole)
    for name in theirs:
        if not name.startswith("random."):  # the backward of an embedding and of convolutions may add in another order
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-4)
    assert torch.equal(ours["random.cuda"], theirs["random.cuda"])
