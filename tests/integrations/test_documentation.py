"""docs/accelerate.md: its examples run, on small models, and do what the page says."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastgen
from fastgen.integrations import walk
from fastgen.integrations.stand_in import mixin_of

from ..backends import import_peer
from ..modules import randomize
from .foreign_autoregressive import Snail, plus_plus
from .numerics import WINOGRAD, error

PAGE = (Path(__file__).parents[2] / "docs" / "accelerate.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture
def run(tmp_path):
    """Runs a block among names; from a file, for the source of a forward is read."""

    def of(block, **names):
        file = tmp_path / "accelerate.py"
        file.write_text(block)
        exec(compile(block, str(file), "exec"), names)
        return names

    return of


def test_every_block_is_tried():
    assert len(BLOCKS) == 6


def test_a_pipeline(run, monkeypatch):
    diffusers = import_peer("diffusers")
    unet = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    pipeline, seen = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()), []
    monkeypatch.setattr(diffusers.DDPMPipeline, "from_pretrained", lambda name: pipeline)
    monkeypatch.setattr(fastgen, "report", lambda pipe: seen.append([mixin_of(m) for m in pipe.unet.modules()]))
    run(BLOCKS[0])
    assert any(seen[0]) and not any(mixin_of(module) for module in unet.modules())


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2, self.act = nn.GroupNorm(4, 8), nn.GroupNorm(4, 8), nn.SiLU()
        self.conv1, self.conv2 = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))


@torch.no_grad()
def test_a_forward_that_is_read(run):
    kind = run(BLOCKS[1], nn=nn, F=F)["Mine"]
    model = randomize(type("Mine", (Parts,), {"forward": kind.forward})()).eval()
    x, e = torch.randn(2, 8, 9, 9), torch.randn(2, 8, 9, 9)
    expected = model(x, e).double(), model(x).double()
    fastgen.accelerate(model)
    assert fastgen.report(model).rows[0].accelerated
    for y, exact in zip((model(x, e), model(x)), expected, strict=True):
        assert error(y, exact) < WINOGRAD


def test_a_pixelcnn(run):
    model = randomize(Snail()).eval()
    model(torch.zeros(1, 1, 5, 6))  # which teaches it the size of an image
    make, accelerate, draw = BLOCKS[2].partition("fastgen.accelerate(model)\n")
    torch.manual_seed(0)
    before = run(make, GatedPixelCNN=lambda _: model)["before"]
    torch.manual_seed(0)
    after = run(accelerate + draw, model=model, fastgen=fastgen)["after"]
    assert torch.equal(before, after) and after.shape == (16, 1, 5, 6) and mixin_of(model) is not None


def test_images_of_pixel_cnn_pp(run):
    model = randomize(plus_plus.PixelCNN(nr_filters=4)).eval()
    images = run(BLOCKS[3].replace("32, 32", "4, 4"), model=model, fastgen=fastgen)["images"]
    assert images.shape == (25, 3, 4, 4) and images.abs().max() <= 1


def test_a_flow(run):
    import_peer("nflows")
    torch.manual_seed(0)
    block = BLOCKS[4].replace("hidden_features=512", "hidden_features=32")
    flow = run(block, x=torch.randn(4, 64), fastgen=fastgen)["flow"]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in flow.parameters())
    assert fastgen.report(flow).rows[0].accelerated


class Block(nn.Module):
    def __init__(self, stride):
        super().__init__()
        self.norm, self.act, self.conv = nn.GroupNorm(4, 8), nn.SiLU(), nn.Conv2d(8, 8, 3, stride, padding=1)

    def forward(self, x):
        return self.conv(self.act(self.norm(x)))


@torch.no_grad()
def test_a_stand_in_of_ones_own(run, monkeypatch):
    monkeypatch.setattr(walk, "STAND_INS", {name: list(kinds) for name, kinds in walk.STAND_INS.items()})
    model, x = randomize(nn.ModuleList([Block(1), Block(2)])).eval(), torch.randn(2, 8, 9, 9)
    expected = [block(x).double() for block in model]
    run(BLOCKS[5], model=model, fastgen=fastgen)
    details = {row.name: row.detail for row in fastgen.report(model).rows}
    assert details["0"] == "norm and SiLU in the convolution" != details["1"]
    assert all(error(block(x), exact) < WINOGRAD for block, exact in zip(model, expected, strict=True))
