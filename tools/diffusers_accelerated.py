"""A pytest plugin: every model of diffusers is accelerated when it is first called, so that diffusers' own tests test that."""

import sys
from typing import Any

import pytest
from diffusers import ModelMixin

import fastgen
from fastgen.integrations.stand_in import mixin_of

_theirs = ModelMixin.__call__
_stand_ins: set[str] = set()


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    fastgen.accelerate(self, exact=True)  # their bounds are for torch's own rounding
    _stand_ins.update(type(module).__name__ for module in self.modules() if mixin_of(module))
    return _theirs(self, *args, **kwargs)


ModelMixin.__call__ = _call


def pytest_sessionfinish(session: pytest.Session) -> None:
    """That there was something to accelerate: a run of diffusers' own modules would prove nothing."""
    if not _stand_ins:
        sys.exit("fastgen: no model of diffusers' tests was accelerated")
    print(f"\nfastgen: accelerated were {', '.join(sorted(_stand_ins))}")
