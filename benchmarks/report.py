"""From `results.json` to paper: one Markdown table of every row, geometric means, targets, and the pictures.

`python -m benchmarks.report RESULTS.json` makes them again without measuring. Rows that lose look like rows that win.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from . import results, targets
from .results import Document, Row, write_atomic
from .timing import geometric_mean

_COLUMNS = (
    "case", "shape", "layout", "dtype", "fastgen", "eager", "compile", "peer", "over eager", "over compile", "over peer",
    "of floor", "GB/s", "check",
)  # fmt: skip


def seconds_text(seconds: float) -> str:
    """``0.00123`` -> ``1.23 ms``."""
    for limit, factor, unit in ((1e-3, 1e6, "us"), (1.0, 1e3, "ms")):
        if seconds < limit:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds:.3g} s"


def peers(row: Row) -> list[str]:
    """Baselines that are neither eager nor compiled torch."""
    found = [name for name, provider in row["providers"].items() if provider["role"] == "baseline"]
    return [name for name in found if name not in ("eager", "compile")]


def markdown(document: Document) -> str:
    """The whole report."""
    rows = document["rows"]
    parts = [
        "# Benchmarks\n",
        _about(document),
        "## Every case\n",
        "Times are medians. `over X` is the paired speed-up, the median over interleaved rounds of (time of X / time of "
        "fastgen), with its quartiles; below 1 fastgen is slower. `of floor` is (time of fastgen / time of the machine's own "
        "limit: a copy of the input; for sampler steps one pass of the same reads and writes, plus drawing the noise); 1 is the "
        "limit. `GB/s` is the least traffic the case allows divided by the time of fastgen.\n",
        _table(_COLUMNS, (_cells(row) for row in rows)),
        "## Geometric means\n",
        _means(rows),
        "## Targets\n",
        _targets(document),
    ]
    notes = list(document["notes"]) + [f"{row['id']}: {note}" for row in rows for note in row["notes"]]
    if notes:
        parts += ["## Notes\n", "\n".join(f"- {note}" for note in _grouped(notes)) + "\n"]
    return "\n".join(parts)


def _about(document: Document) -> str:
    machine, commit, build = document["machine"], document["commit"], document["fastgen"]
    device = f"{machine['gpu']}, " if "gpu" in machine else ""
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items() if version)
    commit_id = (commit["id"] or "unknown")[:12] + (" with local changes" if commit["dirty"] else "")
    gemm = document["limits"]
    rates = ", ".join(
        f"{dtype} {rate / 1e9:.0f} and {gemm['gemm_end'][dtype] / 1e9:.0f}"
        for dtype, rate in gemm["gemm_start"].items()
    )
    isa = build["isa"] or f"none, the reference answers ({build['isa_reason']})"
    lines = [
        f"- machine: {device}{machine['cpu']}, {machine['cores']} cores, {document['threads']} threads; "
        f"load {machine.get('load_start')} at the start, {machine.get('load_end')} at the end",
        f"- versions: {versions}",
        f"- commit {commit_id}; CPU kernels: {isa}; CUDA C++ library: {'loaded' if build['cuda_library'] else 'not loaded'}",
        f"- GEMM rate in GFLOP/s, at the start and at the end: {rates}",
        f"- measured {document['created']}, {document['settings']['wall_seconds']} s in all",
    ]
    return "\n".join(lines) + "\n"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(header)} |", f"|{'|'.join('---' for _ in header)}|"]
    lines += [f"| {' | '.join(cells)} |" for cells in rows]
    return "\n".join(lines) + "\n"


def _cells(row: Row) -> list[str]:
    providers, peer = row["providers"], (peers(row) or [None])[0]

    def time_of(name: str | None) -> str:
        return seconds_text(providers[name]["median"]) if name in providers else "-"

    def ratio_of(name: str | None) -> str:
        ratio = row["ratios"].get(name)
        return f"{ratio['median']:.2f} ({ratio['q1']:.2f} to {ratio['q3']:.2f})" if ratio else "-"

    floor = row["ratios"].get("floor")
    rate = f"{row['min_bytes'] / providers['fastgen']['median'] / 1e9:.3g}" if "fastgen" in providers else "-"
    reasons = [f"{check['provider']}: {check['reason']}" for check in row["checks"] if not check["ok"]]
    verdict = "ok" if row["green"] else "**red** " + "; ".join(reasons)
    return [
        f"{row['family']} {row['mode']}", row["shape"], row["layout"], row["dtype"], time_of("fastgen"), time_of("eager"),
        time_of("compile"), f"{peer} {time_of(peer)}" if peer else "-", ratio_of("eager"), ratio_of("compile"),
        ratio_of(peer), f"{floor['median']:.2f}" if floor else "-", rate, verdict.replace("|", "/"),
    ]  # fmt: skip


def _means(rows: Sequence[Row]) -> str:
    lines = []
    for family, mode in dict.fromkeys((row["family"], row["mode"]) for row in rows):
        group = targets.select(rows, family=family, mode=mode)
        baselines = dict.fromkeys(name for row in group for name in row["ratios"] if name != "floor")
        for baseline in baselines:
            values = [v for row in group if (v := targets.speedup(row, baseline)) is not None]
            lines.append(
                [
                    f"{family} {mode}",
                    baseline,
                    f"{geometric_mean(values):.2f}",
                    f"{min(values):.2f}",
                    f"{max(values):.2f}",
                    f"{sum(v >= 1 for v in values)} of {len(values)}",
                    str(len(group) - len(values)),
                ]
            )
    header = ("group", "over", "geometric mean", "lowest", "highest", "rows not slower", "rows without figure")
    return _table(header, lines)


def _targets(document: Document) -> str:
    if document["machine"]["device"] != "cpu":
        return "The targets are stated for the CPU; this run is on a GPU.\n"
    lines = []
    for verdict in targets.judge(document):
        target, figure = verdict.target, verdict.figure
        asked = f"{'at most' if target.at_most else 'at least'} {target.bound:g}{target.unit}"
        measured = "-" if figure.value is None else f"{figure.value:.2f}{target.unit}"
        lines.append([target.text, asked, measured, verdict.verdict, figure.detail])
    text = _table(("target", "asked", "measured", "verdict", "read from"), lines)
    if document["threads"] != targets.THREADS:
        text += f"\nThe targets are stated for {targets.THREADS} threads; this run has {document['threads']}.\n"
    return text


def _grouped(notes: Sequence[str]) -> list[str]:
    """One line a distinct note, with the number of rows that have it."""
    cases: dict[str, list[str]] = {}
    for note in notes:
        head, separator, text = note.partition(": ")
        is_row = bool(separator) and head.count("/") >= 4
        cases.setdefault(text if is_row else note, []).append(head if is_row else "")
    return [
        f"{text}"
        if len(ids) == 1 and not ids[0]
        else f"{text} ({ids[0]})"
        if len(ids) == 1
        else f"{text} ({len(ids)} rows)"
        for text, ids in cases.items()
    ]


def write(document: Document, out: Path) -> list[str]:
    """Write ``report.md`` and the pictures into ``out``; returns a line for each thing that could not be made."""
    write_atomic(out / "report.md", markdown(document))
    try:
        from . import pictures
    except ImportError as error:
        return [f"the pictures are not drawn: {error}"]
    pictures.draw(document, out)
    return []


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("results", type=Path, help="a results.json")
    parser.add_argument("--out", type=Path, help="folder (default: that of the results)")
    args = parser.parse_args(argv)
    document = results.load(args.results)
    notes = write(document, args.out or args.results.parent)
    print("\n".join([markdown(document), *(f"note: {note}" for note in notes)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
