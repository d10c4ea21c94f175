"""A finished trace made into a `Plan`: the rows of the coefficient table, and what each step keeps for later ones."""

import math
from collections.abc import Sequence
from numbers import Real

from .plan import Plan, Stage
from .table import coefficient_table
from .trace import Linear, Step, Symbol, Trace

Output = tuple[Symbol, Linear]  # a value written beside the next sample: its name, and what it is
_KINDS = ("sample", "prediction", "model", "noise")


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
    scales = list(guidance_scales) if isinstance(guidance_scales, Sequence) else [guidance_scales] * len(steps)
    for scale in scales:
        check_guidance_scale(scale)
    last_use = _last_uses(steps)
    rows, histories, stages, clean = [], [], [], []
    for i, step in enumerate(steps):
        second, third = _outputs_of(i, step, last_use)
        expressions = [step.result] + ([third[1]] if third else [])
        reads = tuple(sorted({s for e in expressions for s in e.terms if not _own(s, i)}, key=lambda s: (-s[1], s[0])))
        columns = {kind: step.result.terms.get((kind, i), 0.0) for kind in _KINDS}
        row = {**columns, **_conversion(trace, step, i, expressions + ([second[1]] if second else []))}
        row["guidance_scale"] = scales[i]
        row["known"], row["known_noise"] = step.known or (0.0, 0.0)
        if step.log_noise is not None:
            row["log_noise"], row["log_noise_slope"] = step.log_noise
        for name, output in (("output", second), ("corrected", third)):
            for kind in _KINDS[:3]:
                row[f"{name}_{kind}"] = output[1].terms.get((kind, i), 0.0) if output else 0.0
        rows.append(row)
        histories.append([e.terms.get(symbol, 0.0) for e in expressions for symbol in reads])
        clean += [_clean_row(trace, step, scales[i])]
        stages.append(
            Stage(
                alpha=step.alpha * step.scale,
                sigma=step.sigma * step.scale,
                calls_model=step.calls_model,
                between=step.between,
                interval=step.interval,
                reads=reads,
                second=second is not None,
                third=third is not None,
                leaves=_leaves(i, second, third, last_use),
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


def check_guidance_scale(scale: float) -> None:
    """A finite number: NaN would be in every sample."""
    if not isinstance(scale, Real):
        raise TypeError(f"guidance_scale must be a number, got {scale!r}")
    if not math.isfinite(scale):
        raise ValueError(f"guidance_scale must be finite, got {scale}")


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


def _outputs_of(i: int, step: Step, last_use: dict[Symbol, int]) -> tuple[Output | None, Output | None]:
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


def _leaves(
    i: int, second: Output | None, third: Output | None, last_use: dict[Symbol, int]
) -> tuple[tuple[int, Symbol], ...]:
    """As `Stage` has it: of (sample, noise, second, third) those that a later step reads."""
    kept = [symbol if last_use.get(symbol, -1) > i else None for symbol in (("sample", i), ("noise", i))]
    kept += [output[0] if output else None for output in (second, third)]
    return tuple((which, symbol) for which, symbol in enumerate(kept) if symbol is not None)


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
