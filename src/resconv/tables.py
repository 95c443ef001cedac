"""Results as a table for a reader: text that fits 80 columns, HTML for a notebook."""

import textwrap
from collections.abc import Sequence
from html import escape

__all__ = ["html_table", "text_table"]

_WIDTH = 80
_LONGEST = 32  # of a cell that is not the last; a longer one loses its beginning


def text_table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return the rows below their title, numbers to the right; the last column wraps."""
    cells = [[_text(c) for c in row] for row in rows]
    short = [[_cut(c) for c in row[:-1]] for row in cells]
    widths = [max(len(r[i]) for r in (header, *short)) for i in range(len(header) - 1)]
    numeric = [
        bool(rows) and all(isinstance(r[i], int | float | None) for r in rows)
        for i in range(len(widths))
    ]
    left = sum(widths) + 2 * len(widths)
    lines = textwrap.wrap(title, _WIDTH)
    for first, last in (
        (list(header[:-1]), header[-1]),
        *zip(short, (row[-1] for row in cells), strict=True),
    ):
        shown = (
            c.rjust(w) if right else c.ljust(w)
            for c, w, right in zip(first, widths, numeric, strict=True)
        )
        start = "".join(f"{c}  " for c in shown)
        wrapped = textwrap.wrap(last, max(_WIDTH - left, 16)) or [""]
        lines += [(start if i == 0 else " " * left) + piece for i, piece in enumerate(wrapped)]
    return "\n".join(line.rstrip() for line in lines)


def html_table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return the same as an HTML table with a caption."""
    head = "".join(f"<th>{escape(h)}</th>" for h in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(_text(c))}</td>" for c in row) + "</tr>" for row in rows
    )
    return (
        f"<table><caption>{escape(title)}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table>"
    )


def _text(cell: object) -> str:
    if cell is None:
        return ""
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, int):
        return f"{cell:,}"
    return f"{cell:.3g}" if isinstance(cell, float) else str(cell)


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else "..." + text[3 - _LONGEST :]
