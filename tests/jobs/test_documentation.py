"""docs/jobs.md: its Python runs as printed, its commands are understood, and the figures fit between their marks."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from benchmarks.jobs import file_operations, store_load
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


def test_the_simulation_of_the_store():
    found = store_load.measure(clients=6, processes=2, seconds=0.05, rounds=2, fast_shards=3)
    assert [job["shards"] for job in found["jobs"]] == [12, 18]
    assert found["files_a_client"] == 1 and found["files_of_the_server"] > 6
    for job in found["jobs"]:
        assert job["shards_a_second"] > 0 and job["server_cpu_share"] >= 0
        assert 0 < job["latencies"]["claim"]["median"] <= job["latencies"]["claim"]["max"]
    assert "| none: as fast as they can | 18 |" in store_load.markdown(found)


def test_calls_are_counted_by_what_they_do():
    lines = [
        '7 mkdir("/tmp/job", 0777) = -1 EEXIST (File exists)',
        '7 openat(AT_FDCWD</home>, "/tmp/job/.a.tmp/a", O_WRONLY|O_CREAT, 0666) = 3</tmp/job/.a.tmp/a>',
        '7 openat(AT_FDCWD</home>, "/etc/hosts", O_RDONLY) = 4</etc/hosts>',
        "8 fsync(3</tmp/job/.a.tmp/a> <unfinished ...>",
        "8 <... fsync resumed>) = 0",
        '7 rename("/tmp/job/.a.tmp/a", "/tmp/job/a") = 0',
    ]
    counted = file_operations.counted(lines, "/tmp/job")
    assert counted == {"mkdir, failed": 1, "openat, new": 1, "fsync": 1, "rename": 1}
    assert file_operations.changes(counted) == 2
