"""Tables of Markdown, and the parts of a page in docs/ that the command which measured them writes."""

import re
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from resconv.latency.timing import machine

__all__ = ["stamp", "table", "write_between", "write_section"]

DOCS = Path(__file__).parent.parent / "docs"


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    every = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in every)


def stamp(command: str | None = None) -> str:
    """Return what made a table, when and where."""
    command = command or " ".join([f"python -m benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]])
    return f"`{command}`, {datetime.now(UTC):%Y-%m-%d}, seed 0, {machine()}."


def write_section(title: str, body: str, page: str) -> None:
    """Replace (or add) one section of a page."""
    _replace(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", f"## {title}\n\n{body.strip()}\n\n", page)


def write_between(marker: str, body: str, page: str) -> None:
    """Replace what stands between ``<!-- marker -->`` and ``<!-- end of marker -->``."""
    start, end = f"<!-- {marker} -->\n", f"<!-- end of {marker} -->"
    _replace(f"{start}.*?{end}", f"{start}\n{body.strip()}\n\n{end}", page)
    print(body)


def _replace(pattern: str, part: str, page: str) -> None:
    path = DOCS / page
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    made, found = re.subn(pattern, lambda _: part, text, count=1, flags=re.M | re.S)
    made = made if found else f"{text.rstrip()}\n\n{part}"
    path.write_text(made.strip() + "\n", encoding="utf-8")
