"""Plans: a module captured, compiled and checked for one size of image, and kept until its weights change.

A plan is checked when it is made: on random images its logits must be those of the module. They are computed in raster order from
what lies before each pixel, so a module that looks ahead cannot pass.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..ops._packed_weights import Seen
from .capture import Captured, NotPlannable, capture, dtype_and_device
from .causality import color_order
from .full_network import FullNetwork
from .network import Convolution
from .program import Program, compile_network

KEPT = 8  # plans of one module, the last used
CHECKED = 4  # images that a plan is checked with, of a batch with a condition
# Largest difference of logits relative to the largest logit, of sums in another order through dozens of layers.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4}
COARSE = 5e-2  # with weights, or a module, in half precision


@dataclass(frozen=True)
class Plan:
    """A module's network as the engine follows it.

    Attributes:
        captured: the network, and how its logits are laid out.
        program: what the engine takes.
        shape: (C, H, W) of an image.
        dtype, device: of the images that the module takes.
        work: multiply-adds of one image.
    """

    captured: Captured
    program: Program
    shape: tuple[int, int, int]
    dtype: torch.dtype
    device: torch.device
    work: int
    condition: Any = field(repr=False, default=None)
    seen: tuple[Seen, ...] | None = field(repr=False, default=None)  # None where nobody counts changes
    modules: tuple[weakref.ref[nn.Module], ...] = field(repr=False, default=())

    @property
    def layout(self) -> tuple[int, bool, bool]:
        """(Logits of a pixel, whether levels come before colors, whether the module tells them apart)."""
        c = self.captured
        return self.program.output_channels, c.levels_first, c.named

    def logits(self, image: Tensor) -> Tensor:
        """[N, O, H, W] of images that are known: every pixel's from what lies before it."""
        p = self.program
        known = torch.ones_like(image, dtype=torch.bool)
        c = self.captured
        strides = (c.color_channels, 1) if c.levels_first else (1, c.levels)  # say which logits are which color's
        levels, draw = p.parameters.new_zeros(2), [1, 1, *strides, 0, 0, 0]  # as if of two levels: nothing is drawn
        image = image.to(p.parameters.dtype).contiguous()
        seeds = torch.zeros(len(image), dtype=torch.int64, device=image.device)
        call = torch.ops.fastgen.incremental_sample.default
        return call(image, known, *p.tensors(), levels, seeds, draw, 1.0, 1.0, p.output_channels, True)[2]

    def steps(self, images: int) -> "Steps":
        """The logits of so many images, pixel by pixel."""
        return Steps(self.program, images)

    def of(self, labels: Tensor) -> "Plan":
        """Of a plan whose condition is labels, each once and in order: for images with these labels, which are among them."""
        if len(self.condition) == 1:
            return self
        at = torch.searchsorted(self.condition, labels)
        constants = tuple(c if len(c) == 1 else c[at] for c in self.program.constants)
        return replace(self, program=replace(self.program, constants=constants))

    def is_of(self, model: nn.Module) -> bool:
        """Whether it is still the module's."""
        tensors, modules = _tensors(model), list(model.modules())
        if self.seen is None or len(tensors) != len(self.seen) or len(modules) != len(self.modules):
            return False
        same = all(seen() is module for seen, module in zip(self.modules, modules, strict=True))
        return same and all(seen.fits(tensor) for seen, tensor in zip(self.seen, tensors, strict=True))


class Steps:
    """Logits of one pixel after another, for whoever draws them by other means: ``steps(image, row, column)`` is [N, O].

    Pixels are asked for in raster order, each once, or once a color where they have turns; the image [N, C, H, W] then holds what
    was drawn before.
    """

    def __init__(self, program: Program, images: int) -> None:
        self.program, self.state = program, program.new_state(images)

    def __call__(self, image: Tensor, row: int, column: int, color: int = 0) -> Tensor:
        p = self.program
        image = image.to(p.parameters.dtype).contiguous()
        call = torch.ops.fastgen.incremental_step.default
        return call(self.state, image, *p.tensors(), row, column, color, p.output_channels)


