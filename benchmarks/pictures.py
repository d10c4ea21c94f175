"""The pictures of a machine's results, from the files alone: the speed-ups of a family each, and one roofline.

Needs matplotlib. Colours are those of Okabe and Ito, which colour-blind readers tell apart; shapes of the marks say the same.
"""

import math
import textwrap
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from PIL import Image

from fastgen._files import write_atomically

from .cases import AS_USED
from .results import Document, Row, baselines, fastest_baseline, speedup
from .tables import TORCH, Group, groups

COLOURS = {"eager": "#D55E00", "compile": "#009E73", "peer": "#0072B2"}
MARKERS = {"eager": "s", "compile": "^", "peer": "o"}
GREY, RED = "#555555", "#C00000"
_ROW_INCHES, _WIDTH = 0.21, 10.0
_LINE = 68  # letters of a line of the title of a group: a longer one would leave no place to the dots
_STYLE = {"font.size": 10, "axes.titlesize": 12, "axes.spines.top": False, "axes.spines.right": False}


def draw(documents: Sequence[Document], out: Path) -> None:
    """Write ``<family>.png`` for each family, and ``roofline.png``."""
    with matplotlib.rc_context(_STYLE):
        for document in documents:
            _save(speed_ups(document), out / f"{document['family']}.png")
        _save(roofline(documents), out / "roofline.png")


def _save(figure: Figure, path: Path) -> None:
    buffer, small = BytesIO(), BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    picture = Image.open(buffer).convert("RGB").quantize(palette=_palette(), dither=Image.Dither.NONE)
    picture.save(small, format="png", optimize=True)
    write_atomically(path, lambda temporary: temporary.write_bytes(small.getvalue()))


def _palette(greys: int = 16, steps: int = 8) -> Image.Image:
    """What these pictures are of: greys, and every colour in steps from white. A quarter of the bytes of all colours there are."""
    colours = [(round(255 * k / (greys - 1)),) * 3 for k in range(greys)]
    for full in (to_rgb(colour) for colour in (*COLOURS.values(), RED)):
        colours += [tuple(round(255 * (1 + (c - 1) * k / steps)) for c in full) for k in range(1, steps + 1)]
    palette = Image.new("P", (1, 1))
    palette.putpalette([c for colour in colours for c in colour])
    return palette


def _where(documents: Sequence[Document]) -> str:
    machine = documents[0]["machine"]
    commits = list(dict.fromkeys((document["commit"]["id"] or "unknown")[:8] for document in documents))
    # several do not fit beside the heading of the last column; the report names them
    return f"{machine['name']}, " + (f"commit {commits[0]}" if len(commits) == 1 else f"{len(commits)} commits")


# ---- speed-ups of a family --------------------------------------------------------------------------------------------------


def kind(provider: str) -> str:
    """The legend entry of a baseline: peers share one."""
    return provider if provider in TORCH else "peer"


def speed_ups(document: Document) -> Figure:
    """A line a row on one logarithmic axis, as used before other ways, the greatest speed-up over the fastest baseline first."""
    rows = sorted(document["rows"], key=lambda row: (row["how"] != AS_USED, -(speedup(row, "fastest") or 0.0)))
    figure = Figure(figsize=(_WIDTH, 1.7 + _ROW_INCHES * max(len(rows), 3)), layout="constrained")
    axis = figure.subplots()
    axis.set_title(f"{document['family']}: times of the others over fastgen's\n{_where([document])}", loc="left")
    low, high = _limits(rows)
    _ratio_axis(axis, low, high, len(rows))
    names: dict[str, list[str]] = {}
    for place, row in enumerate(rows):
        for name in baselines(row):
            names.setdefault(kind(name), []).append(name)
        _row(axis, place, row)
    axis.set_yticks(range(len(rows)), [_label(row) for row in rows], fontsize=9)
    axis.text(1.01, 1.0, "over the\nfastest", transform=axis.transAxes, fontsize=9, fontweight="bold", va="bottom")
    _legend(figure, names)
    return figure


