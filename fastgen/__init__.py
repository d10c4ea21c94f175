"""fastgen: fused CPU and GPU kernels for generative models in PyTorch, as torch ops, modules, models and samplers."""

from . import _dispatch, _library

_library.define()
_library.load()
_dispatch.register_cuda()

from . import ops  # noqa: E402  (the ops are there only after they are defined)

__version__ = "0.1.0"
__all__ = ["__version__", "ops"]
