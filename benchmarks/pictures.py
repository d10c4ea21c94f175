"""The pictures of a run, from its JSON alone: bars of speed-up for every case, and a roofline.

Needs matplotlib. Colours are those of Okabe and Ito, which colour-blind readers tell apart; shapes and hatches say the same.
"""

import math
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib.figure import Figure

from .report import peers
from .results import Document, Row, write_atomic

COLOURS = {"fastgen": "#0072B2", "eager": "#D55E00", "compile": "#009E73", "peer": "#CC79A7", "limit": "#555555"}
HATCHES = {"eager": "", "compile": "////", "peer": "...."}
MARKERS = {"fastgen": "o", "eager": "s", "compile": "^", "peer": "D"}
_ROW_INCHES, _PANEL_INCHES, _WIDTH = 0.36, 1.25, 15.0
_STYLE = {"font.size": 10, "axes.titlesize": 11, "axes.spines.top": False, "axes.spines.right": False}


def draw(document: Document, out: Path) -> None:
    """Write ``bars.png`` and ``roofline.png``."""
    with matplotlib.rc_context(_STYLE):
        _save(bars(document), out / "bars.png")
        _save(roofline(document), out / "roofline.png")


def _save(figure: Figure, path: Path) -> None:
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_atomic(path, buffer.getvalue())


def kind(row: Row, provider: str) -> str:
    """The legend entry of a provider: peers share one."""
    return "peer" if provider in peers(row) else provider


def bars(document: Document) -> Figure:
    """Speed-ups of every row, one block a family, one panel a mode, on a logarithmic axis with a line at 1."""
    rows: list[Row] = document["rows"]
    families = list(dict.fromkeys(row["family"] for row in rows))
    blocks = {family: [row for row in rows if row["family"] == family] for family in families}
    heights = [_PANEL_INCHES + _ROW_INCHES * max(_per_mode(block).values()) for block in blocks.values()]
    figure = Figure(figsize=(_WIDTH, sum(heights) + 1.0), layout="constrained")
    figure.suptitle(f"Speed-up of fastgen, paired medians ({_where(document)})", fontsize=14)
    parts = figure.subfigures(len(blocks) + 1, 1, height_ratios=[0.35, *heights], squeeze=False)[:, 0]
    _bar_legend(parts[0], rows)
    for part, (family, block) in zip(parts[1:], blocks.items(), strict=True):
        modes = list(_per_mode(block))
        axes = part.subplots(1, len(modes), squeeze=False)[0]
        for axis, mode in zip(axes, modes, strict=True):
            _bar_panel(axis, f"{family}: {mode}", [row for row in block if row["mode"] == mode])
    return figure


def _per_mode(rows: Sequence[Row]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["mode"]] = counts.get(row["mode"], 0) + 1
    return counts


def _bar_legend(part: Any, rows: Sequence[Row]) -> None:
    from matplotlib.patches import Patch

    names = sorted({peer for row in rows for peer in peers(row)})
    labels = {"eager": "over eager torch", "compile": "over torch.compile", "peer": f"over peer ({', '.join(names)})"}
    shown = {kind(row, name) for row in rows for name in row["ratios"] if name != "floor"}
    handles = [
        Patch(facecolor=COLOURS[name], hatch=HATCHES[name], edgecolor="white", label=label)
        for name, label in labels.items()
        if name in shown
    ]
    if handles:
        part.legend(handles=handles, loc="center", ncols=len(handles), frameon=False, fontsize=11)


