"""`python -m benchmarks.jobs.file_operations`: what a shard costs the file system, in system calls on the job's folder, by strace.

Two jobs of different length run under strace; the difference is that of shards alone, without the beginning and the end of a job.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ..machine import ROOT
from ..tables import table
from . import figures

SHARDS = (10, 30)
# What each is for the server of a shared file system. Calls on an open file go there when it is closed or synced, if at all.
CHANGES = {
    "mkdir": "makes a folder",
    "openat, new": "makes a file",
    "rename": "renames",
    "chmod": "changes a mode",
    "fchmodat": "changes a mode",
    "unlink": "removes a file",
    "unlinkat": "removes",
    "rmdir": "removes a folder",
    "fsync": "waits for the disk",
    "write": "writes",
}
LOOKS = {
    "mkdir, failed": "finds the folder there",
    "openat": "opens",
    "stat": "looks",
    "lstat": "looks",
    "newfstatat": "looks",
    "statx": "looks",
    "fstat": "looks",
    "flock": "locks",
    "getdents64": "lists a folder",
    "read": "reads",
}
_LINE = re.compile(r"^\d+ +(\w+)\(")
_JOB = """
import sys
from pathlib import Path
import torch
from torch import nn
from fastgen.jobs import Job, run

class Blank(Job):
    model, shape = nn.Linear(1, 1), (1, 28, 28)

    def draw_batch(self, seeds, labels):
        return torch.zeros(len(seeds), *self.shape)

torch.set_num_threads(1)
run(Blank(64 * int(sys.argv[2])), sys.argv[1], format=sys.argv[3], progress=False)
"""


def calls(shards: int, form: str) -> Counter[str]:
    """System calls on its folder of a job of ``shards``."""
    with tempfile.TemporaryDirectory() as place:
        folder, trace = Path(place) / "job", Path(place) / "trace"
        command = ["strace", "-f", "-y", "-e", "trace=%file,%desc", "-o", str(trace), sys.executable, "-c", _JOB]
        subprocess.run([*command, str(folder), str(shards), form], check=True, cwd=ROOT)
        return counted(trace.read_text(errors="replace").splitlines(), str(folder))


def counted(lines: Sequence[str], folder: str) -> Counter[str]:
    """Calls by name in ``lines`` of strace that have to do with ``folder``; those that make a file, or fail, apart."""
    found: Counter[str] = Counter()
    for line in lines:
        call = _LINE.match(line)
        if call and folder in line:
            new = call[1] == "openat" and "O_CREAT" in line
            found[call[1] + (", new" if new else ", failed" if "= -1 E" in line else "")] += 1
    return found


def measure(forms: Sequence[str]) -> figures.Figures:
    """By format, calls a shard by name."""
    few, many = SHARDS
    found = {}
    for form in forms:
        long, short = calls(many, form), calls(few, form)
        found[form] = {
            name: (long[name] - short[name]) / (many - few) for name in sorted(long) if long[name] > short[name]
        }
    return {"images_a_shard": 64, "calls": found}


def changes(found: dict[str, float]) -> float:
    """Of the calls of one format, those that change names: what the metadata server of a shared file system orders."""
    return sum(count for name, count in found.items() if name in CHANGES and name not in ("write", "fsync"))


def markdown(found: figures.Figures) -> str:
    forms = list(found["calls"])
    names = sorted({name for calls in found["calls"].values() for name in calls})
    ordered = [name for name in (*CHANGES, *LOOKS) if name in names]
    rows = [
        (f"`{name}`", (CHANGES | LOOKS)[name], *(f"{found['calls'][form].get(name, 0):.3g}" for form in forms))
        for name in ordered
    ]
    rows.append(("all that change names", "", *(f"{changes(found['calls'][form]):.3g}" for form in forms)))
    return table(("calls a shard", "which", *forms), rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.jobs.file_operations", description=__doc__)
    parser.add_argument("--formats", nargs="+", default=["npz", "webdataset", "png"])
    parser.add_argument("--out", type=Path, default=figures.TRIALS, help=f"(default: {figures.TRIALS})")
    args = parser.parse_args(argv)
    if shutil.which("strace") is None:
        print("benchmarks: strace is needed", file=sys.stderr)
        return 2
    found = measure(args.formats)
    print(markdown(found))
    print(f"written to {figures.save('file_operations', found, args.out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
