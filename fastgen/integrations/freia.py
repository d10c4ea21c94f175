"""FrEIA: its coupling blocks, scale, shift and log-determinant in one pass, AllInOneBlock and ActNorm."""

import dataclasses
import math
import types
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import ScaleFn, actnorm, affine_coupling, invertible_conv1x1, squeeze
from .flow_layers import covered, fused_of, scale_fn_of, worthwhile
from .stand_in import StandIn, mixin_of

PROJECT = "FrEIA"
CLAMPS = (ScaleFn("atan", bound=1.0), ScaleFn("tanh", bound=1.0), ScaleFn("sigmoid_centered", bound=1.0))
UNKNOWN = "a clamp that is none of ATAN, TANH and SIGMOID"
DOES = "clamp, scale, shift and log-det in one pass"


def clamped(block: Any) -> ScaleFn | None:
    """The scale exp(clamp * f_clamp(s)) of a block."""
    form = scale_fn_of(block.f_clamp, lambda raw: block.f_clamp(raw).exp(), CLAMPS)
    return None if form is None or not block.clamp > 0 else ScaleFn(form.kind, bound=float(block.clamp))


class TwoSided(StandIn):
    """Both halves in turn, each by parameters made of the other."""

    project, does = PROJECT, DOES
    method, takes = "_coupling1", ("x1", "u2")
    has: ClassVar[tuple[str, ...]] = ("clamp", "f_clamp")
    relies_on = ("_coupling2",)
    either: ClassVar[Callable[..., Any]]

    @classmethod
    def reasons(cls, module: Any) -> Iterator[str]:
        if clamped(module) is None:
            yield UNKNOWN

    def _coupling1(self: Any, x1: Tensor, u2: Tensor, rev: bool = False) -> Any:
        found = fused_of(self)(self, x1, u2, rev, 2)
        return self.theirs(x1, u2, rev) if found is None else found

    def _coupling2(self: Any, x2: Tensor, u1: Tensor, rev: bool = False) -> Any:
        found = fused_of(self)(self, x2, u1, rev, 1)
        return self.of_theirs("_coupling2")(x2, u1, rev) if found is None else found


class GLOWCouplingBlock(TwoSided):
    of = "GLOWCouplingBlock"
    has = (*TwoSided.has, "subnet1", "subnet2")

    @staticmethod
    def either(block: Any, x: Tensor, u: Tensor, rev: bool, side: int) -> Any:
        scale_fn = clamped(block)
        if scale_fn is None or not covered(x):
            return None
        return affine_coupling(x, getattr(block, f"subnet{side}")(u), scale_fn=scale_fn, inverse=rev)


class RNVPCouplingBlock(TwoSided):
    of = "RNVPCouplingBlock"
    has = (*TwoSided.has, "subnet_s1", "subnet_t1", "subnet_s2", "subnet_t2")

    @staticmethod
    def either(block: Any, x: Tensor, u: Tensor, rev: bool, side: int) -> Any:
        scale_fn = clamped(block)
        if scale_fn is None or not covered(x):
            return None
        s, t = (getattr(block, f"subnet_{name}{side}")(u) for name in "st")
        return affine_coupling(x, s, t, scale_fn=scale_fn, inverse=rev)


class GINCouplingBlock(TwoSided):
    of, does = "GINCouplingBlock", "clamp, mean, scale and shift in one pass"
    has = GLOWCouplingBlock.has

    @staticmethod
    def either(block: Any, x: Tensor, u: Tensor, rev: bool, side: int) -> Any:
        scale_fn = clamped(block)
        if scale_fn is None or not covered(x):
            return None
        centered = dataclasses.replace(scale_fn, center="channels")
        return affine_coupling(x, getattr(block, f"subnet{side}")(u), scale_fn=centered, inverse=rev)[0], 0.0