def _bar_panel(axis: Any, title: str, rows: Sequence[Row]) -> None:
    axis.set_title(title, loc="left", fontweight="bold")
    largest, smallest = 1.0, 1.0
    texts = []
    for position, row in enumerate(rows):
        shown = [(kind(row, name), ratio) for name, ratio in row["ratios"].items() if name != "floor"]
        if not shown:
            axis.text(
                1.03,
                position,
                "red: no figure" if not row["green"] else "no baseline measured",
                va="center",
                fontsize=8,
            )
        height = 0.8 / max(1, len(shown))
        for i, (name, ratio) in enumerate(shown):
            y = position - 0.4 + height * (i + 0.5)
            value = ratio["median"]
            axis.barh(
                y,
                value - 1,
                height * 0.9,
                left=1,
                color=COLOURS[name],
                hatch=HATCHES[name],
                edgecolor="white",
                linewidth=0.4,
            )
            axis.plot([ratio["q1"], ratio["q3"]], [y, y], color="black", linewidth=1.0)
            # The number stands beyond bar and whisker, on the side the bar points to.
            texts.append((max(value, ratio["q3"]) if value >= 1 else min(value, ratio["q1"]), y, value))
            largest, smallest = max(largest, ratio["q3"]), min(smallest, ratio["q1"])
    axis.set_xscale("log")
    span = math.log(largest / smallest) if largest > smallest else 1.0
    low = smallest / math.exp(0.22 * span) if smallest < 1 else 1 / math.exp(0.04 * span)
    high = largest * math.exp(0.22 * span)
    axis.set_xlim(low, high)
    for x, y, value in texts:
        offset = (4, 0) if value >= 1 else (-4, 0)
        axis.annotate(
            f"{value:.2f}", (x, y), offset, textcoords="offset points", va="center", fontsize=8,
            ha="left" if value >= 1 else "right",
        )  # fmt: skip
    axis.axvline(1, color="black", linewidth=1)
    ticks = _log_ticks(low, high)
    axis.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axis.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axis.set_yticks(range(len(rows)), [f"{row['shape']} {row['layout']} {row['dtype']}" for row in rows], fontsize=9)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.tick_params(axis="y", length=0)


def _log_ticks(low: float, high: float) -> list[float]:
    """Round numbers in [low, high], far enough apart on a logarithmic axis for their labels; 1 is always among them."""
    rounds = {m * 10.0**e for e in range(-3, 6) for m in (1, 2, 5)} | {
        0.25,
        0.75,
        0.9,
        1.1,
        1.25,
        1.5,
        1.75,
        2.5,
        3,
        4,
        6,
    }
    gap = math.log(high / low) / 7
    chosen = [1.0]
    for tick in sorted(
        rounds, key=lambda t: (f"{t:g}".strip("0.") not in "125", t)
    ):  # 1, 2 and 5 before what lies between
        if low <= tick <= high and all(abs(math.log(tick / other)) >= gap for other in chosen):
            chosen.append(tick)
    return sorted(chosen)


def roofline(document: Document) -> Figure:
    """Left: arithmetic rate over intensity under the machine's roofs. Right: memory rate of the memory-bound cases under the
    rate of a copy of the same size, the roof that matters to them."""
    figure = Figure(figsize=(_WIDTH, 7.0), layout="constrained")
    figure.suptitle(f"Rooflines ({_where(document)})", fontsize=14)
    left, right = figure.subplots(1, 2)
    rows = [row for row in document["rows"] if row["green"] and row["providers"] and row["family"] != "dispatch"]
    _arithmetic_roof(left, document, rows)
    _memory_roof(right, rows)
    handles = left.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=len(handles[0]) or 1, frameon=False, fontsize=11)
    return figure


def copy_rates(rows: Sequence[Row]) -> list[tuple[float, float]]:
    """(bytes moved, bytes per second) of every copy that was timed: two passes over the input."""
    from .ops.bench_group_norm import PASSES

    found = []
    for row in rows:
        copy = row["providers"].get("copy")
        if copy is not None and row["mode"] in PASSES:
            moved = 2 * row["min_bytes"] / PASSES[row["mode"]]
            found.append((moved, moved / copy["median"]))
    return sorted(found)


