"""From result files to paper: `report.md` and pictures beside them, and the tables in the two READMEs.

`python -m benchmarks.report` does it for every machine under `benchmarks/results` and rewrites README.md and benchmarks/README.md
between their markers; with a FOLDER only that folder's report and pictures. Nothing is measured here.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fastgen._files import write_atomically

from . import results, tables, targets
from .machine import ROOT
from .results import Document, Row

_EVERY_CASE = (
    "Times are medians. `over X` is the paired speed-up, the median over interleaved rounds of (time of X / time of fastgen), "
    "with its quartiles; below 1 fastgen is slower. `of floor` is (time of fastgen / time of the machine's own limit: a copy of "
    "the input; for sampler steps one pass that reads two tensors and writes one, plus drawing the noise); 1 is the limit. `GB/s` "
    "is the least traffic the case allows divided by the time of fastgen.\n"
)
_HOW = (
    "*As used* is what any program does: default allocator, both sides' own defaults, set-up included where there is one. "
    "*First in a process*: fastgen has forgotten what it has followed of earlier trajectories. "
    "*With seeds*: fastgen draws the noise in its kernel, from a seed a sample, the other side as it does by default. Figures are "
    "geometric means of paired medians, the lowest and the highest row in brackets; *over the fastest* takes for each row the "
    "fastest of its baselines."
)
_NONE_YET = "No results of this version are stored yet: `make bench` measures on your machine.\n"


def rows_of(documents: Sequence[Document]) -> list[Row]:
    return [row for document in documents for row in document["rows"]]


def markdown(documents: Sequence[Document]) -> str:
    """The whole report of one machine's documents."""
    rows = rows_of(documents)
    parts = [
        "# Benchmarks\n",
        about(documents),
        "## Every case\n",
        _EVERY_CASE,
        tables.every_case(rows),
        "## Geometric means\n",
        tables.means(rows),
        "## Targets\n",
        target_table(documents),
    ]
    if hosts := tables.host_times(rows):
        parts += ["## Time on the GPU and time of the host\n", hosts]
    if notes := _notes(documents):
        parts += ["## Notes\n", "\n".join(f"- {note}" for note in notes) + "\n"]
    return "\n".join(parts)


def summary(documents: Sequence[Document]) -> str:
    """What a run prints: the means, and every red row."""
    rows = rows_of(documents)
    red = [f"red: {row['id']}: {name}: {reason}" for row in rows for name, reason in row["red"].items()]
    return "\n".join([tables.means(rows), *red])


def about(documents: Sequence[Document]) -> str:
    """The machine, versions, commits and times, as a list."""
    lines: list[str] = []
    for document in documents:
        machine, build = document["machine"], document["fastgen"]
        device = f"{machine['gpu']}, " if "gpu" in machine else ""
        isa = build["isa"] or f"none, the reference answers ({build['isa_reason']})"
        versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items() if version)
        cuda = "loaded" if build["cuda_library"] else "not loaded"
        lines += [
            f"machine: {device}{machine['cpu']}, {machine['cores']} cores, {document['threads']} threads",
            f"versions: {versions}",
            f"commit {commit_text(document)}; CPU kernels: {isa}; CUDA C++ library: {cuda}",
        ]
    lines = list(dict.fromkeys(lines))
    for document in documents:
        rates = ", ".join(f"{dtype} {rate / 1e9:.0f}" for dtype, rate in document["limits"]["gemm"].items())
        unmeasured = f" of {document['cases']}" if len(document["rows"]) < document["cases"] else ""
        lines.append(
            f"{document['family']}: {len(document['rows'])} cases{unmeasured} from "
            f"{document['created']} on, {document['seconds']:.0f} s; load {document['machine']['load']}; GEMM in GFLOP/s: {rates}"
        )
    return "\n".join(f"- {line}" for line in lines) + "\n"


def commit_text(document: Document) -> str:
    commit = document["commit"]
    return (commit["id"] or "unknown")[:12] + (" with local changes" if commit["dirty"] else "")


def target_table(documents: Sequence[Document]) -> str:
    if not documents or documents[0]["machine"]["device"] != "cpu":
        return "The targets are stated for the CPU.\n"
    lines = []
    amx = any(document["fastgen"]["isa"] == "amx" for document in documents)
    for verdict in targets.judge(rows_of(documents), amx):
        target, figure = verdict.target, verdict.figure
        asked = f"{'at most' if target.at_most else 'at least'} {target.bound:g}{target.unit}"
        measured = "-" if figure.value is None else f"{figure.value:.2f}{target.unit}"
        lines.append([target.text, asked, measured, verdict.verdict, figure.detail])
    text = tables.table(("target", "asked", "measured", "verdict", "read from"), lines)
    if documents[0]["threads"] != targets.THREADS:
        text += f"\nThe targets are stated for {targets.THREADS} threads; this run has {documents[0]['threads']}.\n"
    return text


