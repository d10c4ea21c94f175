"""What the scripts that make the documents share: generated parts of a page, and files written whole or not at all."""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))  # the scripts use the test suite's models


def replace_part(page: str, name: str, text: str) -> None:
    """Put ``text`` between ``<!-- name -->`` and ``<!-- end of name -->`` of docs/``page``."""
    path = DOCS / page
    before, _, rest = path.read_text(encoding="utf-8").partition(f"<!-- {name} -->\n")
    _, marker, after = rest.partition(f"<!-- end of {name} -->")
    if not marker:
        raise SystemExit(f"{path} has no part {name!r}")
    write(path, f"{before}<!-- {name} -->\n{text.rstrip()}\n<!-- end of {name} -->{after}")


def write(path: Path, text: str) -> None:
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        file.write(text)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def save_figure(figure: Any, name: str, dpi: int = 100) -> None:
    """docs/``name``, a PNG."""
    partial = DOCS / f".{name}"
    figure.savefig(partial, dpi=dpi, format="png")
    os.replace(partial, DOCS / name)


def mark_ratio(axis: Any, x: float, low: float, high: float, *, to_the_right: bool = False) -> None:
    """How many times as much as ``low`` is ``high`` at ``x``: an arrow between them, the number beside it."""
    ends = {"arrowstyle": "<->", "color": "#777777", "shrinkA": 7, "shrinkB": 7}
    axis.annotate("", (x, low), (x, high), arrowprops=ends)
    axis.annotate(
        f"{high / low:.0f} x", (x, (low * high) ** 0.5), ha="left" if to_the_right else "right", va="center",
        xytext=(6 if to_the_right else -6, 0), textcoords="offset points", color="#333333",
    )  # fmt: skip


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
