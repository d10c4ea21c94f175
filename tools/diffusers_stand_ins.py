"""A pytest plugin: puts the stand-ins into diffusers' namespace, before tests import their schedulers from there."""

import sys

import diffusers
import pytest

from fastgen.samplers.diffusers import SCHEDULERS, FusedScheduler, stand_in

_replaced = []  # not those that want a package which is not there
for _name in SCHEDULERS:
    _parent = getattr(diffusers, _name, None)
    if isinstance(_parent, type) and ".dummy" not in _parent.__module__:
        setattr(diffusers, _name, stand_in(_parent))
        _replaced.append(_name)


def pytest_collection_finish(session: pytest.Session) -> None:
    """That the tests have them: a run of diffusers' own classes would prove nothing."""
    modules = {item.module for item in session.items}
    found = {name for module in modules for name in _replaced if name in vars(module)}
    wrong = [n for m in modules for n in found if n in vars(m) and not issubclass(vars(m)[n], FusedScheduler)]
    if not found or wrong:
        sys.exit(f"fastgen: diffusers' tests do not see the stand-ins: {wrong or 'no scheduler is imported'}")
