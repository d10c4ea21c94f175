"""`fastgen train` on two ranks for `test_train_ranks`: stopped, killed under torchrun's restarts, refused, and undisturbed.

torchrun --max-restarts 1 -m tests.cli.train_worker FOLDER. The first start ends by the death of rank 1, the second finishes
everything; the exit status of each run is a line of FOLDER/RANK.txt.
"""

import os
import signal
import sys
from pathlib import Path

import torch

from fastgen.cli.main import main
from fastgen.training import Callback, Trainer

from ..mnist_files import write_mnist

FOLDER, RANK = Path(sys.argv[1]), int(os.environ["RANK"])
FIT = Trainer.fit


class Strike(Callback):
    """A signal to this process after step ``at``."""

    def __init__(self, at, signum):
        self.at, self.signum = at, signum

    def on_step(self, trainer, loss):
        if trainer.step == self.at:
            os.kill(os.getpid(), self.signum)


def train(name, *arguments, strike=None):
    """Eight steps, with a checkpoint every two; rank 1 is struck."""
    more = [strike] if strike and RANK == 1 else []
    Trainer.fit = lambda self, steps, callbacks: FIT(self, steps, [*callbacks, *more])
    options = ["--model-channels", "16", "--batch-size", "9", "--warmup", "2", "--dropout", "0.2", "--quiet"]
    out = FOLDER / f"{name}.safetensors"
    status = main(
        ["train", "digits-ddpm", *options, "--steps", "8", "--checkpoint-every", "2", "--out", str(out), *arguments]
    )
    said(name, status)


def said(name, status):
    with (FOLDER / f"{RANK}.txt").open("a") as file:
        print(name, status, file=file)


torch.set_num_threads(1)
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    train("stopped", strike=Strike(3, signal.SIGTERM))
    train("stopped")
    train("few", "--accumulate", "5")
    if RANK == 0:
        write_mnist(FOLDER / "data-0")
    data = FOLDER / f"data-{RANK}"  # which rank 1 has not
    said("mnist", main(["train", "mnist-ddpm", "--data", str(data), "--out", str(FOLDER / "m.safetensors")]))
    said("classifier", main(["train", "mnist-classifier", "--data", str(data)]))
    train("killed", "--resume", strike=Strike(5, signal.SIGKILL))
else:
    train("stopped", "--resume")
    train("killed", "--resume")
    train("undisturbed")
