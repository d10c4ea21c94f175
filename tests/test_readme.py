"""The README runs as printed: its Python blocks one after the other, its commands as far as their options."""

import importlib
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import torch

from fastgen import samplers
from fastgen.cli.main import COMMANDS, build_parser
from fastgen.samplers import from_diffusers

from .backends import import_peer

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
LINES = re.findall(r"^    fastgen (.*?)(?: {2,}#.*)?$", README, re.MULTILINE)


@pytest.fixture
def tiny_pipelines(monkeypatch):
    """``DDPMPipeline.from_pretrained`` builds a small one here, of any name, and downloads nothing."""
    diffusers = import_peer("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    pipeline = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    monkeypatch.setattr(diffusers.DDPMPipeline, "from_pretrained", lambda name: pipeline)
    return pipeline


def test_the_python_blocks_run_in_order(tiny_pipelines, tmp_path, monkeypatch, capsys):
    import_peer("sklearn")
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), names)
    assert len(BLOCKS) == 7
    assert names["digits"].shape == (4, 1, 8, 8) and names["digits"].isfinite().all()
    assert names["y"].shape == names["x"].shape
    assert isinstance(names["pipe"].scheduler, samplers.diffusers.FusedScheduler) and names["picture"].size == (8, 8)
    assert names["completed"][:, :, :4].equal(names["drawn"][:, :, :4]) and not names["completed"].equal(names["drawn"])
    assert names["sevens"].shape == (4, 1, 8, 8) and names["nats"].isfinite().all()
    assert names["trainer"].step == 50 and (tmp_path / "digits.safetensors").is_file()
    printed = capsys.readouterr()
    assert printed.err == ""  # no bars where there is no terminal
    assert printed.out.startswith("accelerated") and printed.out.rstrip().endswith("scheduler")  # the report alone


def test_the_images_of_the_pipeline_are_those_of_diffusers(tiny_pipelines):
    def draw():
        options = {"num_inference_steps": 5, "generator": torch.manual_seed(0), "output_type": "np"}
        return torch.from_numpy(tiny_pipelines(**options).images)

    expected = draw()
    tiny_pipelines.scheduler = from_diffusers(tiny_pipelines.scheduler)
    torch.testing.assert_close(draw(), expected, rtol=0, atol=1e-5)  # pixels in [0, 1]


@pytest.mark.parametrize("line", LINES)
def test_the_commands_are_understood(line):
    command, *options = shlex.split(line)
    assert command in COMMANDS
    module = importlib.import_module(f"fastgen.cli.{command}")
    args = build_parser(command, module).parse_args([command, *options])
    assert args.command == command


def test_every_command_but_those_of_developers_is_shown():
    assert {shlex.split(line)[0] for line in LINES} >= set(COMMANDS) - {"bench", "demo"}  # `make bench`, `make demo`


def test_the_extras_that_are_named_are_there():
    extras = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    named = re.findall(r"'\.\[(\w+)\]'", README)
    assert named == ["demo"]
    assert set(extras) == {*named, "diffusers", "evaluate", "flows", "gpu", "bench", "test"} and all(
        f"`{name}`" in README for name in set(extras) - {"demo"}
    )
    assert {"scikit-learn", "matplotlib", "rich"} <= set(extras["demo"])