def plan(
    model: nn.Module,
    shape: Sequence[int],
    *,
    condition: Any = None,
    weights_dtype: torch.dtype | None = None,
) -> Plan:
    """The plan of cached sampling of a module, made at the first call and again when its weights have changed.

    Args:
        model: takes images [N, C, H, W], and ``condition`` where one is given; masked convolutions, 1x1 convolutions, attention,
            activations and sums in any arrangement that computes a pixel's logits from the pixels before it in raster order.
        shape: (N, C, H, W) of the images, or (N, C, T); N counts only beside a condition.
        condition: what the module takes as its second argument. Of labels, integers [N], a plan is made for each label and serves
            any batch of them; of another condition it is made for that alone.
        weights_dtype: in which weights are kept, the module's dtype or for float32 ``torch.bfloat16``: half the memory to read at
            each pixel, at the price of rounding the weights.

    Raises:
        NotPlannable: the module computes something that cannot be told pixel by pixel; the message names the layer and says why.
    """
    if len(shape) not in (3, 4):
        raise ValueError(f"plan: shape must be (N, C, H, W) or (N, C, T), got {tuple(shape)}")
    size = tuple(int(length) for length in shape[1:])
    by_label = _are_labels(condition, int(shape[0]))
    key, wanted = (size, weights_dtype, by_label), condition.unique() if by_label else condition
    kept = _PLANS.setdefault(model, [])
    for index, (of, found) in enumerate(kept):
        if of != key or not found.is_of(model):
            continue
        if bool(torch.isin(wanted, found.condition).all()) if by_label else _equal(wanted, found.condition):
            kept.append(kept.pop(index))
            return found.of(condition) if by_label else found
        if by_label:  # one plan for all labels that are asked for
            wanted = torch.cat([wanted, found.condition]).unique()
    made = _make(model, size, wanted, weights_dtype, len(wanted) if by_label else int(shape[0]))
    kept.append((key, made))
    del kept[:-KEPT]
    return made.of(condition) if by_label else made


_PLANS: "weakref.WeakKeyDictionary[nn.Module, list[tuple[Any, Plan]]]" = weakref.WeakKeyDictionary()


@torch.inference_mode(False)  # in which operations are not taken apart, and so not known
def _make(
    model: nn.Module, size: tuple[int, ...], condition: Any, weights_dtype: torch.dtype | None, images: int
) -> Plan:
    captured = capture(model, (1 if condition is None else images, *size), condition=condition)
    order, shape = color_order(captured), (size[0], 1 if len(size) == 2 else size[1], size[-1])
    if order not in (None, tuple(range(size[0]))):
        raise NotPlannable(
            f"the colors of a pixel hang on one another in the order {order}; they are drawn from the first to the last"
        )
    options = dtype_and_device(model)
    own, device = options.get("dtype", torch.get_default_dtype()), options.get("device", torch.device("cpu"))
    dtype = torch.float64 if own == torch.float64 else torch.float32
    stored = weights_dtype or (torch.bfloat16 if own == torch.bfloat16 else None)
    program = compile_network(captured.network, dtype=dtype, weights_dtype=stored, per_color=order is not None).to(
        device
    )
    tensors = _tensors(model)
    seen = None if any(tensor.is_inference() for tensor in tensors) else tuple(map(Seen, tensors))
    modules = tuple(weakref.ref(module) for module in model.modules())
    made = Plan(captured, program, shape, own, device, _work(captured), _copy(condition), seen, modules)
    _check(made, model, condition, images, TOLERANCES[dtype] if own == dtype and stored in (None, dtype) else COARSE)
    return made


def _check(plan: Plan, model: nn.Module, condition: Any, images: int, tolerance: float) -> None:
    """Raise NotPlannable where the logits of random images, the first of a batch, are not the module's."""
    images = 1 if condition is None else images
    samples = torch.arange(min(images, CHECKED))
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 2, (len(samples), *plan.shape), generator=generator).to(
        plan.device, plan.dtype
    )  # any model's
    shape = (images, *(plan.shape if plan.captured.rank == 4 else (plan.shape[0], plan.shape[2])))
    wanted = FullNetwork(model, shape, condition)(image, samples).double()
    if bool((wanted.isnan() | wanted.isposinf()).any()):
        raise ValueError(
            "plan: the model's logits are not finite: there are NaN or infinities in its weights or its condition"
        )
    constants = tuple(c[: len(samples)] for c in plan.program.constants)  # of every image, or of one that is all's
    found = replace(plan, program=replace(plan.program, constants=constants)).logits(image)
    off = float((found.double() - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30)) if images else 0.0
    if not off <= tolerance:
        message = f"planned logits are {off:.1e} from the module's, relative to the largest, of {tolerance:.0e} allowed"
        raise NotPlannable(f"{message}: does it look ahead, or draw something at random?")


def _are_labels(condition: Any, images: int) -> bool:
    """Whether a condition is an integer for each image."""
    return (
        isinstance(condition, Tensor) and condition.dtype == torch.int64 and condition.shape == (images,) and images > 0
    )


def _work(captured: Captured) -> int:
    network = captured.network
    convolutions = [node for node in network.nodes if isinstance(node, Convolution)]
    return sum(c.weight.numel() * c.height * c.width // c.upscale**2 for c in convolutions)


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _copy(condition: Any) -> Any:
    if isinstance(condition, Tensor):
        return condition.detach().clone()
    return type(condition)(map(_copy, condition)) if isinstance(condition, (list, tuple)) else condition


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    return type(a) is type(b) and not isinstance(a, Tensor) and bool(a == b)
