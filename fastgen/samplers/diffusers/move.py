"""`Move`: a call of a scheduler as it goes every time from the same state: one kernel, and what it leaves in the attributes.

`follow` finds it by giving diffusers' own code symbols in place of tensors; `Move.run` repeats it.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...ops import philox_normal, sampler_step
from ...ops._sampler_step_direct import sampler_step_out
from ..engine.memory import Recycled
from ..engine.noise import Generators, draw_normal
from ..engine.table import coefficient_table
from ..engine.thresholding import dynamic_threshold
from .output import Later, LazyTuple, lazy
from .symbolic import NotLinear

_ROWS = 1 << 30  # of a table that is one row again and again: the number of a row is the Philox step alone
SAMPLE_PLACE, MODEL_PLACE, NOISE_PLACE = range(
    3
)  # in the list of values, before the other operands and what is written
GIVEN = None  # in place of an attribute: an argument of the call


class Source(NamedTuple):
    """A place in the list of values (sample, model, noise, other operands, the three that are written), and a dtype to cast to."""

    place: int
    dtype: torch.dtype | None = None


class Row(NamedTuple):
    """A value that is worked out when it is asked for, by this row of `Move.later`."""

    number: int
    dtype: torch.dtype


class InPlace(NamedTuple):
    """New elements of a list that stays the object it is."""

    elements: list[Any]


class Coefficients:
    """Rows by name that become a table when one is asked for."""

    def __init__(self, rows: Sequence[Mapping[str, float]], history: Sequence[Sequence[float]]) -> None:
        if any(math.isnan(v) for row in rows for v in row.values()) or any(
            math.isnan(v) for row in history for v in row
        ):
            raise NotLinear("a coefficient that is NaN")
        self._rows, self._history = rows, history
        self._tables: dict[tuple[torch.device, bool], Tensor] = {}

    def like(self, sample: Tensor) -> Tensor:
        """The table, in float64 for a float64 sample; of one row alone, a view of ever the same."""
        key = sample.device, sample.dtype is torch.float64
        table = self._tables.get(key)
        if table is None:
            table = coefficient_table(self._rows, self._history).to(
                sample.device, torch.float64 if key[1] else torch.float32
            )
            table = table.expand(_ROWS, -1) if len(table) == 1 else table
            self._tables[key] = table
        return table


class Sum:
    """A multiple of a value, or a value and a multiple of another: one call of torch.

    Raises:
        NotLinear: more than one call would be needed.
    """

    def __init__(self, terms: Mapping[int, float]) -> None:
        (self._first, one), *rest = sorted(terms.items(), key=lambda term: term[1] != 1.0)
        if len(rest) > 1 or (rest and one != 1.0):
            raise NotLinear("a sum of several products")
        self._second: int | None = rest[0][0] if rest else None
        self._factor = rest[0][1] if rest else one
        # a tensor as factor costs less than a Python number, which torch makes one of in each call
        self._scalar = torch.tensor(self._factor, dtype=torch.float64)

    def fits(self, values: Sequence[Any], dtype: torch.dtype) -> bool:
        """Whether the operands are there and have the dtype of the result."""
        for place in (self._first,) if self._second is None else (self._first, self._second):
            if values[place] is None or values[place].dtype is not dtype:
                return False
        return True

    def of(self, values: Sequence[Tensor], pool: Recycled) -> Tensor:
        first = values[self._first]
        out = pool.like(first) if pool.keeps(first) else None
        if self._second is not None:
            return torch.add(first, values[self._second], alpha=self._factor, out=out)
        return first * self._scalar if out is None else torch.mul(first, self._scalar, out=out)


class Unfit(Exception):
    """A tensor is not of the shape that the others have."""


@dataclass(eq=False)
class Move:
    """What a call does, with the tensors left open.

    Attributes:
        reads: (attribute, place in it or None), or (`GIVEN`, argument), of the operands beside sample, model and noise.
        sets: attributes and their new values, in which a `Source` stands for a tensor.
        result: the class of the output; tuple, or None where a tensor is returned by itself.
        fields: what is returned, by name: a `Source`, a `Row`, or None.
        row: of the kernel; None where nothing is computed.
        later: rows of what is worked out when it is asked for; the first, where there is a threshold, is what that looks at.
        history: places of the operands that it combines.
        dtype: in which the kernel writes.
        written: whether it writes its second and third output.
        takes_noise, keeps_noise: whether the row has noise in its own column; whether it is needed as a tensor.
        noise_dtype: in which noise is drawn; None where it is not.
        number: the place of the timestep among all.
        last: whether the trajectory ends here.
        threshold: (quantile, largest bound) of dynamic thresholding.
        learned_variance: whether the second half of the model's output is one.
        sum: what is computed, where one call of torch does all of it.
    """

    reads: list[tuple[str | None, Any]] = field(default_factory=list)
    sets: dict[str, Any] = field(default_factory=dict)
    result: type | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    row: Coefficients | None = None
    later: Coefficients | None = None
    history: list[int] = field(default_factory=list)
    dtype: torch.dtype = torch.float32
    written: tuple[bool, bool] = (False, False)
    takes_noise: bool = False
    keeps_noise: bool = False
    noise_dtype: torch.dtype | None = None
    number: int = 0
    last: bool = False
    threshold: tuple[float, float] | None = None
    learned_variance: bool = False
    sum: "Sum | None" = None

    def run(
        self,
        attributes: dict[str, Any],
        pool: Recycled,
        sample: Tensor,
        model: Tensor | None,
        given: Mapping[str, Any],
        generator: Generators = None,
        seeds: Tensor | None = None,
    ) -> Any:
        """The call: writes to ``attributes``, and returns what diffusers returns.

        Raises:
            Unfit: an operand has another shape; nothing has happened yet.
        """
        values: list[Any] = [sample, model, None]
        variance = None
        if self.learned_variance and model is not None:
            values[1], variance = model.split(sample.shape[1], dim=1)
        for name, place in self.reads:
            value = given[place] if name is GIVEN else attributes[name] if place is None else attributes[name][place]
            if value.shape != sample.shape:
                raise Unfit
            values.append(value)
        if self.noise_dtype is not None:
            if seeds is None:
                values[2] = draw_normal(sample.shape, generator, sample.device, self.noise_dtype)
            elif self.keeps_noise:
                values[2] = philox_normal(seeds, sample.shape, self.number, dtype=self.noise_dtype)
        threshold = None if self.threshold is None else self._bound(values)
        if self.sum is not None and self.sum.fits(values, self.dtype):
            values += [self.sum.of(values, pool), None, None]
        elif self.row is not None:
            values += self._written(values, variance, seeds, threshold, pool)
        constants, others = self._sets
        attributes.update(constants)
        for name, value in others:
            kind = type(value)
            if kind is Source:
                attributes[name] = _taken(value, values)
            elif kind is InPlace:
                attributes[name][:] = [_taken(element, values) for element in value.elements]
            else:
                attributes[name] = [_taken(element, values) for element in value]
        if self.last:
            pool.release()
        return self._returned(values, threshold)

    @functools.cached_property
    def _sets(self) -> tuple[dict[str, Any], list[tuple[str, Any]]]:
        """``sets``: what is the same each time, and what is made of tensors or a list of its own."""
        others = [(name, value) for name, value in self.sets.items() if type(value) in (Source, InPlace, list)]
        names = [name for name, _ in others]
        return {name: value for name, value in self.sets.items() if name not in names}, others

    def _written(
        self,
        values: list[Any],
        variance: Tensor | None,
        seeds: Tensor | None,
        threshold: Tensor | None,
        pool: Recycled,
    ) -> list[Tensor | None]:
        """The three outputs of the kernel, None for those it does not write."""
        sample, model, noise = values[:3]
        if sample.dtype is not self.dtype:
            sample = sample.to(self.dtype)
        out = pool.like(sample)
        second = pool.like(sample) if self.written[0] else None
        third = pool.like(sample) if self.written[1] else None
        if not self.takes_noise:
            noise = seeds = None
        elif noise is not None:
            seeds = None
        table = self.row.like(sample)  # type: ignore[union-attr]
        sampler_step_out(
            sample, sample if model is None else model, table, self.number, [values[i] for i in self.history], noise,
            out, second, third, seeds=seeds, variance=variance, threshold=threshold,
        )  # fmt: skip
        return [out, second, third]

    def _bound(self, values: list[Any]) -> Tensor:
        """[N], what divides each sample's prediction."""
        ratio, max_value = self.threshold or (0.0, 0.0)
        return dynamic_threshold(self._at_row(Row(0, values[0].dtype), values, None), ratio, max_value)

    def _at_row(self, row: Row, values: list[Any], threshold: Tensor | None) -> Tensor:
        sample, model = values[:2]
        wide = sample.to(torch.promote_types(sample.dtype, row.dtype))
        history = [values[i] for i in self.history]
        table = self.later.like(wide)  # type: ignore[union-attr]
        result: Any = sampler_step(wide, model, table, row.number, history=history, threshold=threshold)
        return result.to(row.dtype)

    def _returned(self, values: list[Any], threshold: Tensor | None) -> Any:
        if len(self.fields) == 1 and (self.result is tuple or self.result is None):
            (source,) = self.fields.values()
            return (_taken(source, values),) if self.result is tuple else _taken(source, values)
        found = [
            Later(functools.partial(self._work_out, name, source, values, threshold, self._versions(values)))
            if type(source) is Row
            else _taken(source, values)
            for name, source in self.fields.items()
        ]
        if self.result is tuple:
            return LazyTuple(found)
        return lazy(self.result)(**dict(zip(self.fields, found, strict=True)))

    def _versions(self, values: list[Any]) -> list[int]:
        """Of the operands: how often they have been changed; tensors of inference mode do not say."""
        try:
            return [values[0]._version, values[1]._version, *[values[i]._version for i in self.history]]
        except RuntimeError:
            return []

    def _work_out(
        self, name: str, row: Row, values: list[Any], threshold: Tensor | None, versions: list[int]
    ) -> Tensor:
        if self._versions(values) != versions:
            raise RuntimeError(
                f"{name} is worked out when it is asked for, and the model's output or the sample of this step has been "
                "changed in place since: read it right after the step"
            )
        return self._at_row(row, values, threshold)


def _taken(value: Any, values: list[Any]) -> Any:
    if type(value) is not Source:
        return value
    tensor = values[value.place]
    return tensor if value.dtype is None or tensor.dtype is value.dtype else tensor.to(value.dtype)