def _points(axis: Any, rows: Sequence[Row], x_of: Any, y_of: Any) -> None:
    labels = {"fastgen": "fastgen", "eager": "eager torch", "compile": "torch.compile", "peer": "peer library"}
    for name, label in labels.items():
        points = [
            (x_of(row), y_of(row, provider["median"]))
            for row in rows
            for key, provider in row["providers"].items()
            if provider["role"] != "floor" and kind(row, key) == name
        ]
        if points:
            axis.scatter(
                *zip(*points, strict=True), s=48 if name == "fastgen" else 34, marker=MARKERS[name], label=label,
                facecolor=COLOURS[name], edgecolor="white", linewidth=0.6, alpha=0.85, zorder=3 + (name == "fastgen"),
            )  # fmt: skip


def _arithmetic_roof(axis: Any, document: Document, rows: Sequence[Row]) -> None:
    _points(axis, rows, lambda row: row["flops"] / row["min_bytes"], lambda row, t: row["flops"] / t / 1e9)
    axis.set_xscale("log")
    axis.set_yscale("log")
    rates = [rate for _, rate in copy_rates(rows)]
    gemm = {d: max(r, document["limits"]["gemm_end"][d]) for d, r in document["limits"]["gemm_start"].items()}
    low, high = axis.get_xlim()
    high = max(high, 1.3 * max(gemm.values()) / min(rates)) if rates else high
    xs = [low * (high / low) ** (i / 200) for i in range(201)]
    for dtype, rate in gemm.items():
        axis.plot([low, high], [rate / 1e9] * 2, color=COLOURS["limit"], linewidth=1.2)
        axis.annotate(
            f"GEMM {dtype}: {_si(rate)}FLOP/s", (low, rate / 1e9), (6, 3), textcoords="offset points", fontsize=9
        )
    top = max(gemm.values())
    roofs = {"fastest copy": max(rates), "slowest copy": min(rates)} if rates else {}
    for style, (name, rate) in zip(("-", "--"), roofs.items(), strict=False):
        axis.plot(xs, [min(x * rate, top) / 1e9 for x in xs], color=COLOURS["limit"], linestyle=style, linewidth=1.2)
        x = low * (high / low) ** 0.04
        axis.annotate(
            f"{name}: {_si(rate)}B/s", (x, x * rate / 1e9), (0, 5) if style == "-" else (6, -12),
            textcoords="offset points", fontsize=9, rotation=0, ha="left",
        )  # fmt: skip
    axis.set_xlim(low, high)
    axis.set_xlabel("nominal operations per byte of least traffic (FLOP/B)")
    axis.set_ylabel("rate (GFLOP/s)")
    axis.set_title("Arithmetic: all cases", loc="left", fontweight="bold")
    axis.grid(True, which="major", color="#dddddd", linewidth=0.6)


def _memory_roof(axis: Any, rows: Sequence[Row]) -> None:
    bound = [row for row in rows if row["family"] != "model"]
    _points(axis, bound, lambda row: row["min_bytes"] / 2**20, lambda row, t: row["min_bytes"] / t / 1e9)
    copies = copy_rates(rows)
    sizes = sorted({size for size, _ in copies})
    if sizes:
        medians = [sorted(r for s, r in copies if s == size) for size in sizes]
        line = [(size / 2**20, m[len(m) // 2] / 1e9) for size, m in zip(sizes, medians, strict=True)]
        axis.plot(*zip(*line, strict=True), color=COLOURS["limit"], linewidth=1.6, marker="_", markersize=9, zorder=2)
        axis.annotate("copy of the same size", line[-1], (-4, 8), textcoords="offset points", fontsize=9, ha="right")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("least traffic of the case (MiB)")
    axis.set_ylabel("least traffic / time (GB/s)")
    axis.set_title("Memory: every op case, against a copy", loc="left", fontweight="bold")
    axis.grid(True, which="major", color="#dddddd", linewidth=0.6)
    axis.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    axis.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))


def _si(value: float) -> str:
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}"
    return f"{value:.3g} "


def _where(document: Document) -> str:
    machine = document["machine"]
    name = machine.get("gpu") or f"{machine['cpu']}, {document['threads']} threads"
    return f"{name}, commit {(document['commit']['id'] or 'unknown')[:8]}"
