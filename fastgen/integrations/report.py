"""`report`: what of a model runs on fastgen's kernels, what does not, and why."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from . import scheduler
from .stand_in import mixin_of
from .walk import modules, parts, stand_in_for

NOT_ASKED = "could be, but accelerate was not asked to, or exactly"


class Row(NamedTuple):
    """A module, or a pipeline's scheduler: its name, its class, whether it is accelerated, and by what or why not."""

    name: str
    kind: str
    accelerated: bool
    detail: str


@dataclass(frozen=True)
class Report:
    """All rows, in the order of the model; as text a table with a line for all modules that share class and detail."""

    rows: tuple[Row, ...]

    @property
    def accelerated(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.accelerated)

    @property
    def left_alone(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if not row.accelerated)

    def __str__(self) -> str:
        if not self.rows:
            return "fastgen: nothing here that it knows how to accelerate"
        lines = []
        for title, rows in (("accelerated", self.accelerated), ("left alone", self.left_alone)):
            groups: dict[tuple[str, str], list[str]] = {}
            for row in rows:
                groups.setdefault((row.kind, row.detail), []).append(row.name or "(the model)")
            lines += [(title, str(len(rows)), "", "", "")] if rows else []
            lines += [("", str(len(names)), kind, detail, _some(names)) for (kind, detail), names in groups.items()]
        widths = [max(len(line[i]) for line in lines) for i in range(4)]
        return "\n".join(
            f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:<{widths[2]}}  {d:<{widths[3]}}  {e}".rstrip()
            for a, b, c, d, e in lines
        )


def report(model: Any) -> Report:
    """Print, and return, what of a model or pipeline is accelerated, and what fastgen knows of and left alone, and why.

    Raises:
        TypeError: ``model`` is neither a module nor a pipeline with ``components``.
    """
    found = Report(tuple(_rows(model)))
    print(found)
    return found


def _rows(model: Any) -> Iterator[Row]:
    for name, module in reversed(list(modules(model))):
        mixin, why = stand_in_for(module)
        if mixin is not None:
            is_one = mixin_of(module) is not None
            yield Row(
                name,
                type(module).__qualname__,
                is_one,
                mixin.says(module) if is_one else "could be; accelerate was not asked to",
            )
        elif why:
            yield Row(name, type(module).__qualname__, False, "; ".join(why))
    for name, part in parts(model):
        if scheduler.known(part):
            fused = scheduler.is_fused(part)
            detail = "each step one kernel" if fused else scheduler.refusal(part) or NOT_ASKED
            yield Row(name, type(part).__qualname__, fused, detail)


def _some(names: list[str]) -> str:
    return names[0] + (", ..." if len(names) > 1 else "")
