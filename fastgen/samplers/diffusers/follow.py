"""`follow`: a call of a scheduler made into a `Move`, by giving diffusers' own code symbols in place of tensors."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .content import is_operand, key_of
from .move import GIVEN, MODEL_PLACE, NOISE_PLACE, SAMPLE_PLACE, Coefficients, InPlace, Move, Row, Source, Sum
from .symbolic import MODEL, NOISE, ONE, PREDICTION, SAMPLE, Name, NotLinear, Recording, Symbolic
from .twin import Twin

Tensors = Mapping[str, Tensor]
_COLUMNS = {SAMPLE: "sample", PREDICTION: "prediction", MODEL: "model"}


def follow(
    scheduler: Any,
    method: Callable[..., Any],
    hidden: str,
    sample: Tensor,
    model: Tensor | None,
    timestep: Any,
    options: Mapping[str, Any],
) -> tuple[Move, tuple[str, ...]]:
    """The move of a call, and the names of the attributes that it hangs on.

    Args:
        scheduler: stays as it is.
        method: diffusers' function: ``step(scheduler, model, timestep, sample, **options)``, or without a model
            ``scale_model_input(scheduler, sample, timestep)``.
        hidden: an attribute that is not part of the state.

    Raises:
        NotLinear: a row of a coefficient table does not hold what the call does.
    """
    recording = Recording(sample.shape[1])
    symbols = _Symbols()
    forced = {"_threshold_sample": recording.predict_by_threshold} if hasattr(scheduler, "_threshold_sample") else {}
    twin = Twin(scheduler, hidden, symbols.in_place_of, forced)
    function, x = recording.following(method), symbols.symbol(sample, SAMPLE)
    with recording:
        if model is None:
            result = function(twin.self, x, timestep)
        else:
            given = {name: symbols.symbol(value, (GIVEN, name)) for name, value in options.items()}
            result = function(twin.self, symbols.symbol(model, MODEL), timestep, x, **given)
    if twin.loses():
        raise NotLinear("an attribute is gone")
    sets: dict[str, Any] = {}
    for name, value, in_place in twin.changes():
        for element in value if isinstance(value, list) else [value]:
            if not isinstance(element, Symbolic):
                key_of(name, element)  # what it is must be known
        elements = list(value) if isinstance(value, list) else value
        sets[name] = InPlace(elements) if in_place else elements
    move = _Making(sample, recording, symbols).move(sets, result)
    if recording.threshold:
        move.threshold = scheduler.config.dynamic_thresholding_ratio, scheduler.config.sample_max_value
    if model is not None:
        move.number, move.last = _place(scheduler.timesteps.tolist(), timestep, twin.attributes.get("_step_index"))
    return move, twin.reads()


def _place(timesteps: list[float], timestep: Any, index: Any) -> tuple[int, bool]:
    """The place of a step among the timesteps, and whether it is the last; ``index`` is the next one where a scheduler counts."""
    if isinstance(index, int):
        return max(index - 1, 0), index == len(timesteps)
    value = float(timestep)
    return (timesteps.index(value) if value in timesteps else 0), value == timesteps[-1]


class _Symbols:
    """The symbols that stand for the tensors of a call."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[Symbolic, Name]] = {}  # by their ids: what is handed on as it is

    def symbol(self, tensor: Any, name: Name) -> Any:
        """The symbol of a tensor; what is none is handed on."""
        if not isinstance(tensor, Tensor):
            return tensor
        made = Symbolic({name: 1.0}, tensor.dtype, tensor.shape, tensor.device)
        self._made[id(made)] = made, name
        return made

    def in_place_of(self, value: Any, name: str) -> Any:
        """Of an attribute: operands are symbols, lists are new."""
        if isinstance(value, list):
            return [self.symbol(e, (name, i)) if is_operand(e) else e for i, e in enumerate(value)]
        return self.symbol(value, (name, None)) if is_operand(value) else value

    def operand(self, value: Symbolic) -> Name | None:
        """The operand that a value is, or is in another dtype; None where it has to be worked out."""
        if id(value) in self._made:
            return self._made[id(value)][1]
        if len(value.terms) != 1 or value.log_scale is not None:
            return None
        ((name, factor),) = value.terms.items()
        if factor != 1.0 or name == PREDICTION:
            return None
        dtypes = [made.dtype for made, other in self._made.values() if other == name]
        return name if name == NOISE or value.dtype not in dtypes else None


