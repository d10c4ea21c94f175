"""pytorch-generative: causal convolutions, gates, causal attention, and sampling of its autoregressive models."""

from abc import ABC
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import attention, gated_activation
from .masking import RASTER, masked, unmaskable
from .stand_in import StandIn, bare, laid_out_after
from .stepping import steps_of

PROJECT = "pytorch-generative"


class CausalConv2d(StandIn):
    of, project, does = "CausalConv2d", PROJECT, "the taps of the mask alone, the weight left as it is"
    takes, has = ("x",), ("mask", "weight", "kernel_size")

    @classmethod
    def reasons(cls, module: Any) -> Iterator[str]:
        yield from unmaskable(module, module.mask, RASTER)

    def forward(self: Any, x: Tensor) -> Tensor:
        y = masked(self, self.mask, x, RASTER)
        return self.theirs(x) if y is None else y


class GatedActivation(StandIn):
    of, project, does = "GatedActivation", PROJECT, "activation, sigmoid and product in one pass"
    takes, has = ("x",), ("_activation_fn",)

    @classmethod
    def reasons(cls, module: Any) -> Iterator[str]:
        if activation_of(module) is None:
            known = module._activation_fn
            yield f"activation {getattr(known, '__name__', type(known).__name__)}"

    def forward(self: Any, x: Tensor) -> Tensor:
        activation = activation_of(self)
        if activation is None or x.dim() != 4 or x.shape[1] % 2:
            return self.theirs(x)
        return gated_activation(x, activation=activation)


def activation_of(gate: Any) -> str | None:
    """What the op calls the activation of a gate, where nobody looks at its calls."""
    known = gate._activation_fn
    if isinstance(known, nn.Module):
        return {nn.Tanh: "tanh", nn.Identity: "identity"}.get(type(known)) if bare((known,)) else None
    return "tanh" if known in (torch.tanh, F.tanh, Tensor.tanh) else None


class CausalAttention(StandIn):
    of, project, does = "CausalAttention", PROJECT, "attention without the matrix of weights"
    takes = ("x", "extra_x")
    has = ("_n_heads", "_embed_channels", "_out_channels", "_mask_center", "_q", "_kv", "_proj")

    def forward(self: Any, x: Tensor, extra_x: Tensor | None = None) -> Tensor:
        q = self._q(x)
        kv = self._kv(x if extra_x is None else torch.cat((x, extra_x), dim=1))
        k, v = kv.split([self._embed_channels, self._out_channels], dim=1)
        q, k, v = (t.flatten(2).unflatten(1, (self._n_heads, -1)).transpose(2, 3) for t in (q, k, v))  # [N, H, L, E]
        if self._mask_center:  # to all before itself: of the first none, which the op answers with 0 as theirs does
            positions = q.shape[2]
            before = torch.ones(positions, positions, dtype=torch.bool, device=q.device).tril(-1)
            y = attention(q, k, v, before)
        else:
            y = attention(q, k, v, is_causal=True)
        return self._proj(y.transpose(2, 3).reshape(len(x), -1, *x.shape[2:]))


class AutoregressiveModel(StandIn):
    of, project = "AutoregressiveModel", PROJECT
    does = "sample(): each pixel at the cost of a pixel, drawn by its own function"
    method, takes = "sample", ("n_samples", "conditioned_on")
    has = ("_sample_fn", "_get_conditioned_on")

    @classmethod
    def concerns(cls, module: Any) -> bool:
        return laid_out_after(type(module)) is laid_out_after(cls)

    @classmethod
    def reasons(cls, module: Any) -> Iterator[str]:
        if not any(isinstance(each, nn.Conv2d) for each in module.modules()):
            yield "no convolutions: it takes an image for a vector, which is not followed pixel by pixel"

    @torch.no_grad()
    def sample(self: Any, n_samples: int | None = None, conditioned_on: Tensor | None = None) -> Tensor:
        if conditioned_on is None and (n_samples is None or getattr(self, "_c", None) is None):
            return self.theirs(n_samples, conditioned_on)  # which says what is missing
        image: Tensor = self._get_conditioned_on(n_samples, conditioned_on)
        with shape_unlearned(self):
            steps = steps_of(self, image)
        if steps is None:
            return self.theirs(n_samples, conditioned_on)
        n, colors, height, width = image.shape
        for row in range(height):
            for column in range(width):
                drawn = self._sample_fn(steps(image, row, column)).view(n, colors)
                given = image[:, :, row, column]
                image[:, :, row, column] = torch.where(given < 0, drawn, given)
        return image


class AbstractModel(ABC, AutoregressiveModel):
    """The same for classes with ABC before nn.Module, as theirs are: an object only changes its class to one laid out like it."""

    sample = AutoregressiveModel.sample  # here, since ABC, and so what follows it, comes after their classes


@contextmanager
def shape_unlearned(model: Any) -> Iterator[None]:
    """A call of the model in here is not the one from which it takes the shape of its images, as its first call is."""
    if getattr(model, "_c", None) is not None:
        yield
        return
    model._c = 0
    try:
        yield
    finally:
        del model._c


STAND_INS = (CausalConv2d, GatedActivation, CausalAttention, AutoregressiveModel, AbstractModel)
