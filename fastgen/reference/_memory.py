"""Which memory the elements of a tensor lie in, and what an op that writes into the caller's memory refuses; `csrc/common/memory.h`
says the same in C++."""

from collections.abc import Mapping

from torch import Tensor

from ._check import require


def extent(t: Tensor) -> tuple[int, int]:
    """The address of the first byte of ``t`` and that past its last, whatever lies between its elements."""
    first: int = t.data_ptr()
    last = sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True)) if t.numel() else -1
    return first, first + (last + 1) * t.element_size()


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether the addresses of ``a``, from its first to its last, meet those of ``b``."""
    (a_first, a_end), (b_first, b_end) = extent(a), extent(b)
    return max(a_first, b_first) < min(a_end, b_end)


def same_elements(a: Tensor, b: Tensor) -> bool:
    """Whether element i of ``a`` is element i of ``b``, for tensors of one shape."""
    return a.data_ptr() == b.data_ptr() and a.dtype == b.dtype and _steps(a) == _steps(b)


def overlaps_itself(t: Tensor) -> bool:
    """Whether two elements of ``t`` may be one: ``expand``, a window that slides. Where it is hard to say, True."""
    reach = 0  # of the dimensions of smaller strides
    for stride, n in sorted(_steps(t)):
        if stride <= reach:
            return t.numel() > 0
        reach += (n - 1) * stride
    return False


def refuse_overlap(
    op: str,
    outputs: Mapping[str, Tensor | None],
    read_first: Mapping[str, Tensor | None],
    read_later: Mapping[str, Tensor | None],
) -> None:
    """No output may overlap another, itself, or an argument, but for one of ``read_first`` element by element."""
    written = {name: t for name, t in outputs.items() if t is not None and not t.is_meta}
    for k, (name, out) in enumerate(written.items()):
        require(op, not overlaps_itself(out), f"{name} overlaps itself: two of its elements share memory")
        for other, t in {**read_first, **read_later, **dict(list(written.items())[:k])}.items():
            harmless = t is None or (other in read_first and same_elements(t, out)) or not overlap(t, out)
            require(op, harmless, f"{name} shares memory with {other}")


def _steps(t: Tensor) -> list[tuple[int, int]]:
    """(stride, length) of the dimensions along which there is more than one element."""
    return [(stride, n) for n, stride in zip(t.shape, t.stride(), strict=True) if n != 1]
