"""The rooms of an op family, and what is wrong with a house: a family without a file in a room, a file without a family.

A family has one name, which is the name of its files. Files that begin with an underscore are private to their room and serve
several families; what else is shared is named here.
"""

import ast
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

OPS = "fastgen/ops/__init__.py"
TABLE = "## What runs where"


@dataclass(frozen=True)
class Room:
    """A place where each family has a file: ``needs`` in one of ``folders``. Others there may be called ``may``, or are shared.

    In a ``gpu`` room those families have none that are declared to have none, `_schema.CPU_ONLY`.
    """

    folders: tuple[str, ...]
    needs: str
    may: tuple[str, ...] = ()
    shared: tuple[str, ...] = ("_*",)
    gpu: bool = False


# What tests all families alike.
TEST_KIT = (
    "_*",
    "numerics.py",
    "families.py",
    "raw_calls.py",
    *(f"test_{name}.py" for name in ("schema", "dtypes", "raw_ops", "transforms", "autograd")),
)
ROOMS = (
    Room(("fastgen/ops",), "{family}.py"),
    Room(("fastgen/reference",), "{family}.py"),
    Room(("csrc/cpu",), "{family}*.cpp", ("{family}*.h",)),
    Room(("kernels", "csrc/cuda"), "{family}.*", gpu=True),
    Room(("tests/ops",), "test_{family}*.py", ("{family}_cases.py",), TEST_KIT),
    Room(("tests/ops",), "{family}_cases.py", ("test_*.py",), TEST_KIT),
    Room(("benchmarks/ops",), "bench_{family}.py", shared=("_*", "bench_dispatch.py")),
)


def complaints(
    root: Path,
    families: Iterable[str],
    cpu_only: Iterable[str] = (),
    further: Mapping[str, Sequence[str]] | None = None,
) -> list[str]:
    """A sentence for every room that a family has left empty, and for every file that no family owns. ``further`` are public
    functions of a family that are not called after it."""
    families, cpu_only, further = list(families), list(cpu_only), further or {}
    found = [f"CPU_ONLY names {family}, which is no family" for family in cpu_only if family not in families]
    for room in ROOMS:
        owners = [family for family in families if not (room.gpu and family in cpu_only)]
        found += [sentence for sentence in _of_room(room, root, owners) if sentence not in found]
    public = _exported(root / OPS)
    found += [f"{OPS} does not export {family}" for family in families if family not in public]
    found += [f"FURTHER_FUNCTIONS names {family}, which is no family" for family in further if family not in families]
    named = [name for names in further.values() for name in names]
    found += [f"{OPS} does not export {name}" for name in named if name not in public]
    known = [name for name in public if name in named or any(name == f or name.startswith(f"{f}_") for f in families)]
    found += [f"{OPS} exports {name}, which is no family" for name in public if name.islower() and name not in known]
    rows = _rows(root / "README.md")
    found += [f"README.md has no line of {family} under {TABLE!r}" for family in families if family not in rows]
    return found + [
        f"README.md has a line of {row} under {TABLE!r}, which is no family" for row in rows if row not in families
    ]


def _of_room(room: Room, root: Path, families: list[str]) -> list[str]:
    files = [
        (folder, path.name) for folder in room.folders for path in sorted((root / folder).glob("*")) if path.is_file()
    ]

    def owned(name: str, family: str) -> bool:
        return any(fnmatch(name, pattern.format(family=family)) for pattern in (room.needs, *room.may))

    found = []
    for family in families:
        wanted = room.needs.format(family=family)
        if not any(fnmatch(name, wanted) for _, name in files):
            found.append(f"{family} has no {' and no '.join(f'{folder}/{wanted}' for folder in room.folders)}")
    for folder, name in files:
        if not any(fnmatch(name, pattern) for pattern in room.shared) and not any(owned(name, f) for f in families):
            found.append(f"{folder}/{name} belongs to no family")
    return found


def _exported(file: Path) -> list[str]:
    """The names in ``__all__``."""
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    return []


def _rows(readme: Path) -> list[str]:
    """The names in backquotes at the beginning of each row of the table."""
    section = readme.read_text().partition(TABLE)[2].partition("\n## ")[0]
    return [line.split("`")[1] for line in section.splitlines() if line.startswith("| `")]
