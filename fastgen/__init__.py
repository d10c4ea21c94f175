"""fastgen: fused CPU and GPU kernels for generative models in PyTorch, as torch ops, modules, models and samplers.

The ops are there after the import; every other sub-package (``fastgen.samplers``, ``fastgen.models``, ...) is loaded when it is
first used, so that the import stays light.
"""

import importlib
import pkgutil
from types import ModuleType

from . import _dispatch, _library
from ._exact import set_exact
from ._version import __version__

_library.find_kernels()
_library.define()
_library.load()
_dispatch.register_cuda()

from . import ops  # noqa: E402  (the ops are there only after they are defined)

__all__ = ["__version__", "ops", "set_exact"]


def __getattr__(name: str) -> ModuleType:
    """A sub-package, loaded at its first use."""
    if name not in _subpackages():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_subpackages()})


def _subpackages() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(__path__) if module.ispkg]
