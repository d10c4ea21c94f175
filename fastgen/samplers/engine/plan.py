"""`Plan`: a traced trajectory as a coefficient table, and the one kernel call that each of its steps is."""

import functools
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..._dispatch import KERNEL_DTYPES, needs_grad
from ...ops import sampler_step
from ...ops._sampler_step_direct import sampler_step_out
from ..guidance.base import Call
from .prediction import Prediction
from .thresholding import dynamic_threshold
from .trace import Symbol

History = MutableMapping[Symbol, Tensor]
_grad_enabled, _is_compiling = torch.is_grad_enabled, torch.compiler.is_compiling


@dataclass(frozen=True)
class Stage:
    """What one step reads of earlier ones and leaves for later ones.

    Attributes:
        alpha, sigma: the marginal at which the model is called, x = alpha x0 + sigma eps for the x it sees.
        calls_model: False where a step only adds noise.
        between: whether the call is made on the way of a step, after its first.
        interval: the sigmas its noise belongs between.
        reads: kept values, in the order of the table's history columns.
        second, third: whether it has these further outputs.
        leaves: what later steps read of it: the place in (sample, noise, second, third), and its name in the history.
        frees: values nobody reads any more.
        added: d, where the step is x + d g and nothing else: torch's own kernel for that.
    """

    alpha: float
    sigma: float
    calls_model: bool
    between: bool
    interval: tuple[float, float] | None
    reads: tuple[Symbol, ...]
    second: bool
    third: bool
    leaves: tuple[tuple[int, Symbol], ...]
    frees: tuple[Symbol, ...]
    added: float | None = None

    @property
    def keeps_sample(self) -> bool:
        return any(which == 0 for which, _ in self.leaves)

    @property
    def keeps_noise(self) -> bool:
        return any(which == 1 for which, _ in self.leaves)