class AffineCouplingOneSided(StandIn):
    of, project, does = "AffineCouplingOneSided", PROJECT, f"{DOES}, with split and merge"
    takes, has = ("x", "c", "rev", "jac"), (*TwoSided.has, "subnet", "split_len1", "conditional")

    @classmethod
    def reasons(cls, module: Any) -> Iterator[str]:
        if clamped(module) is None:
            yield UNKNOWN

    def forward(self: Any, x: Any, c: Any = (), rev: bool = False, jac: bool = True) -> Any:
        scale_fn, input = clamped(self), x[0]
        if scale_fn is None or not covered(input):
            return self.theirs(x, c, rev, jac)
        passive = input[:, : self.split_len1]
        params = self.subnet(torch.cat([passive, *c], 1) if self.conditional else passive)
        if self.split_len1 == input.shape[1] // 2:
            y, log_det = affine_coupling(input, params, scale_fn=scale_fn, mask="second_half", inverse=rev)
        else:
            part, log_det = affine_coupling(input[:, self.split_len1 :], params, scale_fn=scale_fn, inverse=rev)
            y = torch.cat([passive, part], 1)
        return (y,), log_det


class ConditionalAffineTransform(StandIn):
    of, project, does = "ConditionalAffineTransform", PROJECT, DOES
    takes, has = ("x", "c", "rev", "jac"), (*TwoSided.has, "subnet")

    @classmethod
    def reasons(cls, module: Any) -> Iterator[str]:
        if clamped(module) is None:
            yield UNKNOWN

    def forward(self: Any, x: Any, c: Any = (), rev: bool = False, jac: bool = True) -> Any:
        scale_fn = clamped(self)
        if scale_fn is None or not c or not covered(x[0]):
            return self.theirs(x, c, rev, jac)
        params = self.subnet(torch.cat(tuple(c), 1) if len(c) > 1 else c[0])
        y, log_det = affine_coupling(x[0], params, scale_fn=scale_fn, inverse=rev)
        return (y,), log_det


class AllInOneBlock(StandIn):
    of, project, does = "AllInOneBlock", PROJECT, f"{DOES}; global scale and shift in the permutation"
    method, takes = "_affine", ("x", "a", "rev")
    relies_on = ("forward", "_permute")
    has = ("clamp", "GIN", "subnet", "global_scale", "global_offset", "w_perm", "w_perm_inv", "permute_function")

    @classmethod
    def reasons(cls, module: Any) -> Iterator[str]:
        if all_in_one_scale(module) is None:
            yield "a clamp that is none of tanh(a / 10) and tanh(a / 10 / clamp)"

    def _affine(self: Any, x: Tensor, a: Tensor, rev: bool = False) -> Any:
        scale_fn = all_in_one_scale(self)
        if scale_fn is None or not covered(x) or a.shape[1] != 2 * x.shape[1]:
            return self.theirs(x, a, rev)
        return affine_coupling(x, a, scale_fn=scale_fn, inverse=rev)

    def _permute(self: Any, x: Tensor, rev: bool = False) -> Any:
        matrix = self.w_perm_inv if rev else self.w_perm
        if not covered(x) or x.dim() < 2 or x.shape[1] != self.global_scale.numel():
            return self.of_theirs("_permute")(x, rev)
        scale, offset, log_det = None, self.global_offset.flatten(), 0.0
        if not self.GIN:
            scale = self.global_scale_activation(self.global_scale).flatten()
            log_det = scale.log().sum()
        if matrix.dim() == 1:  # where each channel goes
            one = torch.ones_like(offset) if scale is None else scale
            x = self.permute_function(x, matrix) if rev else x
            y = actnorm(x, one, offset, inverse=rev)[0]
            return y if rev else self.permute_function(y, matrix), log_det
        matrix = matrix.reshape(len(offset), -1)
        if rev:
            bias = -offset if scale is None else -offset / scale
            matrix = matrix if scale is None else matrix / scale[:, None]
        elif x.dim() > 2:
            return invertible_conv1x1(x, matrix, scale, offset), log_det
        else:  # what the scale and the offset are behind the matrix costs vectors nothing
            bias = matrix @ offset
            matrix = matrix if scale is None else matrix * scale
        return F.linear(x, matrix, bias) if x.dim() == 2 else invertible_conv1x1(x, matrix, bias=bias), log_det


def all_in_one_scale(block: Any) -> ScaleFn | None:
    """exp(clamp * tanh(a / 10)), or exp(clamp * tanh(a / 10 / clamp)) from 0.3 on; GIN: less the mean of a sample."""
    theirs = getattr(block, "parent_class", type(block))._affine

    def scale(raw: Tensor) -> Any:
        plain = types.SimpleNamespace(clamp=2.0, GIN=False, sum_dims=(1,))
        return theirs(plain, torch.ones_like(raw), torch.cat([raw, torch.zeros_like(raw)], 1))[0]

    forms = (ScaleFn("tanh", bound=2.0, gain=0.1), ScaleFn("soft_tanh", bound=2.0, gain=0.1))
    form = scale_fn_of(theirs, scale, forms)
    if form is None or not block.clamp > 0:
        return None
    return dataclasses.replace(form, bound=float(block.clamp), center="sample" if block.GIN else None)


