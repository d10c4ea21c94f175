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


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