class _Making:
    """A `Move` in the making: which outputs of the kernel hold which values."""

    def __init__(self, sample: Tensor, recording: Recording, symbols: _Symbols) -> None:
        self._sample, self._recording, self._symbols = sample, recording, symbols
        self._places = {SAMPLE: SAMPLE_PLACE, MODEL: MODEL_PLACE, NOISE: NOISE_PLACE}
        self._move = Move(learned_variance=recording.learned_variance, noise_dtype=recording.noise_dtype)
        self._outputs: list[Symbolic | None] = []
        self._later: list[Symbolic] = []

    def move(self, sets: Mapping[str, Any], result: Any) -> Move:
        """The move that sets attributes to these values, and returns this result."""
        fields, kind = _fields(result)
        first = next(iter(fields.values()))
        eager = self._worked_out(_symbols([first, *sets.values()]))
        self._later = [v for v in self._worked_out(fields.values()) if not any(v is other for other in eager)]
        self._outputs = _outputs(eager)
        self._write_rows()
        move = self._move
        move.result = kind
        move.sets = {name: self._source(value) for name, value in sets.items()}
        move.fields = {name: self._source(value) for name, value in fields.items()}
        return move

    def _worked_out(self, values: Iterable[Symbolic]) -> list[Symbolic]:
        """Those that are no operand, each once."""
        found: list[Symbolic] = []
        for value in values:
            if self._symbols.operand(value) is None and not any(value is other for other in found):
                found.append(value)
        return found

    def _source(self, value: Any) -> Any:
        if isinstance(value, InPlace):
            return InPlace([self._source(element) for element in value.elements])
        if type(value) is list:
            return [self._source(element) for element in value]
        if not isinstance(value, Symbolic):
            return value
        name = self._symbols.operand(value)
        if name is not None:
            self._move.keeps_noise |= name == NOISE
            return Source(self._place(name), value.dtype)
        for k, other in enumerate(self._outputs):
            if value is other:
                return Source(k - len(self._outputs), value.dtype)
        number = next(k for k, other in enumerate(self._later) if value is other)
        return Row(number + self._recording.threshold, value.dtype)

    def _place(self, name: Name) -> int:
        """Of an operand in the list of values; only those that are needed are in it."""
        if name not in self._places:
            self._places[name] = len(self._places)
            self._move.reads.append((name[0], name[1]))
        return self._places[name]

    def _write_rows(self) -> None:
        """The coefficients of the kernel, and of what is worked out later."""
        move, recording, later = self._move, self._recording, self._later
        written = [value for value in self._outputs if value is not None]
        for value in [*written, *later]:
            if value.shape != self._sample.shape or value.terms.get(ONE):
                raise NotLinear("a result that is no combination of tensors like the sample")
        move.takes_noise = bool(written and written[0].terms.get(NOISE)) and not any(
            value.terms.get(NOISE) for value in [*written[1:], *later]
        )
        names = dict.fromkeys(name for value in [*written, *later] for name, c in value.terms.items() if c)
        order = [name for name in names if name not in _COLUMNS and not (move.takes_noise and name == NOISE)]
        move.history = [self._place(name) for name in order]
        move.keeps_noise = NOISE in order

        prediction: dict[str, float] = {}
        bounds: dict[str, float] = {}
        if recording.prediction is not None:
            terms = recording.prediction.terms
            prediction = {"prediction_sample": terms.get(SAMPLE, 0.0), "prediction_model": terms.get(MODEL, 0.0)}
            bounds = dict(zip(("clip_min", "clip_max"), recording.bounds, strict=True))

        def history(value: Symbolic) -> list[float]:
            return [value.terms.get(name, 0.0) for name in order]

        first, second, third = self._outputs
        move.written = second is not None, third is not None
        move.dtype = functools.reduce(torch.promote_types, [v.dtype for v in written], self._sample.dtype)
        if first is not None:
            row = {**prediction, **bounds, **_columns(first)}
            if move.takes_noise:
                row["noise"] = first.terms[NOISE]
                row["log_noise"], row["log_noise_slope"] = first.log_scale or (0.0, 0.0)
            if second is not None:
                row |= _columns(second, "output_")
            if third is not None:
                row |= _columns(third, "corrected_")
            move.row = Coefficients([row], [history(first) + (history(third) if third is not None else [])])
            if not prediction and first.log_scale is None and len(written) == 1:
                with contextlib.suppress(NotLinear):
                    move.sum = Sum({self._place(name): factor for name, factor in first.terms.items() if factor != 0})
        rows = [{**prediction, **bounds, **_columns(value)} for value in later]
        histories = [history(value) for value in later]
        if recording.threshold:
            rows, histories = [{**prediction, "prediction": 1.0}, *rows], [[0.0] * len(order), *histories]
        if rows:
            move.later = Coefficients(rows, histories)


def _outputs(eager: list[Symbolic]) -> list[Symbolic | None]:
    """Which value is which output of the kernel: the first may hold anything, the second no history, the third no noise."""
    if not eager:
        return [None, None, None]
    first, *others = sorted(eager, key=lambda value: not value.terms.get(NOISE))
    plain = [value for value in others if all(name in _COLUMNS for name, c in value.terms.items() if c)]
    mixed = [value for value in others if not any(value is other for other in plain)]
    if len(plain) == 2 and not mixed:
        mixed = [plain.pop()]
    if len(plain) > 1 or len(mixed) > 1:
        raise NotLinear(f"{len(eager)} values to write, where a step writes three")
    return [first, plain[0] if plain else None, mixed[0] if mixed else None]


def _columns(value: Symbolic, prefix: str = "") -> dict[str, float]:
    return {prefix + column: value.terms.get(name, 0.0) for name, column in _COLUMNS.items()}


def _symbols(values: Iterable[Any]) -> list[Symbolic]:
    """The symbols among values, and in the lists among them."""
    found: list[Symbolic] = []
    for value in values:
        inside = value.elements if isinstance(value, InPlace) else value if type(value) is list else [value]
        found += [element for element in inside if isinstance(element, Symbolic)]
    return found


def _fields(result: Any) -> tuple[dict[str, Symbolic], type | None]:
    """What a call returns, by name, and the class of the whole."""
    if isinstance(result, Symbolic):
        return {"sample": result}, None
    if isinstance(result, tuple):
        fields: dict[str, Any] = {str(i): value for i, value in enumerate(result)}
        kind: type = tuple
    else:
        fields, kind = dict(result.items()), type(result)
    if not fields or not all(isinstance(value, Symbolic) for value in fields.values()):
        raise NotLinear("a result that is not worked out from the sample and the model's output")
    return fields, kind
