"""docs/jobs.md: its Python runs as printed, its commands are understood, and the figures fit between their marks."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from fastgen.cli.main import build_parser

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "jobs.md").read_text(encoding="utf-8")
COMMANDS = [
    line.partition("  #")[0].strip()
    for line in PAGE.replace("\\\n", " ").splitlines()
    if line.startswith("    ") and " fastgen " in f" {line} "
]


def test_the_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    names = {}
    exec(compile(block, "jobs.md", "exec"), names)
    assert names["summary"].drawn == 8 and (tmp_path / "walks" / "003584.npz").is_file()


@pytest.mark.parametrize("line", COMMANDS)
def test_the_commands_are_understood(line):
    command = shlex.split(line)
    command = command[command.index("fastgen") + 1 :]
    module = importlib.import_module(f"fastgen.cli.{command[0]}")
    assert build_parser(command[0], module).parse_args(command).command == command[0]


def test_there_are_commands_for_all_three():
    assert {shlex.split(line.partition("fastgen ")[2])[0] for line in COMMANDS} == {"sample", "evaluate", "train"}


def test_files_that_are_linked_are_there():
    for link in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert (ROOT / "docs" / link).resolve().is_file(), link


@pytest.mark.parametrize("name", ["store load", "file operations", "throughput"])
def test_parts_that_are_made_have_their_marks(name):
    assert PAGE.count(f"<!-- {name} -->\n") == PAGE.count(f"<!-- end of {name} -->") == 1