def _notes(documents: Sequence[Document]) -> list[str]:
    """One line a distinct note, with the rows that have it where they are few."""
    places: dict[str, list[str]] = {}
    for document in documents:
        for note in document["notes"]:
            places.setdefault(f"{document['family']}: {note}", [])
        for row in document["rows"]:
            for note in row["notes"]:
                places.setdefault(note, []).append(row["id"])
    few = {note: ids[0] if len(ids) == 1 else f"{len(ids)} rows" for note, ids in places.items() if ids}
    return [f"{note} ({few[note]})" if note in few else note for note in places]


def write(documents: Sequence[Document], out: Path) -> list[str]:
    """Write ``report.md`` and the pictures into ``out``; returns a line for each thing that could not be made."""
    _write(out / "report.md", markdown(documents))
    try:
        from . import pictures
    except ImportError as error:
        return [f"the pictures are not drawn: {error}"]
    pictures.draw(documents, out)
    return []


def _write(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text))


# ---- the READMEs ------------------------------------------------------------------------------------------------------------


def publish(root: Path = ROOT) -> list[str]:
    """Every machine's report and pictures, and the tables of README.md and benchmarks/README.md; returns what could not be made."""
    folder = root / results.FOLDER.relative_to(ROOT)
    machines = {path: results.load_all(path) for path in sorted(folder.glob("*/")) if any(path.glob("*.json"))}
    notes = [note for path, documents in machines.items() for note in write(documents, path)]
    replace_between(root / "README.md", "table", _for_readme(machines))
    replace_between(root / "benchmarks" / "README.md", "results", _for_benchmarks(machines))
    return notes


def _for_readme(machines: dict[Path, list[Document]]) -> str:
    if not machines:
        return _NONE_YET
    parts = [
        f"{_HOW} Missed targets, and the way to every single case, are in [benchmarks/README.md](benchmarks/README.md).\n"
    ]
    for documents in machines.values():
        parts += [f"{_machine_text(documents)}:\n", tables.headlines(rows_of(documents))]
    return "\n".join(parts)


def _for_benchmarks(machines: dict[Path, list[Document]]) -> str:
    if not machines:
        return _NONE_YET
    parts = []
    for path, documents in machines.items():
        place = f"results/{path.name}"
        pictures = "\n\n".join(f"![{file.stem}]({place}/{file.name})" for file in sorted(path.glob("*.png")))
        parts += [
            f"### {_machine_text(documents)}\n",
            about(documents),
            f"Every case, with its checks, is in [{place}/report.md]({place}/report.md).\n",
            tables.means(rows_of(documents)),
            target_table(documents),
            f"{pictures}\n",
        ]
    return "\n".join(parts)


def _machine_text(documents: Sequence[Document]) -> str:
    document = documents[0]
    machine, versions = document["machine"], document["versions"]
    name = machine.get("gpu") or f"{machine['cpu']}, {machine['name']}"
    commits = ", ".join(dict.fromkeys(commit_text(document) for document in documents))
    return f"{name}, torch {versions['torch']}, diffusers {versions['diffusers'] or 'not installed'}, commit {commits}"


def replace_between(path: Path, marker: str, text: str) -> None:
    """Replace what stands between ``<!-- marker: begin -->`` and ``<!-- marker: end -->``.

    Raises:
        ValueError: the file has no such pair.
    """
    begin, end = f"<!-- {marker}: begin -->", f"<!-- {marker}: end -->"
    whole = path.read_text()
    head, found, rest = whole.partition(begin)
    _, ended, tail = rest.partition(end)
    if not (found and ended):
        raise ValueError(f"{path}: {begin} and {end} must stand in it, in this order")
    _write(path, f"{head}{begin}\n{text}{end}{tail}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", help="one folder of results; the READMEs stay as they are")
    args = parser.parse_args(argv)
    try:
        if args.folder is None:
            notes = publish()
        else:
            documents = results.load_all(args.folder)
            notes = write(documents, args.folder)
            print(markdown(documents))
    except results.ResultError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    print("\n".join(f"note: {note}" for note in notes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
