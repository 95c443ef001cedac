"""Sections of a results page, each written by the command that measured it."""

import re
import sys
from datetime import UTC, datetime
from pathlib import Path

from resconv.latency.timing import machine

__all__ = ["anchor", "stamp", "table", "write_between", "write_section"]

DOCS = Path(__file__).parent.parent / "docs"


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def stamp(seed: int | str = 0, command: str | None = None) -> str:
    command = command or "python -m benchmarks." + Path(sys.argv[0]).stem + "".join(
        f" {a}" for a in sys.argv[1:]
    )
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    return f"`{command}`, {date}, seed {seed}, {machine()}."


def anchor(title: str) -> str:
    """Return what a link to a section ends in."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def write_section(title: str, body: str, page: str = "results.md") -> None:
    """Replace (or add) one section of a page in docs/."""
    path = DOCS / page
    text = (
        path.read_text(encoding="utf-8")
        if path.is_file()
        else (
            "# Results\n\nEvery section is written by the command named in it; nothing is typed in.\n"
        )
    )
    section = f"## {title}\n\n{body.strip()}\n"
    pattern = re.compile(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", re.M | re.S)
    text = (
        pattern.sub(lambda _: section + "\n", text)
        if pattern.search(text)
        else (text.rstrip() + "\n\n" + section)
    )
    path.write_text(text.rstrip() + "\n", encoding="utf-8")
    print(section if len(section) < 10_000 else f"{title}: written to docs/{page}")


def write_between(marker: str, body: str, page: str) -> None:
    """Replace what stands between ``<!-- marker -->`` and ``<!-- end of marker -->`` in docs/."""
    path = DOCS / page
    before, start, rest = path.read_text(encoding="utf-8").partition(f"<!-- {marker} -->\n")
    _, end, after = rest.partition(f"<!-- end of {marker} -->")
    assert end, f"docs/{page} has lost its markers"
    path.write_text(f"{before}{start}\n{body.strip()}\n\n{end}{after}", encoding="utf-8")
    print(body)
