"""Curves as SVG in a page: they show without a script, and charts.js adds hovering and zooming."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

WIDTH, HEIGHT = 400, 200
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 8, 22
"""Of the viewBox, and what axes take of it."""
MOST_POINTS = 600
"""Of a curve with more, a point is the mean of an equal stretch."""


@dataclass(frozen=True, slots=True)
class Series:
    """A curve. Example: ``Series("train", [1, 2, 3], [0.2, None, 0.3])``"""

    name: str
    x: Sequence[float]
    """Rising."""
    y: Sequence[float | None]
    """What is shown for a point; None leaves a gap."""
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    """An area from low to high, of as many points as the curve; or none."""
    line: bool = True
    """Whether y is drawn, or the area alone."""
    dots: bool = False


def chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str = "step",
    bounds: tuple[float | None, float | None] = (None, None),
    shaded: Sequence[tuple[str, float, float]] = (),
    about: str = "",
) -> str:
    """A ``figure`` for `mssr.runs.html.render`, where it is marked safe; all texts are escaped here.

    Args:
        bounds: of y, where they are not to follow from the values.
        shaded: what it means, and from where to where on x.
        about: shown when the pointer rests on the title.
    """
    series = [_rounded(_thinned(one)) for one in series]  # the script draws from the same numbers
    numbers = {
        "x": x_label,
        "bounds": bounds,
        "shaded": shaded,
        "series": [
            {key: getattr(one, key) for key in ("x", "y", "low", "high")}
            | {"name": one.name, "line": one.line, "dots": one.dots}
            for one in series
        ],
    }
    text = json.dumps(numbers, separators=(",", ":")).replace("<", "\\u003c")
    # A single curve is named by the title.
    names = [one.name for one in series] if len(series) > 1 else []
    legend = "".join(f'<li class="s{k % 8}">{html.escape(name)}</li>' for k, name in enumerate(names))
    legend += "".join(f'<li class="shade">{html.escape(what)}</li>' for what in dict(s[:2] for s in shaded))
    label = html.escape(f"{title}: {_in_words(series, x_label)}")
    return (
        f'<figure class="chart"><figcaption title="{html.escape(about)}">{html.escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
        f"{_drawing(series, bounds, shaded)}</svg>"
        f'<ul class="legend">{legend}</ul><output></output>'
        f'<script type="application/json">{text}</script></figure>'
    )


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers within a range, at most so many: 1, 2 or 5 times a power of ten apart."""
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= most)
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def short(value: float, digits: int = 3) -> str:
    """1500 -> "1.5k", 0.00012 -> "0.00012"."""
    if abs(value) >= 1000:
        for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
            if abs(value) >= size:
                return f"{value / size:.4g}{letter}"
    return f"{value:.{digits}g}"


def extent(values: Sequence[float], bounds: tuple[float | None, float | None]) -> tuple[float, float]:
    """Of an axis: the values with a margin, unless bounds say otherwise; never empty."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    margin = 0.05 * (high - low) or 0.1 * abs(high) or 1.0
    first = low - margin if bounds[0] is None else bounds[0]
    last = high + margin if bounds[1] is None else bounds[1]
    return (first, last) if first < last else (first, first + 1.0)


def _drawing(
    series: Sequence[Series],
    bounds: tuple[float | None, float | None],
    shaded: Sequence[tuple[str, float, float]],
) -> str:
    xs = [x for one in series for x in one.x]
    x0, x1 = (min(xs), max(xs)) if xs and min(xs) < max(xs) else (xs[0] - 1, xs[0] + 1) if xs else (0.0, 1.0)
    drawn = [v for one in series if one.line for v in one.y if v is not None]
    y0, y1 = extent([*drawn, *(v for one in series for v in (*one.low, *one.high))], bounds)

    def px(x: float) -> float:
        return LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        return HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for _, first, last in shaded:
        a, b = px(max(first, x0)), px(min(last, x1))
        parts.append(f'<rect class="shade" x="{a:.1f}" y="{TOP}" width="{max(b - a, 1):.1f}" '
                     f'height="{HEIGHT - TOP - BOTTOM}"/>')  # fmt: skip
    # Where the values hardly differ, so would their labels.
    digits = 6 if y1 - y0 < 0.01 * max(abs(y0), abs(y1)) else 3
    for y in ticks(y0, y1):
        parts.append(f'<path class="grid" d="M{LEFT} {py(y):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 4}" y="{py(y) + 4:.1f}" class="end">{short(y, digits)}</text>')
    for x in ticks(x0, x1):
        parts.append(f'<text x="{px(x):.1f}" y="{HEIGHT - 6}" class="mid">{short(x)}</text>')
    for k, one in enumerate(series):
        if one.low:
            there = [f"{px(x):.1f} {py(v):.1f}" for x, v in zip(one.x, one.high, strict=True)]
            back = [f"{px(x):.1f} {py(v):.1f}" for x, v in zip(one.x, one.low, strict=True)]
            outline = "L".join([*there, *reversed(back)])
            alone = "" if one.line else " alone"
            parts.append(f'<path class="area{alone} s{k % 8}" d="M{outline}Z"/>')
    for k, one in enumerate(series):
        path, pen = "", "M"
        for x, v in zip(one.x, one.y if one.line else (), strict=one.line):
            path, pen = (path, "M") if v is None else (f"{path}{pen}{px(x):.1f} {py(v):.1f}", "L")
            if v is not None and (one.dots or len(one.x) == 1):
                parts.append(f'<circle class="s{k % 8}" cx="{px(x):.1f}" cy="{py(v):.1f}" r="2.5"/>')
        parts.append(f'<path class="line s{k % 8}" d="{path}"/>' if path else "")
    return f'<g class="plot">{"".join(parts)}</g>'


def _thinned(one: Series) -> Series:
    """With at most `MOST_POINTS` points."""
    if len(one.x) <= MOST_POINTS:
        return one
    ends = [round(k * len(one.x) / MOST_POINTS) for k in range(MOST_POINTS + 1)]

    def means(values: Sequence[float | None]) -> list[float | None]:
        parts = [[v for v in values[a:b] if v is not None] for a, b in pairwise(ends)]
        return [sum(part) / len(part) if part else None for part in parts]

    x, low, high = (
        [v for v in means(values) if v is not None] if values else () for values in (one.x, one.low, one.high)
    )
    return replace(one, x=x, y=means(one.y), low=low, high=high)


def _rounded(one: Series) -> Series:
    def of(values: Sequence[Any]) -> list[Any]:
        return [None if value is None else float(f"{value:.6g}") for value in values]

    return replace(one, x=of(one.x), y=of(one.y), low=of(one.low), high=of(one.high))


def _in_words(series: Sequence[Series], x_label: str) -> str:
    """For those who cannot see it."""
    found = []
    for one in series:
        points = [(x, y) for x, y in zip(one.x, one.y, strict=True) if y is not None]
        if points:
            (a, first), (b, last) = points[0], points[-1]
            found.append(f"{one.name} from {short(first)} at {x_label} {a:g} to {short(last)} at {b:g}")
    return "; ".join(found) or "no values"
