"""The switch for algorithms that trade accuracy for speed (Winograd's convolution): on for all threads, or within a block."""

import threading
from types import TracebackType

_lock = threading.Lock()
_exact = False


class set_exact:  # a function that may also be entered, as torch.set_grad_enabled
    """Whether fastgen keeps to algorithms as exact as torch's own: ``fastgen.set_exact(True)``, for the process and at once.

    It turns Winograd's convolution off (see :func:`fastgen.ops.conv2d` for its bound). As a context manager it puts back, at the
    end of the block, what was there before; the switch is one for all threads, and so is a block.

    Args:
        mode: True for exact algorithms alone; False, the default of the process, lets the fast ones in.

    Raises:
        TypeError: ``mode`` is no bool.
    """

    def __init__(self, mode: bool) -> None:
        global _exact
        if not isinstance(mode, bool):
            raise TypeError(f"set_exact: mode must be a bool, got {mode!r}")
        with _lock:
            self._before, _exact = _exact, mode

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _exact
        with _lock:
            _exact = self._before


def is_exact() -> bool:
    """What :class:`set_exact` has set."""
    return _exact
