"""The pictures of a machine's results, from the files alone: the speed-ups of a family each, and one roofline.

Needs matplotlib. Colours are those of Okabe and Ito, which colour-blind readers tell apart; shapes of the marks say the same.
"""

import math
import re
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, NullLocator

from fastgen._files import write_atomically

from .results import Document, Row, baselines, fastest_baseline, speedup
from .tables import TORCH

COLOURS = {"eager": "#D55E00", "compile": "#009E73", "peer": "#0072B2"}
MARKERS = {"eager": "s", "compile": "^", "peer": "o"}
FAMILY_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999", "#8C564B")
FAMILY_MARKERS = "osD^vP*Xh"
GREY = "#555555"
_ROW_INCHES, _WIDTH = 0.21, 10.0
_STYLE = {"font.size": 10, "axes.titlesize": 12, "axes.spines.top": False, "axes.spines.right": False}
NOT_MEMORY = ("dispatch",)  # a call's cost, not its traffic
STANDING_OUT = 4  # rows of the roofline that get a number at either end


def draw(documents: Sequence[Document], out: Path) -> None:
    """Write ``<family>.png`` for each family, and ``roofline.png``."""
    with matplotlib.rc_context(_STYLE):
        for document in documents:
            _save(speed_ups(document), out / f"{document['family']}.png")
        _save(roofline(documents), out / "roofline.png")


def _save(figure: Figure, path: Path) -> None:
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    write_atomically(path, lambda temporary: temporary.write_bytes(buffer.getvalue()))


def _where(documents: Sequence[Document]) -> str:
    machine = documents[0]["machine"]
    commits = ", ".join(dict.fromkeys((document["commit"]["id"] or "unknown")[:8] for document in documents))
    return f"{machine['name']}, commit {commits}"


# ---- speed-ups of a family --------------------------------------------------------------------------------------------------


def kind(provider: str) -> str:
    """The legend entry of a baseline: peers share one."""
    return provider if provider in TORCH else "peer"


def speed_ups(document: Document) -> Figure:
    """A line a row on one logarithmic axis, the greatest speed-up over the fastest baseline first; red rows last."""
    rows = sorted(document["rows"], key=lambda row: -(speedup(row, "fastest") or 0.0))
    figure = Figure(figsize=(_WIDTH, 1.7 + _ROW_INCHES * max(len(rows), 3)), layout="constrained")
    axis = figure.subplots()
    axis.set_title(f"{document['family']}: times of the others over fastgen's\n{_where([document])}", loc="left")
    low, high = _limits(rows)
    axis.set_xscale("log")
    axis.set_xlim(low, high)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    ticks = log_ticks(low, high)
    axis.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.grid(axis="x", color="#e4e4e4", linewidth=0.8)
    axis.axvline(1, color="black", linewidth=1.2)
    names: dict[str, list[str]] = {}
    for place, row in enumerate(rows):
        for name in baselines(row):
            names.setdefault(kind(name), []).append(name)
        _row(axis, place, row)
    axis.set_yticks(range(len(rows)), [_label(row) for row in rows], fontsize=9)
    axis.tick_params(axis="y", length=0)
    axis.text(1.01, 1.0, "over the\nfastest", transform=axis.transAxes, fontsize=9, fontweight="bold", va="bottom")
    _legend(figure, names)
    return figure


def _row(axis: Any, place: int, row: Row) -> None:
    beside = {"x": 1.01, "y": place, "transform": axis.get_yaxis_transform(), "va": "center", "fontsize": 9}
    if not row["green"]:
        axis.text(**beside, s="red", color="#C00000", fontweight="bold")
        return
    for name in baselines(row):
        median, q1, q3 = row["ratios"][name]
        axis.plot([q1, q3], [place, place], color=COLOURS[kind(name)], linewidth=1.6, alpha=0.6)
        axis.plot(
            [median], [place], MARKERS[kind(name)], color=COLOURS[kind(name)], markersize=5.5, markeredgecolor="white"
        )
    best = fastest_baseline(row)
    axis.text(**beside, s=f"{row['ratios'][best][0]:.2f}" if best else "none", fontweight="bold" if best else "normal")


def _label(row: Row) -> str:
    layout = "" if row["layout"] in ("NCHW", "flat") else f" {row['layout']}"
    return f"{row['mode']}  {row['shape']}{layout} {row['dtype']}"


def _legend(figure: Figure, names: dict[str, list[str]]) -> None:
    from matplotlib.lines import Line2D

    words = {"eager": "eager torch", "compile": "torch.compile", "peer": ", ".join(sorted(set(names.get("peer", []))))}
    handles = [
        Line2D([], [], marker=MARKERS[name], color=COLOURS[name], linewidth=1.6, label=words[name])
        for name in words
        if name in names
    ]
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)