@dataclass(frozen=True, eq=False)  # tensors inside have no single truth value to compare by
class Plan:
    """A trajectory, worked out: which timesteps, and the coefficients of each step.

    Attributes:
        timesteps: for each step, from noise to image, what the model is called with.
        table: [steps, columns], see :func:`fastgen.samplers.coefficient_table`; on the device of the sample by :meth:`to`.
        draws_noise: for each step whether it takes noise.
        stages: for each step what it reads and leaves.
        prediction: how the clean sample is predicted and clipped.
        clean_table: [2 * steps, columns], rows that write the predicted clean sample, first clipped and then as it is.
        learned_variance: whether the model's output has a second half of channels that scales the noise.
    """

    timesteps: list[float]
    table: Tensor
    draws_noise: list[bool]
    stages: list[Stage]
    prediction: Prediction
    clean_table: Tensor
    learned_variance: bool = False

    def __len__(self) -> int:
        return len(self.timesteps)

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> "Plan":
        """The same plan with the tables on ``device``, in float64 for float64 samples and else in float32."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        tables = self.table.to(device, wide), self.clean_table.to(device, wide)
        return Plan(
            self.timesteps, tables[0], self.draws_noise, self.stages, self.prediction, tables[1], self.learned_variance
        )

    def calls(self) -> list[Call]:
        """What guidance is told at each step; steps that do not call the model are among them."""
        kind = self.prediction.prediction_type
        return [Call(i, len(self), s.alpha, s.sigma, kind) for i, s in enumerate(self.stages)]

    def step(
        self,
        model_output: Tensor,
        i: int,
        sample: Tensor,
        *,
        history: History | None = None,
        uncond: Tensor | None = None,
        noise: Tensor | None = None,
        seeds: Tensor | Sequence[int] | None = None,
        mask: Tensor | None = None,
        known: Tensor | None = None,
        known_noise: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Step i of the trajectory: one call of :func:`fastgen.ops.sampler_step`, whose arguments it takes.

        Args:
            model_output: [N, C, *], or [N, 2C, *] with a learned variance.
            i: 0 <= i < len(self).
            sample: [N, C, *].
            history: what steps leave for later ones: an empty dict, the same for all steps of a trajectory. Solvers of one
                stage and no memory need none.
            uncond: the model's output without the condition, like ``model_output``.
            noise, seeds: used where the step draws noise, and not otherwise.
            mask, known, known_noise: inpainting, broadcastable to ``sample``; see :func:`fastgen.ops.sampler_step`.
            out: where to write the next sample; may be ``sample`` itself where no later step reads that.

        Raises:
            IndexError: ``i`` is past the end.
            TypeError: an argument is no tensor, or not of a dtype that fits.
            ValueError: a step that draws noise got neither noise nor seeds, ``history`` lacks what earlier steps should have
                left, or a shape or device does not fit. Then ``history`` is as it was.
        """
        if not 0 <= i < len(self.stages):
            raise IndexError(f"step must be in [0, {len(self)}), got {i}")
        stage = self.stages[i]
        if not self.draws_noise[i]:
            noise = seeds = None
        elif noise is None:
            if seeds is None:
                raise ValueError(f"step {i} of {len(self)} draws noise: give noise or seeds")
            if stage.keeps_noise:
                raise ValueError(f"step {i} reads its noise again later: give noise, not seeds")
        if history is None and (stage.reads or stage.leaves):
            raise ValueError(f"step {i} shares values with others: give one dict as history to all steps")
        past = _read(stage.reads, history, i) if stage.reads else []
        adds = stage.added is not None and uncond is None
        if (
            (out is None or (adds and out is sample))
            and mask is None
            and known is None
            and known_noise is None
            and self._may_have(sample, model_output, uncond, noise, seeds, past)
        ):
            second = third = None
            if adds and model_output.dtype == sample.dtype:
                following = torch.add(sample, model_output, alpha=stage.added or 0.0, out=out)
            else:
                following = torch.empty_like(sample) if out is None else out
                second = torch.empty_like(sample) if stage.second else None
                third = torch.empty_like(sample) if stage.third else None
                sampler_step_out(
                    sample, model_output, self.table, i, past, noise, following, second, third, uncond=uncond, seeds=seeds,
                )  # fmt: skip
        else:
            inpainting = {"mask": mask, "known": known, "known_noise": known_noise}
            following, second, third = self._checked_step(
                model_output, stage, i, sample, past, uncond, noise, seeds, out, inpainting
            )
        if history is not None:
            for which, symbol in stage.leaves:
                history[symbol] = (sample, noise, second, third)[which]  # type: ignore[assignment]
            for symbol in stage.frees:
                history.pop(symbol, None)
        return following

    def _may_have(
        self,
        sample: Tensor,
        model_output: Tensor,
        uncond: Tensor | None,
        noise: Tensor | None,
        seeds: Tensor | Sequence[int] | None,
        past: list[Tensor],
    ) -> bool:
        """Whether the kernel may have these operands as they are: of one shape and device, and nothing to differentiate.

        All else is for `sampler_step` to convert or refuse, in words; its checks cost ten times as much.
        """
        try:
            shape, device = sample.shape, sample.device
            if (
                device != self._plain_on
                or model_output.device != device
                or model_output.shape != shape
                or model_output.dtype not in KERNEL_DTYPES
                or sample.dtype not in KERNEL_DTYPES
                or not shape
                or _is_compiling()
            ):
                return False
            if noise is not None and (
                noise.shape != shape or noise.device != device or noise.dtype not in KERNEL_DTYPES or seeds is not None
            ):
                return False
            if uncond is not None and (
                uncond.shape != shape or uncond.device != device or uncond.dtype not in KERNEL_DTYPES
            ):
                return False
            if seeds is not None and not (
                isinstance(seeds, Tensor)
                and seeds.dtype == torch.int64
                and seeds.shape == shape[:1]
                and seeds.device == device
                and seeds.is_contiguous()
            ):
                return False
            for tensor in past:
                if tensor.shape != shape or tensor.device != device or tensor.dtype not in KERNEL_DTYPES:
                    return False
        except AttributeError:  # what is no tensor
            return False
        return not (_grad_enabled() and needs_grad(sample, model_output, uncond, noise, *past))

    @functools.cached_property
    def _plain_on(self) -> torch.device | None:
        """Where the kernel may be called without more ado; None where steps split the model's output or look for a threshold."""
        plain = self.prediction.threshold_ratio is None and not self.learned_variance
        return self.table.device if plain else None

    def _checked_step(
        self,
        model_output: Tensor,
        stage: Stage,
        i: int,
        sample: Tensor,
        past: list[Tensor],
        uncond: Tensor | None,
        noise: Tensor | None,
        seeds: Tensor | Sequence[int] | None,
        out: Tensor | None,
        inpainting: dict[str, Tensor | None],
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The next sample and the two further outputs, by :func:`fastgen.ops.sampler_step`, which checks all it is given."""
        variance = None
        if self.learned_variance:
            model_output, variance = _split(model_output, sample, "model_output")
            uncond = None if uncond is None else _split(uncond, sample, "uncond")[0]
        if noise is None and seeds is None:
            variance = None
        threshold = None
        if self.prediction.threshold_ratio is not None and stage.calls_model:
            threshold = self._threshold(model_output, i, sample, uncond)
        results = sampler_step(
            sample, model_output, self.table, i, uncond=uncond, history=past, noise=noise, seeds=seeds, variance=variance,
            threshold=threshold, return_prediction=stage.second, return_corrected=stage.third,
            out=None if out is None else self._outputs(out, sample, stage), **inpainting,
        )  # fmt: skip
        if isinstance(results, Tensor):
            return results, None, None
        following, *kept = results
        return following, kept[0] if stage.second else None, kept[-1] if stage.third else None

    def predicted_sample(self, model_output: Tensor, i: int, sample: Tensor, *, uncond: Tensor | None = None) -> Tensor:
        """The clean sample that step i predicts, clipped as the step clips it, like ``sample``."""
        if not 0 <= i < len(self.stages):
            raise IndexError(f"step must be in [0, {len(self)}), got {i}")
        if self.learned_variance:
            model_output = _split(model_output, sample, "model_output")[0]
            uncond = None if uncond is None else _split(uncond, sample, "uncond")[0]
        threshold = None
        if self.prediction.threshold_ratio is not None:
            threshold = self._threshold(model_output, i, sample, uncond)
        return sampler_step(sample, model_output, self.clean_table, i, uncond=uncond, threshold=threshold)  # type: ignore[return-value]

    def _threshold(self, model_output: Tensor, i: int, sample: Tensor, uncond: Tensor | None) -> Tensor:
        """[N], the bound of each sample's own prediction."""
        clean: Any = sampler_step(sample, model_output, self.clean_table, len(self) + i, uncond=uncond)
        return dynamic_threshold(clean, self.prediction.threshold_ratio or 1.0, self.prediction.sample_max_value)

    @staticmethod
    def _outputs(out: Tensor, sample: Tensor, stage: Stage) -> list[Tensor]:
        return [out] + [torch.empty_like(sample) for wanted in (stage.second, stage.third) if wanted]


def _read(reads: Sequence[Symbol], history: History | None, i: int) -> list[Tensor]:
    if history is None or any(symbol not in history for symbol in reads):
        raise ValueError(f"step {i} reads what earlier steps kept: give one dict as history to all steps, in order")
    return [history[symbol] for symbol in reads]


def _split(output: Tensor, sample: Tensor, name: str) -> tuple[Tensor, Tensor]:
    if not isinstance(output, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(output).__name__}")
    channels = sample.shape[1]
    if output.shape[1] != 2 * channels:
        raise ValueError(
            f"{name} must have {2 * channels} channels (a learned variance beside {channels}), got {output.shape[1]}"
        )
    return output[:, :channels], output[:, channels:]
