"""fastgen: fused CPU and GPU kernels for generative models in PyTorch, as torch ops, modules, models and samplers.

The ops are there after the import; every other sub-package (``fastgen.samplers``, ``fastgen.models``, ...) is loaded when it is
first used, so that the import stays light.
"""

import importlib
import pkgutil
from typing import Any

from . import _dispatch, _library
from ._exact import set_exact
from ._version import __version__

_library.find_kernels()
_library.define()
_library.load()
_dispatch.register_cuda()

from . import ops  # noqa: E402  (the ops are there only after they are defined)

_OF_INTEGRATIONS = ("accelerate", "report", "restore")
__all__ = ["__version__", "accelerate", "ops", "report", "restore", "set_exact"]


def __getattr__(name: str) -> Any:
    """A sub-package, or a function of `fastgen.integrations`, loaded at its first use."""
    if name in _OF_INTEGRATIONS:
        return getattr(importlib.import_module(f"{__name__}.integrations"), name)
    if name not in _subpackages():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_subpackages(), *_OF_INTEGRATIONS})


def _subpackages() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(__path__) if module.ispkg]