def _limits(rows: Sequence[Row]) -> tuple[float, float]:
    values = [value for row in rows for name in baselines(row) for value in row["ratios"][name]] + [1.0]
    low, high = min(values), max(values)
    room = max(1.1, (high / low) ** 0.04)
    return low / room, high * room


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers in [low, high], far enough apart on a logarithmic axis for their labels; 1 is always among them."""
    decades = [m * 10.0**e for m in (1, 2, 5) for e in range(-3, 6)]
    between = [0.25, 0.75, 0.9, 1.1, 1.25, 1.5, 1.75, 2.5, 3, 4, 6, 8]
    gap = math.log(high / low) / 9
    chosen = [1.0]
    for tick in (*decades, *between):
        if low <= tick <= high and all(abs(math.log(tick / other)) >= gap for other in chosen):
            chosen.append(tick)
    return sorted(chosen)


# ---- roofline ---------------------------------------------------------------------------------------------------------------


def roofline(documents: Sequence[Document]) -> Figure:
    """Memory rate of fastgen over the least traffic of a case, under the rate of a copy of the same size.

    The rows nearest to their limits and furthest from them have a number, and their names stand below.
    """
    figure = Figure(figsize=(_WIDTH, 8.0), layout="constrained")
    axis = figure.subplots()
    axis.set_title(
        f"fastgen's memory rate beside a copy of the same size\n{_where(documents)}" if documents else "", loc="left"
    )
    bound = (document for document in documents if document["family"] not in NOT_MEMORY)
    rows = [row for document in bound for row in document["rows"] if row["green"] and row["floors"]]
    families = list(dict.fromkeys(row["family"] for row in rows))
    for i, family in enumerate(families):
        points = [_point(row) for row in rows if row["family"] == family]
        style = {"marker": FAMILY_MARKERS[i % len(FAMILY_MARKERS)], "color": FAMILY_COLOURS[i % len(FAMILY_COLOURS)]}
        axis.scatter(
            *zip(*points, strict=True), s=38, edgecolor="white", linewidth=0.6, label=family, zorder=3, **style
        )
    _copy_line(axis, rows)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("least traffic of the case (MiB)")
    axis.set_ylabel("least traffic / time (GB/s)")
    axis.grid(True, which="major", color="#e4e4e4", linewidth=0.8)
    for scale in (axis.xaxis, axis.yaxis):
        scale.set_major_formatter(FormatStrFormatter("%g"))
    if rows:
        axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)
        figure.supxlabel(_name_what_stands_out(axis, rows), fontsize=9, x=0.02, ha="left")
    return figure


def _point(row: Row) -> tuple[float, float]:
    return row["min_bytes"] / 2**20, row["min_bytes"] / row["times"]["fastgen"][0] / 1e9


def copy_rates(rows: Sequence[Row]) -> list[tuple[float, float]]:
    """(bytes moved, bytes per second) of every copy that was timed: two passes over a tensor of the row's shape."""
    size = {"fp32": 4, "bf16": 2, "fp16": 2}
    found = []
    for row in rows:
        if "copy" in row["floors"]:
            moved = 2 * size[row["dtype"]] * math.prod(map(int, re.findall(r"\d+", row["shape"])))
            found.append((moved, moved / row["times"]["copy"][0]))
    return sorted(found)


def _copy_line(axis: Any, rows: Sequence[Row]) -> None:
    rates: dict[float, list[float]] = {}
    for size, rate in copy_rates(rows):
        rates.setdefault(size, []).append(rate)
    line = [(size / 2**20, sorted(found)[len(found) // 2] / 1e9) for size, found in rates.items()]
    if line:
        axis.plot(
            *zip(*line, strict=True), color=GREY, linewidth=1.8, marker="_", markersize=9, label="a copy", zorder=2
        )


def _name_what_stands_out(axis: Any, rows: Sequence[Row]) -> str:
    """Numbers at the rows nearest to their limit and furthest from it, a family at most once at either end; returns their names."""
    ordered = sorted((row for row in rows if "floor" in row["ratios"]), key=lambda row: row["ratios"]["floor"][0])
    chosen: list[Row] = []
    for end in (ordered, ordered[::-1]):
        firsts = {row["family"]: row for row in reversed(end)}  # of each family the row nearest to this end
        ranked = sorted(firsts.values(), key=end.index)[:STANDING_OUT]
        chosen += [row for row in ranked if row not in chosen]
    lines = []
    for number, row in enumerate(chosen, 1):
        axis.annotate(
            str(number), _point(row), (0, 9), textcoords="offset points", ha="center", fontsize=9, fontweight="bold", zorder=5,
            bbox={"boxstyle": "circle,pad=0.15", "facecolor": "white", "edgecolor": GREY, "linewidth": 0.8},
        )  # fmt: skip
        lines.append(f"{number}  {row['id']}: {row['ratios']['floor'][0]:.2f} times its limit")
    return "\n".join(lines)
