"""The case files of all op families, found by name: `tests/ops/<family>_cases.py`.

A case file gives what the tests of every device share:

    example(dtype)   keyword arguments of the public op, its floating tensors in ``dtype``
"""

import importlib
from pathlib import Path
from types import ModuleType

SUFFIX = "_cases"


def case_files() -> dict[str, ModuleType]:
    """Family -> its case file."""
    names = sorted(path.stem for path in Path(__file__).parent.glob(f"*{SUFFIX}.py"))
    return {name.removesuffix(SUFFIX): importlib.import_module(f"{__package__}.{name}") for name in names}
