"""What a kernel's PTX says of its way to memory: how wide it reads and writes, and whether it reads after it has written."""

import re
from collections import Counter

# e.g. "@%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];", with cache hints between the words
_ACCESS = re.compile(r"\b(ld|st)\.(?:weak\.|relaxed\.\w+\.)?global(?:\.\w+::\w+|\.c[agsv])*(?:\.v(\d))?\.[bsuf](\d+)\b")


def accesses(ptx: str) -> list[tuple[str, int]]:
    """Every access to global memory in order: ("ld" or "st", bytes a thread)."""
    return [(kind, int(vector or 1) * int(bits) // 8) for kind, vector, bits in _ACCESS.findall(ptx)]


def widths(ptx: str, kind: str) -> dict[int, int]:
    """Bytes a thread -> number of loads ("ld") or stores ("st") of that width. A single number of 64 bits, a seed or a timestep
    among small types, counts as none: it is as wide as a vector of four of them."""
    found = _ACCESS.findall(ptx)
    sizes = (int(vector or 1) * int(bits) // 8 for k, vector, bits in found if k == kind and (vector or bits != "64"))
    return dict(sorted(Counter(sizes).items()))


def loads_after_a_store(ptx: str) -> int:
    """Loads behind the first store, in the order of the text: nothing can move them up, they may read what was written."""
    kinds = [kind for kind, _ in accesses(ptx)]
    return kinds[kinds.index("st") :].count("ld") if "st" in kinds else 0
