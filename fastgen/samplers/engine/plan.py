"""`Plan`: a traced trajectory as a coefficient table, and the one kernel call that each of its steps is."""

import math
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..._dispatch import KERNEL_DTYPES, needs_grad
from ...ops import sampler_step
from ..guidance.base import Call
from .prediction import Prediction
from .table import coefficient_table
from .thresholding import dynamic_threshold
from .trace import Linear, Step, Symbol, Trace

History = MutableMapping[Symbol, Tensor]
_grad_enabled = torch.is_grad_enabled
_sampler_step_out: Any = torch.ops.fastgen.sampler_step_out.default


@dataclass(frozen=True)
class Stage:
    """What one step reads of earlier ones and leaves for later ones.

    Attributes:
        alpha, sigma: the marginal at which the model is called, x = alpha x0 + sigma eps for the x it sees.
        calls_model: False where a step only adds noise.
        between: whether the call is made on the way of a step, after its first.
        interval: the sigmas its noise belongs between.
        reads: kept values, in the order of the table's history columns.
        second, third: the values its further outputs are.
        keeps_sample, keeps_noise: whether later steps read this one's sample or noise.
        frees: values nobody reads any more.
        added: d, where the step is x + d g and nothing else: torch's own kernel for that.
    """

    alpha: float
    sigma: float
    calls_model: bool
    between: bool
    interval: tuple[float, float] | None
    reads: tuple[Symbol, ...]
    second: Symbol | None
    third: Symbol | None
    keeps_sample: bool
    keeps_noise: bool
    frees: tuple[Symbol, ...]
    added: float | None = None


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
    plain: bool = field(init=False, default=True)  # nothing is to be done before the kernel

    def __post_init__(self) -> None:
        plain = self.prediction.threshold_ratio is None and not self.learned_variance
        object.__setattr__(self, "plain", plain)

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
        out: Tensor | None = None,
        **kwargs: Any,
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
            out: where to write the next sample; may be ``sample`` itself where no later step reads that.

        Raises:
            IndexError: ``i`` is past the end.
            ValueError: a step that draws noise got neither noise nor seeds, ``history`` lacks what earlier steps should have
                left, or a shape does not fit.
        """
        self._check_index(i)
        stage = self.stages[i]
        variance = None
        if self.learned_variance:
            model_output, variance = _split(model_output, sample, "model_output")
            uncond = None if uncond is None else _split(uncond, sample, "uncond")[0]
        if not self.draws_noise[i]:
            noise = seeds = variance = None
        elif noise is None and seeds is None:
            raise ValueError(f"step {i} of {len(self)} draws noise: give noise or seeds")
        past = _read(stage.reads, history, i)
        threshold = None
        if self.prediction.threshold_ratio is not None and stage.calls_model:
            threshold = self._threshold(model_output, i, sample, uncond)
        if stage.keeps_noise:
            if noise is None:
                raise ValueError(f"step {i} reads its noise again later: give noise, not seeds")
            _write(history, ("noise", i), noise, i)
        if stage.keeps_sample:
            _write(history, ("sample", i), sample, i)
        results = sampler_step(
            sample, model_output, self.table, i, uncond=uncond, history=past, noise=noise, seeds=seeds, variance=variance,
            threshold=threshold, return_prediction=stage.second is not None, return_corrected=stage.third is not None,
            out=None if out is None else self._outputs(out, sample, stage), **kwargs,
        )  # fmt: skip
        if isinstance(results, Tensor):
            following = results
        else:
            following, *kept = results
            for symbol, value in zip([s for s in (stage.second, stage.third) if s is not None], kept, strict=True):
                _write(history, symbol, value, i)
        if history is not None:
            for symbol in stage.frees:
                history.pop(symbol, None)
        return following

    def advance(
        self,
        model_output: Tensor,
        i: int,
        sample: Tensor,
        history: History,
        noise: Tensor | None = None,
        seeds: Tensor | Sequence[int] | None = None,
    ) -> Tensor:
        """`step` by the shortest way where there is nothing to differentiate, threshold or split: it costs a third less."""
        stage = self.stages[i]
        if (
            not self.plain
            or (seeds is not None and not (isinstance(seeds, Tensor) and seeds.dtype == torch.int64))
            or model_output.shape != sample.shape
            or model_output.device != sample.device
            or sample.dtype not in KERNEL_DTYPES
            or (_grad_enabled() and needs_grad(sample, model_output, noise, *history.values()))
        ):
            return self.step(model_output, i, sample, history=history, noise=noise, seeds=seeds)
        added = stage.added
        if added is not None and model_output.dtype == sample.dtype:
            return torch.add(sample, model_output, alpha=added)
        if stage.keeps_sample:
            history["sample", i] = sample
        if stage.keeps_noise and noise is not None:
            history["noise", i] = noise
        second, third = stage.second, stage.third
        past = [history[symbol] for symbol in stage.reads] if stage.reads else []
        following = torch.empty_like(sample)
        kept = corrected = None
        if second is not None:
            kept = history[second] = torch.empty_like(sample)
        if third is not None:
            corrected = history[third] = torch.empty_like(sample)
        _sampler_step_out(
            sample, model_output, self.table, i, None, past, noise, seeds, None, None, None, None, None, following, kept, corrected,
        )  # fmt: skip
        for symbol in stage.frees:
            history.pop(symbol, None)
        return following

    def predicted_sample(self, model_output: Tensor, i: int, sample: Tensor, *, uncond: Tensor | None = None) -> Tensor:
        """The clean sample that step i predicts, clipped as the step clips it, like ``sample``."""
        self._check_index(i)
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

    def _check_index(self, i: int) -> None:
        if not 0 <= i < len(self):
            raise IndexError(f"step must be in [0, {len(self)}), got {i}")

    @staticmethod
    def _outputs(out: Tensor, sample: Tensor, stage: Stage) -> list[Tensor]:
        return [out] + [torch.empty_like(sample) for symbol in (stage.second, stage.third) if symbol is not None]


def compile_trace(
    trace: Trace, *, guidance_scales: Sequence[float] | float = 1.0, learned_variance: bool = False
) -> Plan:
    """The table of a finished trace, and what its steps keep for each other.

    Args:
        guidance_scales: w of classifier-free guidance, one or one a step, applied where a step is given ``uncond``.
        learned_variance: see :class:`Plan`.

    Raises:
        ValueError: a step would have to keep more than its two further outputs hold.
    """
    steps = trace.steps
    if isinstance(guidance_scales, (int, float)):
        guidance_scales = [float(guidance_scales)] * len(steps)
    last_use = _last_uses(steps)
    rows, histories, stages, clean = [], [], [], []
    for i, step in enumerate(steps):
        second, third = _outputs_of(i, step, last_use)
        expressions = [step.result] + ([third[1]] if third else [])
        reads = tuple(sorted({s for e in expressions for s in e.terms if not _own(s, i)}, key=lambda s: (-s[1], s[0])))
        columns = {kind: step.result.terms.get((kind, i), 0.0) for kind in _KINDS}
        row = {**columns, **_conversion(trace, step, i, expressions + ([second[1]] if second else []))}
        row["guidance_scale"] = guidance_scales[i]
        row["known"], row["known_noise"] = step.known or (0.0, 0.0)
        if step.log_noise is not None:
            row["log_noise"], row["log_noise_slope"] = step.log_noise
        for name, output in (("output", second), ("corrected", third)):
            for kind in _KINDS[:3]:
                row[f"{name}_{kind}"] = output[1].terms.get((kind, i), 0.0) if output else 0.0
        rows.append(row)
        histories.append([e.terms.get(symbol, 0.0) for e in expressions for symbol in reads])
        clean += [_clean_row(trace, step, guidance_scales[i])]
        stages.append(
            Stage(
                alpha=step.alpha * step.scale,
                sigma=step.sigma * step.scale,
                calls_model=step.calls_model,
                between=step.between,
                interval=step.interval,
                reads=reads,
                second=second[0] if second else None,
                third=third[0] if third else None,
                keeps_sample=last_use.get(("sample", i), -1) > i,
                keeps_noise=last_use.get(("noise", i), -1) > i,
                added=_added(step, i, bool(second or third), last_use),
                frees=tuple(symbol for symbol, use in last_use.items() if use == i and not _own(symbol, i)),
            )
        )
    width = max(map(len, histories))
    table = coefficient_table(rows, [h + [0.0] * (width - len(h)) for h in histories])
    unclipped = [{k: v for k, v in row.items() if not k.startswith("clip")} for row in clean]
    return Plan(
        [step.timestep for step in steps],
        table,
        [step.draws_noise for step in steps],
        stages,
        trace.prediction,
        coefficient_table(clean + unclipped),
        learned_variance,
    )


_KINDS = ("sample", "prediction", "model", "noise")


def _added(step: Step, i: int, keeps: bool, last_use: dict[Symbol, int]) -> float | None:
    terms = {symbol: value for symbol, value in step.result.terms.items() if value != 0}
    alone = terms.keys() == {("sample", i), ("model", i)} and terms["sample", i] == 1.0
    return terms["model", i] if alone and not keeps and last_use.get(("sample", i), -1) <= i else None


def _own(symbol: Symbol, i: int) -> bool:
    return symbol[0] != "kept" and symbol[1] == i


def _last_uses(steps: Sequence[Step]) -> dict[Symbol, int]:
    """For each symbol the last step whose result or kept values need it; kept values that nobody needs are not there."""
    kept = {symbol: (i, value) for i, step in enumerate(steps) for symbol, value in step.keeps.items()}
    last: dict[Symbol, int] = {}

    def use(expression: Linear, i: int) -> None:
        for symbol in expression.terms:
            first = symbol not in last
            last[symbol] = max(last.get(symbol, -1), i)
            if symbol in kept and first:
                use(kept[symbol][1], kept[symbol][0])

    for i, step in enumerate(steps):
        use(step.result, i)
    return last


def _outputs_of(
    i: int, step: Step, last_use: dict[Symbol, int]
) -> tuple[tuple[Symbol, Linear] | None, tuple[Symbol, Linear] | None]:
    """The values step i writes beside its sample: the second output has no history in it, the third may."""
    wanted = [(symbol, value) for symbol, value in step.keeps.items() if last_use.get(symbol, -1) > i]
    for kind in ("prediction", "model"):
        if last_use.get((kind, i), -1) > i:
            wanted.append(((kind, i), Linear({(kind, i): 1.0})))
    plain = [entry for entry in wanted if all(_own(s, i) for s in entry[1].terms)]
    mixed = [entry for entry in wanted if entry not in plain]
    if len(plain) == 2 and not mixed:
        mixed = [plain.pop()]
    if len(plain) > 1 or len(mixed) > 1:
        raise ValueError(f"step {i} keeps {len(wanted)} values, one without and one with history are possible")
    return (plain[0] if plain else None), (mixed[0] if mixed else None)


def _conversion(trace: Trace, step: Step, i: int, expressions: Sequence[Linear]) -> dict[str, float]:
    """The columns of the prediction, where anything takes it."""
    if not step.calls_model or not any(("prediction", i) in e.terms for e in expressions):
        return {}
    return _conversion_columns(trace, step)


def _conversion_columns(trace: Trace, step: Step) -> dict[str, float]:
    prediction = trace.prediction
    p, q = prediction.to_sample(step.alpha, step.sigma)
    columns = {"prediction_sample": p / step.scale, "prediction_model": q}
    bound = 1.0 if prediction.threshold_ratio is not None else prediction.clip
    return columns if bound is None else {**columns, "clip_min": -bound, "clip_max": bound}


def _clean_row(trace: Trace, step: Step, guidance_scale: float) -> dict[str, float]:
    columns = {"prediction": 1.0, "guidance_scale": guidance_scale}
    if not step.calls_model:
        return columns
    try:
        return {**columns, **_conversion_columns(trace, step)}
    except ValueError:  # a model that says nothing about the sample here; its solver does not ask either
        return {**columns, "prediction": math.nan}


def _read(reads: Sequence[Symbol], history: History | None, i: int) -> list[Tensor]:
    if not reads:
        return []
    missing = [symbol for symbol in reads if history is None or symbol not in history]
    if history is None or missing:
        raise ValueError(f"step {i} reads what earlier steps kept: give one dict as history to all steps, in order")
    return [history[symbol] for symbol in reads]


def _write(history: History | None, symbol: Symbol, value: Tensor, i: int) -> None:
    if history is None:
        raise ValueError(f"step {i} keeps values for later ones: give one dict as history to all steps")
    history[symbol] = value


def _split(output: Tensor, sample: Tensor, name: str) -> tuple[Tensor, Tensor]:
    channels = sample.shape[1]
    if output.shape[1] != 2 * channels:
        raise ValueError(
            f"{name} must have {2 * channels} channels (a learned variance beside {channels}), got {output.shape[1]}"
        )
    return output[:, :channels], output[:, channels:]
