"""A pytest plugin: every layer of a flow library is accelerated when it is first called, so that the library's own tests test that.

FASTGEN_FLOWS names the library: nflows, normflows, zuko or FrEIA.
"""

import functools
import importlib
import inspect
import os
import pkgutil
import sys
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

import fastgen
from fastgen.integrations.stand_in import mixin_of

METHODS = ("forward", "inverse", "sample", "log_prob", "_log_prob", "_coupling1", "_elementwise_forward")
_stand_ins: set[str] = set()


def _first(method: Callable[..., Any]) -> Callable[..., Any]:
    """``method``, before whose first call its module is accelerated."""

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if mixin_of(self) is None:
            fastgen.accelerate(self, exact=True)  # their bounds are for torch's own rounding
            _stand_ins.update(type(module).__name__ for module in self.modules() if mixin_of(module))
            if mixin_of(self) is not None:
                return getattr(self, method.__name__)(*args, **kwargs)
        return method(self, *args, **kwargs)

    return call


def _take(package: Any) -> None:
    for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if not found.name.endswith("_test"):
            module = importlib.import_module(found.name)
            for cls in vars(module).values():
                if inspect.isclass(cls) and issubclass(cls, nn.Module) and cls.__module__ == module.__name__:
                    for name in METHODS:
                        if inspect.isfunction(vars(cls).get(name)):
                            setattr(cls, name, _first(vars(cls)[name]))


_take(importlib.import_module(os.environ["FASTGEN_FLOWS"]))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """That there was something to accelerate: a run of their own modules would prove nothing."""
    if not _stand_ins:
        sys.exit("fastgen: nothing in these tests was accelerated")
    print(f"\nfastgen: accelerated were {', '.join(sorted(_stand_ins))}")