def _ratio_axis(axis: Any, low: float, high: float, rows: float) -> None:
    """Ratios on a logarithmic axis with a line at 1, places for so many rows one below the other."""
    axis.set_xscale("log")
    axis.set_xlim(low, high)
    axis.set_ylim(rows - 0.4, -0.6)
    ticks = log_ticks(low, high)
    axis.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.grid(axis="x", color="#e4e4e4", linewidth=0.8)
    axis.axvline(1, color="black", linewidth=1.2)
    axis.tick_params(axis="y", length=0)


def _beside(axis: Any, place: int, words: str, **style: Any) -> None:
    """Words right of the axis, at the height of a row."""
    axis.text(1.01, place, words, transform=axis.get_yaxis_transform(), va="center", fontsize=9, **style)


def _row(axis: Any, place: int, row: Row) -> None:
    if not row["green"]:
        _beside(axis, place, "red", color=RED, fontweight="bold")
        return
    for name in baselines(row):
        middle, q1, q3 = row["ratios"][name]
        axis.plot([q1, q3], [place, place], color=COLOURS[kind(name)], linewidth=1.6, alpha=0.6)
        axis.plot(
            [middle], [place], MARKERS[kind(name)], color=COLOURS[kind(name)], markersize=5.5, markeredgecolor="white"
        )
    best = fastest_baseline(row)
    _beside(axis, place, f"{row['ratios'][best][0]:.2f}" if best else "none", fontweight="bold" if best else "normal")


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
    """How many times its own limit (a copy, or the least pass and the noise, timed in the same rounds) each row takes: a line a
    group on one axis, 1 is the roof. The row furthest from it is named."""
    rows = [row for document in documents for row in document["rows"] if "floor" in row["ratios"]]
    found = sorted(groups(rows), key=lambda group: median(_over_floor(row) for row in group.rows))
    labels = [_group_label(group) for group in found]
    heights = [1.0 + 0.5 * label.count("\n") for label in labels]
    places = [sum(heights[:i]) + (heights[i] - 1) / 2 for i in range(len(found))]
    figure = Figure(figsize=(_WIDTH + 4, 1.6 + 0.27 * max(sum(heights), 3)), layout="constrained")
    axis = figure.subplots()
    axis.set_title(f"fastgen's time over the machine's own limit\n{_where(documents)}" if documents else "", loc="left")
    values = [_over_floor(row) for row in rows] + [1.0]
    room = max(1.1, (max(values) / min(values)) ** 0.05)
    _ratio_axis(axis, min(values) / room, max(values) * room, sum(heights))
    for place, group in zip(places, found, strict=True):
        ordered = sorted(group.rows, key=_over_floor)
        axis.plot(
            [_over_floor(row) for row in ordered], [place] * len(ordered), "o", color=GREY, markersize=4, alpha=0.5
        )
        axis.plot(
            [_over_floor(ordered[-1])], [place], "o", color=COLOURS["eager"], markersize=6, markeredgecolor="white"
        )
        words = f"{_over_floor(ordered[-1]):.2f}" + (f"  {_label(ordered[-1])}" if len(ordered) > 1 else "")
        _beside(axis, place, words)
    axis.set_yticks(places, labels, fontsize=9)
    axis.tick_params(axis="x", labelsize=7)  # the axis is narrow beside such labels
    axis.text(1.01, 1.0, "the furthest row", transform=axis.transAxes, fontsize=9, fontweight="bold", va="bottom")
    return figure


def _group_label(group: Group) -> str:
    how = "" if group.how == AS_USED else f", {group.how}"
    dtype = "" if group.title.endswith(group.dtype) else f", {group.dtype}"
    title = group.title.replace("`", "")
    return "\n".join(textwrap.wrap(f"{title}{how}{dtype}", _LINE))


def _over_floor(row: Row) -> float:
    return row["ratios"]["floor"][0]
