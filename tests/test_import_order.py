"""Imports run one way: cli -> integrations -> training -> models, samplers -> nn -> ops -> {reference, kernels}.

Read from the import statements, those inside functions too. And no file knows two op families.
"""

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from fastgen._schema import SCHEMAS

ROOT = Path(__file__).parents[1]
# From top to bottom: a package may import what stands below it, not its neighbours. Private files of fastgen stand below all.
LEVELS = (
    ("__main__",),
    ("cli",),
    ("integrations",),
    ("jobs", "metrics", "training"),
    ("models", "samplers", "data"),
    ("autoregressive", "flows"),
    ("nn",),
    ("ops",),
    ("kernels",),
    ("reference",),
)
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}


def files(root: Path = ROOT) -> Iterator[tuple[str, Path]]:
    """(module, file) of everything in the package; the Triton kernels are `fastgen.kernels`."""
    for folder, package in (("fastgen", "fastgen"), ("kernels", "fastgen.kernels")):
        for file in sorted((root / folder).rglob("*.py")):
            yield ".".join([package, *file.relative_to(root / folder).with_suffix("").parts]), file


def imports(module: str, text: str) -> Iterator[str]:
    """Absolute names of what ``module`` imports: `from ..ops import x` in `fastgen.nn.a` is `fastgen.ops.x`."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            yield from (".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names)


def wrong_way(module: str, text: str) -> list[str]:
    """Sentences against imports of what stands above ``module`` or beside it."""
    own = module.split(".")[1]
    if own == "__init__":
        return []
    level = LEVEL.get(own, len(LEVELS))
    names = {name.split(".")[1] for name in imports(module, text) if name.startswith("fastgen.")} - {own}
    return [f"{module} imports fastgen.{name}" for name in sorted(names & LEVEL.keys()) if LEVEL[name] <= level]


def second_families(name: str, imported: Iterable[str]) -> list[str]:
    """Sentences against a file, ``name`` without its folders, that knows a family which is not its own; a shared one has none."""
    known = {family for module in imported for family in SCHEMAS if re.search(rf"\b_?{family}", module)}
    return [f"{name} knows {family}" for family in sorted(known) if not name.lstrip("_").startswith(family)]


def test_imports_run_one_way():
    assert [s for module, file in files() for s in wrong_way(module, file.read_text())] == []


def test_no_file_knows_two_families():
    found = []
    for module, file in files():
        if module.split(".")[1] in ("ops", "reference", "kernels") and file.name != "__init__.py":
            found += second_families(
                file.stem, (n for n in imports(module, file.read_text()) if n.startswith("fastgen."))
            )
    for file in sorted((ROOT / "csrc").rglob("*.*")):
        found += second_families(file.stem, re.findall(r'#include "(.*)"', file.read_text()))
    assert found == []


def test_every_package_has_its_level():
    packages = {module.split(".")[1] for module, _ in files()}
    assert {name for name in packages if not name.startswith("_")} <= LEVEL.keys()


@pytest.mark.parametrize(
    ("module", "text", "offender"),
    [
        ("fastgen.ops.group_norm", "from ..nn import GroupNorm", "fastgen.nn"),
        ("fastgen.models.unet", "from ..samplers import sample", "fastgen.samplers"),
        ("fastgen.nn.resblock", "def f():\n    from fastgen.training import Trainer", "fastgen.training"),
        ("fastgen.reference.q_sample", "import fastgen.kernels.q_sample", "fastgen.kernels"),
        ("fastgen.training.trainer", "from .. import cli", "fastgen.cli"),
        ("fastgen._dispatch", "from . import ops", "fastgen.ops"),
    ],
)
def test_an_import_upwards_is_named(module, text, offender):
    assert wrong_way(module, text) == [f"{module} imports {offender}"]


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("fastgen.kernels.q_sample", "from fastgen.reference._layout import x"),
        ("fastgen.nn.resblock", "from .. import _schema, ops"),
        ("fastgen.cli.train", "from ..training import Trainer"),
    ],
)
def test_an_import_downwards_is_not(module, text):
    assert wrong_way(module, text) == []


@pytest.mark.parametrize(
    ("name", "module", "offender"),
    [
        ("q_sample", "fastgen.ops.philox_normal.check_seeds", "philox_normal"),
        ("_group_norm_bwd", "fastgen.kernels.q_sample.f", "q_sample"),
        ("_operands", "fastgen.kernels._group_norm_plan.tile", "group_norm"),
        ("q_sample", "cpu/group_norm.h", "group_norm"),
    ],
)
def test_a_second_family_is_named(name, module, offender):
    assert second_families(name, [module]) == [f"{name} knows {offender}"]


def test_its_own_family_and_what_is_shared_are_not():
    for module in ("fastgen.reference.q_sample", "fastgen.kernels._philox.low_word", "common/timesteps.h"):
        assert second_families("q_sample", [module]) == []
