"""The tables of a report as Markdown: every case, means of what belongs together, and what a README says.

Rows that lose look like rows that win; a red one has no figure.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .cases import AS_USED
from .results import Row, baselines, speedup
from .timing import geometric_mean

TORCH = ("eager", "compile")  # the other baselines are peers

_COLUMNS = (
    "case", "measured", "shape", "layout", "dtype", "fastgen", "eager", "compile", "peer", "over eager", "over compile",
    "over peer", "of floor", "GB/s", "check",
)  # fmt: skip


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(header)} |", f"|{'|'.join('---' for _ in header)}|"]
    lines += [f"| {' | '.join(cells)} |" for cells in rows]
    return "\n".join(lines) + "\n"


def seconds_text(seconds: float) -> str:
    """``0.00123`` -> ``1.23 ms``."""
    for limit, factor, unit in ((1e-3, 1e6, "us"), (1.0, 1e3, "ms")):
        if seconds < limit:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds:.3g} s"


def peer(row: Row) -> str | None:
    """The baseline that is neither eager nor compiled torch, the fastest where there are several."""
    found = [name for name in baselines(row) if name not in TORCH]
    return min(found, key=lambda name: row["ratios"][name][0], default=None)


# ---- every case -------------------------------------------------------------------------------------------------------------


def every_case(rows: Sequence[Row]) -> str:
    return table(_COLUMNS, (_cells(row) for row in rows))


def host_times(rows: Sequence[Row]) -> str:
    """What a call costs the Python thread on a GPU, and whether its device time is that of a CUDA graph's replay."""
    lines = [
        [row["id"], name, seconds_text(row["times"][name][0]), "graph" if name in row["captured"] else "events",
         seconds_text(spread[0])]
        for row in rows
        for name, spread in row.get("host", {}).items()
    ]  # fmt: skip
    return table(("case", "provider", "device time", "measured by", "host time a call"), lines) if lines else ""


def set_ups(rows: Sequence[Row]) -> str:
    """What each provider takes before its first call, where that was measured: time, and memory beside the model's own."""
    measured = [row for row in rows if row.get("set_up")]
    names = list(dict.fromkeys(name for row in measured for name in row["set_up"]))
    lines = []
    for row in measured:
        found = [row["set_up"].get(name) for name in names]
        lines.append([row["id"], *(f"{seconds_text(of[0])}, {of[1] / 1e6:.0f} MB" if of else "-" for of in found)])
    return table(("case", *names), lines) if lines else ""


def _cells(row: Row) -> list[str]:
    other = peer(row)

    def time_of(name: str | None) -> str:
        return seconds_text(row["times"][name][0]) if name in row["times"] else "-"

    def ratio_of(name: str | None) -> str:
        ratio = row["ratios"].get(name)
        return f"{ratio[0]:.2f} ({ratio[1]:.2f} to {ratio[2]:.2f})" if ratio else "-"

    floor, ours = row["ratios"].get("floor"), row["times"].get("fastgen")
    verdict = "ok" if row["green"] else "**red**"
    reasons = "; ".join(f"{name}: {reason}" for name, reason in row["red"].items())
    return [
        f"{row['family']} {row['mode'].split(',')[0]}", row["how"], row["shape"], row["layout"], row["dtype"],
        time_of("fastgen"), time_of("eager"), time_of("compile"), f"{other} {time_of(other)}" if other else "-",
        ratio_of("eager"), ratio_of("compile"), ratio_of(other), f"{floor[0]:.2f}" if floor else "-",
        f"{row['min_bytes'] / ours[0] / 1e9:.3g}" if ours else "-", f"{verdict} {reasons}".strip().replace("|", "/"),
    ]  # fmt: skip


# ---- means ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Rows whose mean means something: of one group of cases, measured one way, in one dtype."""

    title: str
    how: str
    dtype: str
    rows: list[Row]

    def speedups(self, baseline: str) -> list[float]:
        """Over eager, compile, peer or fastest: of the rows that have it."""
        found = [speedup(row, peer(row) or "" if baseline == "peer" else baseline) for row in self.rows]
        return [value for value in found if value is not None]

    @property
    def red(self) -> int:
        return sum(not row["green"] for row in self.rows)


def groups(rows: Iterable[Row]) -> list[Group]:
    """In the order of their first rows, those measured as used before the others."""
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["group"], row["how"], row["dtype"]), []).append(row)
    made = [Group(*key, members) for key, members in found.items()]
    return sorted(made, key=lambda group: group.how != AS_USED)


def means(rows: Sequence[Row]) -> str:
    """One line a group and baseline; a red row or one without a baseline is counted, not hidden."""
    lines = []
    for group in groups(rows):
        names = list(dict.fromkeys(name for row in group.rows for name in baselines(row)))
        for baseline in [*names, "fastest"] if len(names) > 1 else names:
            values = group.speedups(baseline)
            words = "the fastest of these" if baseline == "fastest" else baseline
            not_slower = f"{sum(value >= 1 for value in values)} of {len(values)}"
            lines.append(
                [group.title, group.how, group.dtype, words, f"{geometric_mean(values):.2f}", f"{min(values):.2f}",
                 f"{max(values):.2f}", not_slower, str(len(group.rows) - len(values)), str(group.red)]
            )  # fmt: skip
    header = (
        "group", "measured", "dtype", "over", "geometric mean", "lowest", "highest", "rows not slower",
        "rows without figure", "red rows",
    )  # fmt: skip
    return table(header, lines)


def headlines(rows: Sequence[Row]) -> str:
    """The README's table: a line a group, against each kind of baseline and against the fastest there is for each row."""
    columns = {
        "eager": "over eager torch",
        "compile": "over torch.compile",
        "peer": "over the peer",
        "fastest": "over the fastest",
    }
    lines = []
    for group in groups(rows):
        count = f"{len(group.rows)} row{'s' if len(group.rows) > 1 else ''}"
        red = f", {group.red} red" if group.red else ""
        cells = [_headline(group.speedups(baseline), len(group.rows)) for baseline in columns]
        names = sorted({name for row in group.rows if (name := peer(row))})
        cells[2] = f"{', '.join(names)}: {cells[2]}" if cells[2] else ""
        lines.append([f"{group.title}, {group.dtype}, {count}{red}", group.how, *cells])
    return table(("", "measured", *columns.values()), lines)


def _headline(values: Sequence[float], rows: int) -> str:
    if not values:
        return ""
    spread = f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
    missing = f", {len(values)} of {rows} rows" if len(values) < rows else ""
    return f"{geometric_mean(values):.2f}{spread}{missing}"
