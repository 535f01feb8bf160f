"""Small plots as inline SVG, coloured by the page's CSS variables: no script, no network. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]

WIDTH, HEIGHT = 560, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 12, 40
_NUM_COLOURS = 8
_NUM_TICKS = 5


@dataclass(frozen=True)
class Series:
    """A line. Points ascend in x."""

    name: str
    points: Sequence[Point]
    dots: bool = False


@dataclass(frozen=True)
class Axes:
    """The axes' labels, and whether x is logarithmic. `y_max` 0: as far as the points go."""

    x: str
    y: str
    log_x: bool = False
    y_max: float = 0.0


def colour(index: int) -> str:
    """The colour of the run with this number."""
    return f"var(--c{index % _NUM_COLOURS})"


def ticks(high: float, count: int = _NUM_TICKS) -> list[float]:
    """Round numbers from 0 to just beyond `high`, about `count` steps of 1, 2 or 5 times a power of ten."""
    if not 0 < high < math.inf:
        return [0.0, 1.0]
    raw = high / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if raw <= power * factor * (1 + 1e-9))
    return [step * i for i in range(math.ceil(high / step - 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten around [low, high], with 2 and 5 between them where there are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    last = max(last, first + 1)
    factors = (1, 2, 5) if last - first <= 2 else (1,)
    found = [factor * 10.0**power for power in range(first, last) for factor in factors]
    return [*found, 10.0**last]


def lines(series: Sequence[Series], axes: Axes) -> str:
    """One plot. Points with x <= 0 are left out of a logarithmic one."""
    kept = [Series(s.name, [p for p in s.points if not axes.log_x or p[0] > 0], s.dots) for s in series]
    xs = [x for s in kept for x, _ in s.points]
    if not xs:
        return '<p class="none">nothing was measured</p>'
    x_ticks = log_ticks(min(xs), max(xs)) if axes.log_x else ticks(max(xs))
    y_ticks = ticks(axes.y_max or max(y for s in kept for _, y in s.points))
    to_x, to_y = _scale_x(x_ticks, axes.log_x), _scale_y(y_ticks[-1])
    parts = [_frame(x_ticks, y_ticks, to_x, to_y, axes)]
    for index, s in enumerate(kept):
        path = " ".join(f"{to_x(x):.1f},{to_y(y):.1f}" for x, y in s.points)
        style = f'style="stroke:{colour(index)}"'
        parts.append(f'<polyline class="line" {style} points="{path}"><title>{escape(s.name)}</title></polyline>')
        if s.dots:
            parts += [
                f'<circle r="3.5" cx="{to_x(x):.1f}" cy="{to_y(y):.1f}" style="fill:{colour(index)}">'
                f"<title>{x:.4g}: {y:.4g}</title></circle>"
                for x, y in s.points
            ]
    return _svg(parts, f"{axes.y} against {axes.x}")


@dataclass(frozen=True)
class Bar:
    """A request: from sending to its first token, from there to its end, in seconds."""

    sent_s: float
    first_s: float
    end_s: float
    failed: bool
    words: str


def bars(requests: Sequence[Bar], x_name: str) -> str:
    """One row per request, from the top down."""
    if not requests:
        return '<p class="none">nothing was sent</p>'
    x_ticks = ticks(max(bar.end_s for bar in requests))
    to_x = _scale_x(x_ticks, log=False)
    row = (HEIGHT - _TOP - _BOTTOM) / len(requests)
    height = max(0.4, row * 0.8)
    parts = [_frame(x_ticks, [], to_x, _scale_y(1.0), Axes(x_name, "requests"))]
    for index, bar in enumerate(requests):
        y = _TOP + index * row
        spans = [("fail", bar.sent_s, bar.end_s)]
        if not bar.failed:
            spans = [("wait", bar.sent_s, bar.first_s), ("flow", bar.first_s, bar.end_s)]
        rects = "".join(
            f'<rect class="{name}" x="{to_x(start):.1f}" y="{y:.1f}" '
            f'width="{max(0.3, to_x(end) - to_x(start)):.1f}" height="{height:.1f}"/>'
            for name, start, end in spans
        )
        parts.append(f"<g>{rects}<title>{escape(bar.words)}</title></g>")
    return _svg(parts, "requests over time")


def _scale_x(x_ticks: Sequence[float], log: bool) -> Callable[[float], float]:
    place = math.log10 if log else float
    low, high = place(x_ticks[0]), place(x_ticks[-1])
    return lambda x: _LEFT + (place(x) - low) / (high - low) * (WIDTH - _LEFT - _RIGHT)


def _scale_y(high: float) -> Callable[[float], float]:
    return lambda y: HEIGHT - _BOTTOM - y / high * (HEIGHT - _TOP - _BOTTOM)


def _frame(
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    to_x: Callable[[float], float],
    to_y: Callable[[float], float],
    axes: Axes,
) -> str:
    bottom = HEIGHT - _BOTTOM
    parts = [
        f'<line class="grid" x1="{to_x(x):.1f}" x2="{to_x(x):.1f}" y1="{_TOP}" y2="{bottom}"/>'
        f'<text x="{to_x(x):.1f}" y="{bottom + 15}" text-anchor="middle">{x:.10g}</text>'
        for x in x_ticks
    ]
    parts += [
        f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{to_y(y):.1f}" y2="{to_y(y):.1f}"/>'
        f'<text x="{_LEFT - 6}" y="{to_y(y) + 4:.1f}" text-anchor="end">{y:.10g}</text>'
        for y in y_ticks
    ]
    middle_x, middle_y = (_LEFT + WIDTH - _RIGHT) / 2, (_TOP + bottom) / 2
    parts.append(f'<text x="{middle_x}" y="{HEIGHT - 8}" text-anchor="middle">{escape(axes.x)}</text>')
    turn = f'transform="rotate(-90 12 {middle_y})"'
    parts.append(f'<text x="12" y="{middle_y}" text-anchor="middle" {turn}>{escape(axes.y)}</text>')
    return "".join(parts)


def _svg(parts: Sequence[str], label: str) -> str:
    head = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
    return head + "".join(parts) + "</svg>"
