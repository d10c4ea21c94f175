import enum

from .network import *


class Availability(enum.Enum):
    CONSTANT = 0
    ROW = 1
    PIXEL = 2
    INPUT = 3


def availability(network, per_color=False):
    out = []
    A = Availability
    for node in network.nodes:
        if isinstance(node, Input):
            out.append(A.INPUT)
            continue
        if isinstance(node, Constant):
            out.append(A.CONSTANT)
            continue

        def read(a, dy, dx):
            if a in (A.CONSTANT, A.ROW):
                return a
            if dy < 0:
                return A.ROW
            if a == A.PIXEL:
                assert dx <= 0
                return A.PIXEL
            if dx < 0:
                return A.PIXEL
            return A.INPUT

        reads = []
        if isinstance(node, Convolution):
            for t in node.taps:
                o = node.operand
                reads.append(read(out[o.node], t.dy + o.dy, t.dx + o.dx))
        elif isinstance(node, Attention):
            reads = [A.PIXEL if out[o.node] != A.ROW else A.ROW for o in node.operands]
        else:
            reads = [read(out[o.node], o.dy, o.dx) for o in node.operands]
        m = max(reads, key=lambda a: a.value) if reads else A.CONSTANT
        if m == A.INPUT and isinstance(node, Convolution) and per_color:
            m = A.PIXEL
        out.append(m)
    return out
