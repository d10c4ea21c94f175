"""What `affine_coupling` means, in plain torch: Dinh et al., "NICE", 2014, and "Density estimation using Real NVP", 2016; the forms
of the scale are those of Glow, 2018, GIN, 2020, nflows, normflows, zuko and FrEIA."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from .._schema import (
    COUPLING_CENTERS,
    COUPLING_CODES,
    COUPLING_LAYOUTS,
    COUPLING_MASKS,
    COUPLING_ORDERS,
    COUPLING_SCALES,
)
from ._check import check_floats, check_main, require
from ._layout import copy_like, dense_strides, empty_like_layout, is_channels_last, opmath_dtype

OP = "affine_coupling"
ATAN = 0.636  # of FrEIA, not 2 / pi
Numbers = tuple[float, float, float, float]  # bound, offset, eps, gain


class _Coupling:
    """A call: what its mask chooses, its shift, and with q = -1 for the inverse of a product or a quotient forwards, else 1:
    the multiplier s^q, its logarithm, and how that changes with the raw scale and with the weight."""

    def __init__(
        self, input: Tensor, raw: Tensor, shift: Tensor | None, weight: Tensor | None, indices: Tensor | None,
        codes: Sequence[int], bound: float, offset: float, eps: float, gain: float,
    ) -> None:  # fmt: skip
        scale, center, order, layout, mask, divide, inverse = codes
        self.dtype, self.mask = opmath_dtype(input.dtype), _Mask(input, indices, mask)
        self.sign = -1 if inverse else 1  # of the shift
        self.power = -1 if bool(divide) != bool(inverse) else 1
        self.shift_last = (COUPLING_ORDERS[order] == "scale_shift") != bool(inverse)
        self.gain, self.layout, self.packed = gain, COUPLING_LAYOUTS[layout], shift is None
        raw, shift = _unpack(raw, self.layout) if shift is None else (raw, shift)
        self.shift, a = gain * shift.to(self.dtype), gain * raw.to(self.dtype)
        w = None if weight is None else weight.to(self.dtype).reshape(-1, *[1] * (input.dim() - 2))
        log, self.slope, self.by_weight = _log_scale(COUPLING_SCALES[scale], a, w, bound, offset, eps)
        if self.mask.keep is not None:  # nothing is read elsewhere
            log = torch.where(self.mask.keep, log, 0)
        self.centered = COUPLING_CENTERS[center]
        self.log = self.power * (log - self.mean(log))
        self.multiplier = torch.exp(self.log)

    def mean(self, values: Tensor) -> Tensor | int:
        """Over the transformed elements of a sample, or of a position; 0 where the scale is not centered."""
        if self.centered is None:
            return 0
        dims = [1] if self.centered == "channels" else list(range(1, values.dim()))
        count = (
            torch.ones_like(values) if self.mask.keep is None else self.mask.keep.expand(values.shape).to(values.dtype)
        )
        return values.sum(dims, keepdim=True) / count.sum(dims, keepdim=True).clamp_min(1)

    def sum(self, values: Tensor) -> Tensor:
        return values.flatten(1).sum(1)


class _Mask:
    """The channels, or the positions, that are transformed."""

    def __init__(self, input: Tensor, indices: Tensor | None, mask: int) -> None:
        channels, name = input.shape[1], COUPLING_MASKS[mask]
        self.first, self.end, self.indices, self.keep = 0, channels, indices, None
        if name == "first_half":
            self.end = channels // 2
        elif name == "second_half":
            self.first = channels // 2
        elif indices is not None:
            _check_indices(indices, channels)
        elif name.startswith("checkerboard"):
            self.keep = checkerboard(input, name == "checkerboard_inverse")

    def select(self, t: Tensor) -> Tensor:
        return t[:, self.first : self.end] if self.indices is None else t.index_select(1, self.indices)

    def merge(self, chosen: Tensor, around: Tensor) -> Tensor:
        """``chosen`` at its place in ``around``."""
        around = around.to(chosen.dtype)
        if self.indices is not None:
            return around.index_copy(1, self.indices, chosen)
        if self.keep is not None:
            return torch.where(self.keep, chosen, around)
        return torch.cat([around[:, : self.first], chosen, around[:, self.end :]], 1)


def checkerboard(input: Tensor, odd: bool) -> Tensor:
    """[H, W]: where h + w is even, or odd."""
    h, w = (torch.arange(n, device=input.device) for n in input.shape[2:])
    return (h[:, None] + w) % 2 == int(odd)


def _check_indices(indices: Tensor, channels: int) -> None:
    inside = bool(((indices >= 0) & (indices < channels)).all())
    require(OP, inside, f"indices must be in [0, {channels}), got {indices.tolist()}")
    require(OP, len(indices.unique()) == len(indices), f"indices must differ, got {indices.tolist()}")


def _unpack(packed: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """(raw scale, shift) of the conditioner's output."""
    if layout.startswith("interleaved"):
        even, odd = packed[:, 0::2], packed[:, 1::2]
        return (odd, even) if layout == "interleaved" else (even, odd)
    first, second = packed.chunk(2, 1)
    return (first, second) if layout == "scale_first" else (second, first)