class ActNorm(StandIn):
    """Of 0.2: x * exp(scale) + bias."""

    of, project, does = "ActNorm", PROJECT, "scale, shift and log-det in one pass"
    takes, has = ("x", "rev", "jac"), ("scale", "bias", "init_on_next_batch", "_initialize_with_data")

    def forward(self: Any, x: Any, rev: bool = False, jac: bool = True) -> Any:
        scale, bias = self.scale.flatten(), self.bias.flatten()
        if (
            not worthwhile(x[0])
            or not covered(x[0], scale)
            or x[0].dim() != self.scale.dim()
            or x[0].shape[1] != len(scale)
        ):
            return self.theirs(x, rev, jac)
        if self.init_on_next_batch:
            self._initialize_with_data(x[0])
        y, log_det = actnorm(x[0], scale, bias, log_scale=True, inverse=rev)
        return [y], log_det


class ActNormOfLoc(StandIn):
    """Of later versions: (x - loc) / exp(log_scale)."""

    of, project, does = "ActNorm", PROJECT, "scale and shift in one pass"
    takes, has = ("x", "c", "rev", "jac"), ("log_scale", "loc", "is_initialized", "initialize")

    def forward(self: Any, x: Any, c: Any = None, rev: bool = False, jac: bool = True) -> Any:
        log_scale, input = self.log_scale.flatten(), x[0]
        if c is not None or not covered(input, log_scale) or input.dim() != self.log_scale.dim():
            return self.theirs(x, c, rev, jac)
        if input.shape[1] != len(log_scale) or not worthwhile(input):
            return self.theirs(x, c, rev, jac)
        if not self.is_initialized:
            self.initialize(input)
        y, _ = actnorm(input, log_scale, self.loc.flatten(), log_scale=True, inverse=not rev)
        positions = math.prod(input.shape[2:]) * (1 if rev else -1)
        return (y,), (positions * log_scale.sum()).reshape(1)


class PermuteRandom(StandIn):
    of, project, does = "PermuteRandom", PROJECT, "a copy that leaves samples contiguous"
    takes, has = ("x", "rev", "jac"), ("perm", "perm_inv")

    def forward(self: Any, x: Any, rev: bool = False, jac: bool = True) -> Any:
        if x[0].dim() < 2 or x[0].shape[1] != len(self.perm):
            return self.theirs(x, rev, jac)
        return [x[0].index_select(1, self.perm_inv if rev else self.perm)], 0.0


class IRevNetDownsampling(StandIn):
    of, project, does = "IRevNetDownsampling", PROJECT, "one copy"
    takes, has = ("x", "c", "jac", "rev"), ("block_size", "legacy_backend")
    upwards = False

    @classmethod
    def reasons(cls, module: Any) -> Iterator[str]:
        if module.legacy_backend:
            yield "the legacy backend, with another order of channels"

    def forward(self: Any, x: Any, c: Any = None, jac: bool = True, rev: bool = False) -> Any:
        mixin: Any = mixin_of(self)
        up, factor, input = rev != mixin.upwards, self.block_size, x[0]
        if self.legacy_backend or input.dim() != 4 or not covered(input):
            return self.theirs(x, c, jac, rev)
        if input.shape[1] % factor**2 if up else any(size % factor for size in input.shape[2:]):
            return self.theirs(x, c, jac, rev)
        return (squeeze(input, factor, inverse=up),), 0.0


class IRevNetUpsampling(IRevNetDownsampling):
    of = "IRevNetUpsampling"
    upwards = True


STAND_INS = (
    GLOWCouplingBlock, RNVPCouplingBlock, GINCouplingBlock, AffineCouplingOneSided, ConditionalAffineTransform, AllInOneBlock,
    ActNorm, ActNormOfLoc, PermuteRandom, IRevNetDownsampling, IRevNetUpsampling,
)  # fmt: skip
