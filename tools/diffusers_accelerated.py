"""A pytest plugin: every model of diffusers is accelerated when it is first called, so that diffusers' own tests test that."""

from typing import Any

from diffusers import ModelMixin

import fastgen

_theirs = ModelMixin.__call__


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    fastgen.accelerate(self, exact=True)  # their bounds are for torch's own rounding
    return _theirs(self, *args, **kwargs)


ModelMixin.__call__ = _call
