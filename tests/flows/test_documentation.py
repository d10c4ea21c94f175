"""docs/flows.md: its examples run, its commands are understood, and it names the models and ops that are there."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from fastgen import flows, models, ops
from fastgen.cli import sample, train
from fastgen.cli.main import build_parser

from ..backends import import_peer

PAGE = (Path(__file__).parents[2] / "docs" / "flows.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
LINES = re.findall(r"^    fastgen (.*?)(?: {2,}#.*)?$", PAGE, re.MULTILINE)


def test_the_examples_run():
    import_peer("sklearn")
    torch.manual_seed(0)
    names = {}
    for block in BLOCKS:
        exec(compile(block, "flows.md", "exec"), names)
    assert len(BLOCKS) == 4
    assert (names["again"] - names["digits"]).abs().max() <= 1e-4 and names["nats"].shape == (4,)
    assert names["loss"].isfinite() and isinstance(names["score"], float) and names["rows"].shape == (5, 30)
    assert names["trainer"].step == 10


@pytest.mark.parametrize("line", LINES)
def test_the_commands_are_understood(line):
    command, *options = shlex.split(line)
    module = {"train": train, "sample": sample}[command]
    assert build_parser(command, module).parse_args([command, *options]).command == command


def test_names_are_there():
    tables = re.findall(r"^\| (`.*?`) \|", PAGE, re.MULTILINE)
    named = {name for cell in tables for name in re.findall(r"`(\w+)`", cell)} - {"reversible"}
    known = {*dir(ops), *dir(models), *models.SHIPPED}
    assert {name for name in named if "-" not in name} <= known and {"affine_coupling", "Glow"} <= named
    classes = set(re.findall(r"`([A-Z]\w+)`", PAGE)) - {"ScaleFn"}
    assert len(classes) >= 20 and classes <= {*dir(flows), *dir(models)}
