"""Guidance by projections of each sample: CFG-Zero*, adaptive projected guidance and Perp-Neg."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .base import ALONE, Call, Guidance, Model, Pair, dot, of_means, rows


class ZeroStarGuidance(Guidance):
    """CFG-Zero* (Fan et al. 2025): s uncond + w (cond - s uncond), s = <cond, uncond> / <uncond, uncond> of each sample, and
    the first ``zero_init_calls`` calls are answered by zeros.

    Args:
        model, cond, uncond, guidance_scale: see :class:`ClassifierFreeGuidance`.
        zero_init_calls: how many; the model is not called.
    """

    def __init__(
        self, model: Model, cond: Mapping[str, Any], uncond: Mapping[str, Any], guidance_scale: float, *, zero_init_calls: int = 1
    ) -> None:  # fmt: skip
        self.pair, self.guidance_scale, self.zero_init_calls = (
            Pair(model, cond, uncond),
            guidance_scale,
            zero_init_calls,
        )

    def __call__(self, x: Tensor, t: Tensor, call: Call = ALONE) -> tuple[Tensor, Tensor | None]:
        if call.index < self.zero_init_calls:
            return torch.zeros_like(x), None
        return of_means(x, self._combine, *self.pair.together(x, t)), None

    def _combine(self, cond: Tensor, uncond: Tensor) -> Tensor:
        optimal = rows((dot(cond, uncond) / (dot(uncond, uncond) + 1e-8)).to(cond.dtype), cond) * uncond
        return optimal + self.guidance_scale * (cond - optimal)


class ProjectedGuidance(Guidance):
    """Adaptive projected guidance (Sadat et al. 2024, algorithm 1): of cond - uncond the part along cond, which oversaturates, is
    weighted by ``eta``; the difference may have a momentum and a largest norm.

    Args:
        model, cond, uncond, guidance_scale: see :class:`ClassifierFreeGuidance`.
        eta: weight of the parallel part, 0 in the paper.
        norm_threshold: largest norm of the difference of a sample; None does not bound it.
        momentum: of the running average of differences, negative in the paper; forgotten where a trajectory begins.
    """

    def __init__(
        self,
        model: Model,
        cond: Mapping[str, Any],
        uncond: Mapping[str, Any],
        guidance_scale: float,
        *,
        eta: float = 0.0,
        norm_threshold: float | None = None,
        momentum: float = 0.0,
    ) -> None:
        if norm_threshold is not None and not norm_threshold > 0:
            raise ValueError(f"norm_threshold must be positive, got {norm_threshold}")
        self.pair, self.guidance_scale = Pair(model, cond, uncond), guidance_scale
        self.eta, self.norm_threshold, self.momentum = eta, norm_threshold, momentum
        self._average: Tensor | None = None

    def __call__(self, x: Tensor, t: Tensor, call: Call = ALONE) -> tuple[Tensor, Tensor | None]:
        if call.index == 0:
            self._average = None
        return of_means(x, self._combine, *self.pair.together(x, t)), None

    def _combine(self, cond: Tensor, uncond: Tensor) -> Tensor:
        difference = cond - uncond
        if self.momentum:
            if self._average is not None:
                difference = difference + self.momentum * self._average
            self._average = difference
        if self.norm_threshold is not None:
            norm = dot(difference, difference).sqrt()
            difference = difference * rows((self.norm_threshold / norm).clamp(max=1.0).to(cond.dtype), cond)
        along = dot(difference, cond) / dot(cond, cond)
        update = difference + (self.eta - 1) * rows(along.to(cond.dtype), cond) * cond
        return cond + (self.guidance_scale - 1) * update


class PerpNegGuidance(Guidance):
    """Perp-Neg (Armandpour et al. 2023, equation 5): negative prompts act only perpendicularly to the positive one.

    uncond + w (d - sum_i w_i d_i^perp), with d and d_i the differences of the positive and the negative outputs from uncond and
    d_i^perp the part of d_i perpendicular to d.

    Args:
        model: see :class:`ClassifierFreeGuidance`.
        cond, uncond: keyword arguments of the positive prompt and of none.
        negatives: those of the negative prompts.
        guidance_scale: w.
        weights: w_i, one a negative prompt; 1 each where None.
    """

    def __init__(
        self,
        model: Model,
        cond: Mapping[str, Any],
        uncond: Mapping[str, Any],
        negatives: Sequence[Mapping[str, Any]],
        guidance_scale: float,
        *,
        weights: Sequence[float] | None = None,
    ) -> None:
        self.weights = [1.0] * len(negatives) if weights is None else list(weights)
        if len(self.weights) != len(negatives):
            raise ValueError(f"weights must be one a negative prompt ({len(negatives)}), got {len(self.weights)}")
        self.pair, self.guidance_scale = Pair(model, cond, uncond, *negatives), guidance_scale

    def __call__(self, x: Tensor, t: Tensor, call: Call = ALONE) -> tuple[Tensor, Tensor | None]:
        return of_means(x, self._combine, *self.pair.together(x, t)), None

    def _combine(self, cond: Tensor, uncond: Tensor, *negatives: Tensor) -> Tensor:
        positive = cond - uncond
        total, norm = positive, dot(positive, positive)
        for weight, output in zip(self.weights, negatives, strict=True):
            negative = output - uncond
            along = rows((dot(negative, positive) / norm).to(cond.dtype), cond)
            total = total - weight * (negative - along * positive)
        return uncond + self.guidance_scale * total
