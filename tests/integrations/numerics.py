"""What accelerated models are held to: their own arithmetic in float64, and the error that they had before."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

import fastgen
from fastgen.integrations.stand_in import mixin_of

Call = Callable[[nn.Module, torch.dtype], Tensor]
WINOGRAD = 2e-5  # of the norm of the output, as the op promises for one convolution
ROUNDING = 2.0**-23


def error(output: Tensor, exact: Tensor) -> float:
    return ((output.double() - exact).norm() / exact.norm()).item()


def assert_accelerated(model: nn.Module, call: Call, expected: tuple[str, ...]) -> None:
    """Accelerated and exact no worse than twice the model's own error, else within Winograd's bound; the same bits as ever when
    restored. ``expected``: classes of which a module, at least, is a stand-in."""
    model.eval()
    with torch.no_grad():
        before = call(model, torch.float32)
        exact = call(in_float64(model), torch.float64)
        own = error(before, exact)
        for mode, bound in ((True, 2 * own + ROUNDING), (False, 2 * own + WINOGRAD)):
            assert fastgen.accelerate(model, exact=mode) is model
            assert_stand_ins(model, expected if not mode else tuple(e for e in expected if e != "Conv2d"))
            assert error(call(model, torch.float32), exact) <= bound
        fastgen.restore(model)
        assert not any(mixin_of(module) for module in model.modules())
        assert torch.equal(call(model, torch.float32), before)


def assert_stand_ins(model: nn.Module, expected: tuple[str, ...]) -> None:
    assert {type(m).__name__ for m in model.modules() if mixin_of(m)} >= set(expected)


def in_float64(model: nn.Module) -> nn.Module:
    """A copy in float64 all through: GroupNorm32 casts to float32."""
    wide = copy.deepcopy(model).double()
    for module in wide.modules():
        if type(module).__name__ == "GroupNorm32":
            module.__class__ = nn.GroupNorm
    return wide
