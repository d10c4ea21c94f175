"""docs/evaluation.md: its Python runs, its commands are understood, and every set and range it names is there."""

import re
import shlex
from pathlib import Path

from fastgen.cli import evaluate
from fastgen.cli.main import build_parser
from fastgen.metrics.features import RANGES

PAGE = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")


def test_the_python_runs():
    names = {}
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    for block in blocks:
        exec(compile(block, "evaluation.md", "exec"), names)
    assert len(blocks) == 1 and 0 < names["fid"] < 5 and abs(names["kid"]) < 1 and 0 < names["recall"] <= 1


def test_the_commands_are_understood():
    commands = re.findall(r"^(?:torchrun .* -m -- )?fastgen (evaluate .*?)(?: +#.*)?$", PAGE, re.MULTILINE)
    assert len(commands) == 4
    for command in commands:
        assert build_parser("evaluate", evaluate).parse_args(shlex.split(command)).command == "evaluate"


def test_the_ranges_are_named():
    assert all(f"`{name}`" in PAGE for name in RANGES)
