"""Curves as SVG in a page: they show without a script, and charts.js adds hovering and zooming."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

WIDTH, HEIGHT = 400, 200
LEFT, RIGHT, TOP, BOTTOM = 56, 8, 8, 22
"""Of the viewBox, and what axes take of it."""
MOST_POINTS = 600
"""Of a curve with more, a point is the mean of an equal stretch."""
Bounds = tuple[float | None, float | None]


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
    bounds: Bounds = (None, None),
    shaded: Sequence[tuple[str, float, float]] = (),
    about: str = "",
) -> str:
    """A ``figure`` for `mssr.runs.html.render`, where it is marked safe; all texts are escaped here.

    Args:
        bounds: of y, where they are not to follow from the values.
        shaded: what it means, and from where to where on x.
        about: shown when the pointer rests on the title.
    """
    series = [_prepared(one) for one in series]  # the script draws from the same numbers
    curves = [{key: getattr(one, key) for key in Series.__slots__} for one in series]
    numbers = {"x": x_label, "bounds": bounds, "shaded": shaded, "series": curves}
    text = json.dumps(numbers, separators=(",", ":")).replace("<", "\\u003c")
    # A single curve is named by the title.
    names = [(f"s{k % 8}", one.name) for k, one in enumerate(series) if len(series) > 1]
    names += [("shade", what) for what in dict.fromkeys(what for what, _, _ in shaded)]
    legend = "".join(f'<li class="{style}">{html.escape(name)}</li>' for style, name in names)
    ends = [(one.name, *v) for one in series if (v := [short(y) for y in one.y if y is not None])]
    words = "; ".join(f"{name} from {first} to {rest[-1] if rest else first}" for name, first, *rest in ends)
    return (
        f'<figure class="chart"><figcaption title="{html.escape(about)}">{html.escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(f"{title}: {words}")}">'
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
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.{digits}g}"


def _extent(values: Sequence[float], bounds: Bounds) -> tuple[float, float]:
    """Of an axis: the values with a margin that does not cross 0, unless bounds say so; never empty."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    margin = 0.05 * (high - low) or 0.1 * abs(high) or 1.0
    least = low - margin if low < 0 else max(low - margin, 0.0)
    first = least if bounds[0] is None else bounds[0]
    last = high + margin if bounds[1] is None else bounds[1]
    return (first, last) if first < last else (first, first + 1.0)


def _drawing(series: Sequence[Series], bounds: Bounds, shaded: Sequence[tuple[str, float, float]]) -> str:
    xs = [x for one in series for x in one.x] or [0.0]
    x0, x1 = (min(xs), max(xs)) if min(xs) < max(xs) else (xs[0] - 1, xs[0] + 1)
    lines = [v for one in series if one.line for v in one.y if v is not None]
    y0, y1 = _extent([*lines, *(v for one in series for v in (*one.low, *one.high))], bounds)

    def px(x: float) -> float:
        return LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        return HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)

    def points(x: Iterable[float], y: Iterable[float]) -> list[str]:
        return [f"{px(a):.1f} {py(b):.1f}" for a, b in zip(x, y, strict=True)]

    parts = []
    for _, first, last in shaded:
        a, b = px(max(first, x0)), px(min(last, x1))
        place = f'x="{a:.1f}" y="{TOP}" width="{max(b - a, 1):.1f}" height="{HEIGHT - TOP - BOTTOM}"'
        parts.append(f'<rect class="shade" {place}/>')
    # Where the values hardly differ, so would their labels.
    digits = 6 if y1 - y0 < 0.01 * max(abs(y0), abs(y1)) else 3
    for y in ticks(y0, y1):
        parts.append(f'<path class="grid" d="M{LEFT} {py(y):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 4}" y="{py(y) + 4:.1f}" class="end">{short(y, digits)}</text>')
    for x in ticks(x0, x1):
        parts.append(f'<text x="{px(x):.1f}" y="{HEIGHT - 6}" class="mid">{short(x)}</text>')
    for k, one in enumerate(series):
        if one.low:
            outline = "L".join([*points(one.x, one.high), *reversed(points(one.x, one.low))])
            parts.append(f'<path class="area{"" if one.line else " alone"} s{k % 8}" d="M{outline}Z"/>')
    for k, one in enumerate(series):
        path, pen = "", "M"
        for x, v in zip(one.x, one.y, strict=True) if one.line else ():
            path, pen = (path, "M") if v is None else (f"{path}{pen}{px(x):.1f} {py(v):.1f}", "L")
            if v is not None and (one.dots or len(one.x) == 1):
                parts.append(f'<circle class="s{k % 8}" cx="{px(x):.1f}" cy="{py(v):.1f}" r="2.5"/>')
        parts.append(f'<path class="line s{k % 8}" d="{path}"/>' if path else "")
    return f'<g class="plot">{"".join(parts)}</g>'


def _prepared(one: Series) -> Series:
    """With at most `MOST_POINTS` points, of six digits."""

    def of(values: Sequence[Any]) -> list[Any]:
        numbers = np.array([math.nan if v is None else v for v in values], np.float64)
        parts = np.array_split(numbers, MOST_POINTS) if len(numbers) > MOST_POINTS else numbers[:, None]
        known = [part[~np.isnan(part)] for part in parts]
        return [float(f"{part.mean():.6g}") if len(part) else None for part in known]

    return replace(one, x=of(one.x), y=of(one.y), low=of(one.low), high=of(one.high))
