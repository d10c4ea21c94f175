"""docs/autoregressive.md: its examples run, and what it says is refused is refused so."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from fastgen.autoregressive import NotPlannable, plan
from fastgen.nn import MaskedConv2d

PAGE = (Path(__file__).parents[2] / "docs" / "autoregressive.md").read_text(encoding="utf-8")


def test_the_examples_run():
    names = {}
    for block in re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL):
        exec(compile(block, "autoregressive.md", "exec"), names)
    assert names["halves"][:, :, :4].equal(names["digits"][:, :, :4]) and names["digits"].shape == (4, 1, 8, 8)
    assert set(names["images"].unique().tolist()) == {0.0, 1.0, 2.0, 3.0}


class Between(nn.Module):
    """A function between two convolutions."""

    def __init__(self, function):
        super().__init__()
        self.first, self.norm, self.out = MaskedConv2d(1, 8, 3, "A"), nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 1)
        self.function = function

    def forward(self, x):
        return self.out(self.function(self, self.first(x)))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Between(lambda self, h: self.norm(h)), "averages over the whole image"),
        (Between(lambda self, h: h + torch.roll(h, -1, 2)), "brings the last rows or columns to the first"),
        (Between(lambda self, h: h + h.mean((2, 3), keepdim=True)), "mixes positions, so a pixel's value would depend on"),
        (nn.Sequential(nn.Conv2d(1, 4, 3, padding=1)), "reads 1 rows below a pixel's position a value that depends on its own"),
        (Between(lambda self, h: h * torch.rand(1)), "draws random numbers"),
        (Between(lambda self, h: h.sort(1).values), "is no operation that is known here"),
    ],
)  # fmt: skip
def test_refusals(model, reason):
    with pytest.raises(NotPlannable, match=re.escape(reason)):
        plan(model, (1, 1, 6, 6))
    assert " ".join(reason.split()) in PAGE
