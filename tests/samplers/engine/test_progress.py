"""The progress bar is for people: nothing is written where standard error is no terminal."""

import io

import pytest
import torch

from fastgen.samplers import sample
from fastgen.samplers.engine.progress import progress_bar
from fastgen.samplers.score import VP, reverse_sde


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def drawn(progress: bool) -> None:
    sample(lambda x, t: 0.1 * x, (1, 1, 2, 2), "ddim", steps=3, seeds=[1], progress=progress)


def solved(progress: bool) -> None:
    reverse_sde(lambda x, t: -x, VP(), (1, 2), 3, seeds=[1], progress=progress)


@pytest.mark.parametrize("draw", [drawn, solved])
@pytest.mark.parametrize(
    ("stream", "progress", "written"),
    [(Terminal, True, True), (Terminal, False, False), (io.StringIO, True, False), (io.StringIO, False, False)],
)
def test_a_bar_only_on_a_terminal(draw, stream, progress, written, monkeypatch):
    error = stream()
    monkeypatch.setattr("sys.stderr", error)
    draw(progress)
    assert bool(error.getvalue()) == written


def test_a_bar_passes_its_steps_on():
    assert list(progress_bar([3, 1, 2], False)) == [3, 1, 2]
    assert torch.equal(torch.tensor(list(progress_bar(range(4), True))), torch.arange(4))