def _pack(by_raw: Tensor, by_shift: Tensor, layout: str) -> Tensor:
    if layout.startswith("interleaved"):
        return torch.stack([by_shift, by_raw] if layout == "interleaved" else [by_raw, by_shift], 2).flatten(1, 2)
    return torch.cat([by_raw, by_shift] if layout == "scale_first" else [by_shift, by_raw], 1)


def _log_scale(
    kind: str, a: Tensor, w: Tensor | None, bound: float, offset: float, eps: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """log s, its derivative by a, and by w."""
    factor: Tensor | float = bound if w is None else w
    if kind == "exp":
        return a, torch.ones_like(a), None
    if kind == "tanh":
        t = torch.tanh(a)
        return factor * t, factor * (1 - t * t), t
    if kind == "soft_tanh":
        u = a / factor
        t = torch.tanh(u)
        return factor * t, 1 - t * t, t - u * (1 - t * t)
    if kind == "sigmoid_centered":
        t = torch.tanh(a / 2)
        return bound * t, bound / 2 * (1 - t * t), None
    if kind == "atan":
        return bound * ATAN * torch.atan(a), bound * ATAN / (1 + a * a), None
    if kind == "soft_clip":
        d = 1 + (a / bound).abs()
        return a / d, 1 / (d * d), None
    if kind == "sigmoid":
        z = a + offset
        s = torch.sigmoid(z) + eps
        return (
            torch.log(s) if eps else logsigmoid(z),
            torch.sigmoid(z) * torch.sigmoid(-z) / s if eps else torch.sigmoid(-z),
            None,
        )
    s = softplus(a) + eps
    inside = s <= bound
    s = s.clamp_max(bound)
    return torch.log(s), torch.where(inside | a.isnan(), torch.sigmoid(a) / s, 0), None


def affine_coupling_fwd(
    input: Tensor, raw_scale: Tensor, shift: Tensor | None, scale_weight: Tensor | None, indices: Tensor | None,
    codes: Sequence[int], bound: float, offset: float, eps: float, gain: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """In the dtype of the input; the arithmetic and the log-determinant in fp32, or fp64 for fp64 input."""
    c = _Coupling(input, raw_scale, shift, scale_weight, indices, codes, bound, offset, eps, gain)
    x, t = c.mask.select(input).to(c.dtype), c.sign * c.shift
    y = x * c.multiplier + t if c.shift_last else (x + t) * c.multiplier
    log_det = 0 * c.sum(c.log) if c.centered else c.sum(c.log)
    return copy_like(c.mask.merge(y, input), input), log_det.clone()


def affine_coupling_bwd(
    grad_output: Tensor, grad_log_det: Tensor, input: Tensor, raw_scale: Tensor, shift: Tensor | None,
    scale_weight: Tensor | None, indices: Tensor | None, codes: Sequence[int], bound: float, offset: float, eps: float, gain: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """With m the multiplier: d log m = grad x m + grad_log_det, or grad (x + t) m where the shift comes first."""
    c = _Coupling(input, raw_scale, shift, scale_weight, indices, codes, bound, offset, eps, gain)
    x, grad = c.mask.select(input).to(c.dtype), c.mask.select(grad_output).to(c.dtype)
    by_input = grad * c.multiplier
    by_log = by_input * (x if c.shift_last else x + c.sign * c.shift)
    if c.mask.keep is not None:
        by_log = torch.where(c.mask.keep, by_log, 0)
    by_log = by_log - c.mean(by_log) if c.centered else by_log + grad_log_det.reshape(-1, *[1] * (x.dim() - 1))
    by_raw = c.power * c.gain * by_log * c.slope
    by_shift = c.sign * c.gain * (grad if c.shift_last else by_input)
    by_weight = input.new_empty(0, dtype=c.dtype)
    if c.by_weight is not None and scale_weight is not None:
        by_weight = c.power * by_log * c.by_weight
    if c.mask.keep is not None:
        by_raw, by_shift = (torch.where(c.mask.keep, t, 0) for t in (by_raw, by_shift))
        by_weight = torch.where(c.mask.keep, by_weight, 0) if scale_weight is not None else by_weight
    if scale_weight is not None:
        by_weight = by_weight.transpose(0, 1).flatten(1).sum(1).clone()
    in_input = copy_like(c.mask.merge(by_input, grad_output), input)
    if c.packed:
        return in_input, copy_like(_pack(by_raw, by_shift, c.layout), input), input.new_empty(0), by_weight
    return in_input, copy_like(by_raw, input), copy_like(by_shift, input), by_weight


def affine_coupling_additive(input: Tensor, shift: Tensor, indices: Tensor | None, mask: int, inverse: bool) -> Tensor:
    chosen = _Mask(input, indices, mask)
    x, t = (part.to(opmath_dtype(input.dtype)) for part in (chosen.select(input), shift))
    return copy_like(chosen.merge(x - t if inverse else x + t, input), input)


def _transformed(input: Tensor, indices: Tensor | None, mask: int) -> int:
    """C', how many channels raw scale and shift have; checks what says so."""
    require(OP, 0 <= mask < len(COUPLING_MASKS), f"mask must be an index of COUPLING_MASKS, got {mask}")
    name, channels = COUPLING_MASKS[mask], input.shape[1]
    require(OP, (indices is not None) == (name == "indices"), f"indices go with the mask 'indices', got {name!r}")
    if indices is not None:
        fits = indices.dtype == torch.int64 and indices.dim() == 1 and indices.device == input.device
        require(OP, fits, f"indices must be int64 [C'] on {input.device}, got {indices.dtype}, {tuple(indices.shape)}")
        require(OP, 1 <= indices.shape[0] <= channels, f"indices must be 1 to {channels}, got {indices.shape[0]}")
        return indices.shape[0]
    if name.startswith("checkerboard"):
        require(OP, input.dim() == 4, f"input must be [N, C, H, W] for a checkerboard, got shape {tuple(input.shape)}")
    return {"first_half": channels // 2, "second_half": channels - channels // 2}.get(name, channels)


def affine_coupling_fwd_check(
    input: Tensor, raw_scale: Tensor, shift: Tensor | None, scale_weight: Tensor | None, indices: Tensor | None,
    codes: Sequence[int], bound: float, offset: float, eps: float, gain: float,
) -> None:  # fmt: skip
    check_main(OP, "input", input, dims=2)
    require(OP, len(codes) == len(COUPLING_CODES), f"codes must be {COUPLING_CODES}, got {list(codes)}")
    tables = (
        COUPLING_SCALES,
        COUPLING_CENTERS,
        COUPLING_ORDERS,
        COUPLING_LAYOUTS,
        COUPLING_MASKS,
        (False, True),
        (False, True),
    )
    for name, code, table in zip(COUPLING_CODES, codes, tables, strict=True):
        require(OP, 0 <= code < len(table), f"{name} must be in [0, {len(table)}), got {code}")
    scale, center = COUPLING_SCALES[codes[0]], COUPLING_CENTERS[codes[1]]
    require(OP, center is None or scale not in ("sigmoid", "softplus"), f"no center is taken from {scale}")
    channels = _transformed(input, indices, codes[4])
    require(OP, channels >= 1, f"the mask must transform a channel, got input of shape {tuple(input.shape)}")
    shape = (input.shape[0], channels, *input.shape[2:])
    packed = (input.shape[0], 2 * channels, *input.shape[2:])
    check_floats(OP, input, packed if shift is None else shape, raw_scale=raw_scale)
    check_floats(OP, input, shape, shift=shift)
    for name, t in (("raw_scale", raw_scale), ("shift", shift)):
        require(
            OP,
            t is None or t.dtype == input.dtype,
            f"{name} must be {input.dtype}, got {t.dtype if t is not None else t}",
        )
    check_floats(OP, input, (channels,), scale_weight=scale_weight)
    weighted = scale_weight is None or scale in ("tanh", "soft_tanh")
    require(OP, weighted, f"scale_weight goes with tanh and soft_tanh, got {scale}")


def affine_coupling_bwd_check(grad_output: Tensor, grad_log_det: Tensor, input: Tensor, *rest: object) -> None:
    affine_coupling_fwd_check(input, *rest)  # type: ignore[arg-type]
    check_floats(OP, input, tuple(input.shape), grad_output=grad_output)
    require(OP, grad_output.dtype == input.dtype, f"grad_output must be {input.dtype}, got {grad_output.dtype}")
    check_floats(OP, input, (input.shape[0],), grad_log_det=grad_log_det)


def affine_coupling_additive_check(
    input: Tensor, shift: Tensor, indices: Tensor | None, mask: int, inverse: bool
) -> None:
    check_main(OP, "input", input, dims=2)
    channels = _transformed(input, indices, mask)
    require(OP, channels >= 1, f"the mask must transform a channel, got input of shape {tuple(input.shape)}")
    check_floats(OP, input, (input.shape[0], channels, *input.shape[2:]), shift=shift)
    require(OP, shift.dtype == input.dtype, f"shift must be {input.dtype}, got {shift.dtype}")


def affine_coupling_fwd_fake(input: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    return empty_like_layout(input), input.new_empty(input.shape[0], dtype=opmath_dtype(input.dtype))


def affine_coupling_bwd_fake(
    grad_output: Tensor, grad_log_det: Tensor, input: Tensor, raw_scale: Tensor, shift: Tensor | None,
    scale_weight: Tensor | None, *rest: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    wide = opmath_dtype(input.dtype)
    return (
        empty_like_layout(input),
        empty_beside(input, raw_scale),
        input.new_empty(0) if shift is None else empty_beside(input, shift),
        input.new_empty(0 if scale_weight is None else scale_weight.shape, dtype=wide),
    )


def affine_coupling_additive_fake(input: Tensor, *rest: object) -> Tensor:
    return empty_like_layout(input)


def empty_beside(input: Tensor, t: Tensor) -> Tensor:
    """Of the shape of ``t``, channels-last where ``input`` is."""
    strides = dense_strides(t.shape, is_channels_last(input))
    return torch.empty_strided(t.shape, strides, dtype=input.dtype, device=input.device)
