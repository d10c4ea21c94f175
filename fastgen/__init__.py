"""fastgen: fused CPU and GPU kernels for generative models in PyTorch, as torch ops, modules, models and samplers."""

from . import _dispatch, _library
from ._version import __version__

_library.find_kernels()
_library.define()
_library.load()
_dispatch.register_cuda()

from . import ops  # noqa: E402  (the ops are there only after they are defined)

__all__ = ["__version__", "ops"]
