"""Packed weights of matrix products, kept until the weight changes or dies, within a limit of memory.

A weight counts as unchanged while it is the same object with the same memory and version counter: in-place operations raise the
counter, `load_state_dict` works in place or gives other memory, and so does an assignment to ``.data``. The old memory is held as
long as what was made of it, so that no new weight can come to lie there. What is done in place to ``.data`` itself raises no
counter: some hundred elements are compared as well, which sees whole weights multiplied, averaged or copied over.
"""

import os
import threading
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_SAMPLES = 256
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Seen:
    """A tensor as it was when something was made of it, and whether another is that one, unchanged.

    Args:
        weight: the tensor.
        died: called with the weak reference once it is gone.
    """

    def __init__(self, weight: Tensor, died: "Callable[[weakref.ref[Tensor]], None] | None" = None) -> None:
        self.weight = weakref.ref(weight, died)
        self.memory = weight.detach()  # shares the weight's, and keeps it from being given to another
        self.version = weight._version
        self.sample = _sample(self.memory)  # a view of some of its elements, as integers
        self.seen = self.sample.clone()  # what they were

    def fits(self, weight: Tensor) -> bool:
        return (
            self.weight() is weight
            and self.memory.data_ptr() == weight.data_ptr()
            and self.version == weight._version
            and self.memory.dtype == weight.dtype
            and self.memory.shape == weight.shape
            and self.memory.stride() == weight.stride()
            and torch.equal(self.sample, self.seen)
        )


@dataclass
class _Entry:
    """What was made of a weight."""

    of: Seen
    packed: dict[Hashable, Tensor]  # what it is packed for -> packed weights


class PackedWeights:
    """``limit``: bytes that all packed weights together may take."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.bytes = 0  # that they take
        self._entries: dict[int, _Entry] = {}  # id of the weight
        self._lock = threading.RLock()  # a weight may die, and its entry go, while this thread is in here

    def find(self, weight: Tensor) -> dict[Hashable, Tensor]:
        """What there is of the weight as it is now; what was made of it before it changed is let go."""
        with self._lock:
            entry = self._entries.get(id(weight))
            if entry is None:
                return {}
            if not entry.of.fits(weight):
                self._forget(id(weight))
                return {}
            return entry.packed

    def make(self, weight: Tensor, purpose: Hashable, pack: Callable[[Tensor], Tensor]) -> Tensor:
        """``pack(weight)``, which is kept under the name of its ``purpose``."""
        entry = self._entry(weight)  # as the weight is before it is read
        packed = pack(entry.of.memory)
        with self._lock:
            self.find(weight)
            kept = self._entries.setdefault(id(weight), entry).packed
            if purpose not in kept:  # by another thread
                kept[purpose] = packed
                self.bytes += packed.nbytes
        return packed

    def clear(self) -> None:
        with self._lock:
            for key in list(self._entries):
                self._forget(key)

    def _forget(self, key: int) -> None:
        self.bytes -= sum(packed.nbytes for packed in self._entries.pop(key).packed.values())

    def _entry(self, weight: Tensor) -> _Entry:
        key = id(weight)

        def died(reference: "weakref.ref[Tensor]") -> None:
            with self._lock:
                entry = self._entries.get(key)
                if (
                    entry is not None and entry.of.weight is reference
                ):  # and not that of a new weight at the same address
                    self._forget(key)

        return _Entry(Seen(weight, died), {})


def _sample(weight: Tensor) -> Tensor:
    """A view of about _SAMPLES elements spread over the memory of ``weight``, as integers, of which NaN equals NaN."""
    size = sum((n - 1) * stride for n, stride in zip(weight.shape, weight.stride(), strict=True)) + 1
    flat = weight.as_strided((size,), (1,)).view(_BITS[weight.element_size()])
    return flat[:: max(size // _SAMPLES, 1)]


def reasons(weight: Tensor) -> list[str]:
    """Why nothing can be kept of a weight."""
    if type(weight) not in (Tensor, nn.Parameter):
        return [f"a weight of class {type(weight).__name__} is not packed"]
    if weight.is_inference():
        return ["the weight is an inference tensor, whose changes nobody counts"]
    return []


def default_limit() -> int:
    """A quarter of the memory of the machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4


WEIGHTS = PackedWeights(default_limit())


def _renew_lock() -> None:
    """In a forked child, whose lock another thread of the parent may have held."""
    WEIGHTS._lock = threading.RLock()


os.register_at_fork(after_in_child=_renew_lock)
