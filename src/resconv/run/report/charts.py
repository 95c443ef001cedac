"""Charts as SVG: text is text, colours come from the page's style, every mark has a title.

Matplotlib and its kin write colours into the file, which dark mode cannot change, and give no titles.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Line", "bars", "lines", "nice_ticks", "scatter"]

# Close to a phone's width, so that text is as large there as it says.
_WIDTH, _HEIGHT = 360, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 10, 24, 36
_MOST_POINTS = 120


@dataclass(frozen=True)
class Line:
    """Points to be joined, in the colour of the style's class ``kind``; an empty name has no legend."""

    name: str
    kind: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class _Axes:
    """From values to places in the drawing."""

    x: tuple[float, float]
    y: tuple[float, float]

    def across(self, value: float) -> float:
        return round(_share(value, self.x) * (_WIDTH - _LEFT - _RIGHT) + _LEFT, 1)

    def down(self, value: float) -> float:
        return round((1 - _share(value, self.y)) * (_HEIGHT - _TOP - _BOTTOM) + _TOP, 1)


def _share(value: float, span: tuple[float, float]) -> float:
    return (value - span[0]) / (span[1] - span[0] or 1)


def nice_ticks(least: float, most: float, about: int = 4) -> list[float]:
    """Return round numbers between two values.

    Example:
        >>> from resconv.run.report.charts import nice_ticks
        >>> nice_ticks(0, 97)
        [0, 20, 40, 60, 80]
    """
    if not most > least:
        return [least]
    rough = (most - least) / about
    power = 10.0
    while power > rough:
        power /= 10
    while power * 10 <= rough:
        power *= 10
    step = min((power * m for m in (1, 2, 5, 10)), key=lambda s: abs(s - rough))
    first, last = round(least / step + 0.4999), int(most / step + 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


def lines(
    title: str,
    series: Sequence[Line],
    x_label: str,
    marks: Sequence[tuple[float, str]] = (),
    y: tuple[float, float] | None = None,
) -> str:
    """Draw lines over one axis; ``marks`` are upright lines with a word each, where a stage begins."""
    points = [p for line in series for p in line.points]
    if not points:
        return ""
    x_span = (min(p[0] for p in points), max(p[0] for p in points))
    span = y or (min(p[1] for p in points), max(p[1] for p in points))
    axes = _Axes(x_span, span)
    parts = [_frame(title, axes, x_label)]
    for place, word in marks:
        across = axes.across(place)
        parts.append(f'<path class="grid" d="M{across} {_TOP}V{_HEIGHT - _BOTTOM}"/>')
        room = _WIDTH - across > 60
        anchor = "start" if room else "end"
        parts.append(
            f'<text x="{across if room else _WIDTH - 2}" y="{_TOP - 8}" text-anchor="{anchor}">'
            f"{escape(word)}</text>"
        )
    for line in series:
        path = " ".join(f"{axes.across(a)},{axes.down(b)}" for a, b in _thinned(line.points))
        words = escape(line.name)
        parts.append(
            f'<polyline class="{line.kind}" points="{path}"><title>{words}</title></polyline>'
        )
    return _svg(title, parts)


def bars(title: str, rows: Sequence[tuple[str, float, str, str]], most: float) -> str:
    """Draw bars that lie below one another: (label, length, words at its end, class of the style)."""
    height = 30 * len(rows) + 8
    parts = []
    for i, (label, value, words, kind) in enumerate(rows):
        top, length = 30 * i + 4, round(max(1.0, 250 * value / (most or 1)), 1)
        parts.append(f'<text x="0" y="{top + 9}">{escape(label)}</text>')
        parts.append(
            f'<rect class="{kind}" x="0" y="{top + 13}" width="{length}" height="9" rx="2"><title>'
            f"{escape(label)}: {escape(words)}</title></rect>"
        )
        parts.append(f'<text class="strong" x="{length + 6}" y="{top + 22}">{escape(words)}</text>')
    return _svg(title, parts, height)


def scatter(
    title: str,
    points: Sequence[tuple[float, float, str, str]],
    x_label: str,
    front: Sequence[tuple[float, float]] = (),
) -> str:
    """Draw points (x, y, name, class of the style), and the line through those of the front."""
    if not points:
        return ""
    x_span, y_span = ((min(v), max(v)) for v in ([p[0] for p in points], [p[1] for p in points]))
    axes = _Axes(_padded(x_span), _padded(y_span))
    parts = [_frame(title, axes, x_label)]
    if len(front) > 1:
        path = " ".join(f"{axes.across(a)},{axes.down(b)}" for a, b in sorted(front))
        parts.append(
            f'<polyline class="line-front" points="{path}"><title>Pareto front</title></polyline>'
        )
    for a, b, name, kind in points:
        x, y = axes.across(a), axes.down(b)
        parts.append(
            f'<circle class="{kind}" cx="{x}" cy="{y}" r="5"><title>{escape(name)}: {a:.4g}, '
            f"{b:.2f}</title></circle>"
        )
        on_right = x > _WIDTH * 0.6
        anchor, shift = ("end", -8) if on_right else ("start", 8)
        parts.append(
            f'<text x="{x + shift}" y="{y - 6}" text-anchor="{anchor}">{escape(name[:28])}</text>'
        )
    return _svg(title, parts)


def _padded(span: tuple[float, float]) -> tuple[float, float]:
    room = (span[1] - span[0]) * 0.12 or abs(span[0]) * 0.1 or 1
    return span[0] - room, span[1] + room


def _frame(title: str, axes: _Axes, x_label: str) -> str:
    parts = []
    for value in nice_ticks(*axes.y):
        down = axes.down(value)
        parts.append(f'<path class="grid" d="M{_LEFT} {down}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 5}" y="{down + 4}" text-anchor="end">{value:g}</text>')
    for value in nice_ticks(*axes.x, about=5):
        parts.append(
            f'<text x="{axes.across(value)}" y="{_HEIGHT - _BOTTOM + 14}" text-anchor="middle">'
            f"{value:g}</text>"
        )
    middle = (_WIDTH + _LEFT - _RIGHT) / 2
    parts.append(
        f'<text x="{middle}" y="{_HEIGHT - 5}" text-anchor="middle">{escape(x_label)}</text>'
    )
    return "".join(parts)


def _svg(title: str, parts: Iterable[str], height: float = _HEIGHT) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {height:g}" role="img"><title>{escape(title)}'
        f"</title>{''.join(parts)}</svg>"
    )


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return as many points as can be told apart; the last one is among them."""
    step = -(-len(points) // _MOST_POINTS)
    kept = list(points[::step]) if step else []
    return kept if not points or kept[-1] == points[-1] else [*kept, points[-1]]
