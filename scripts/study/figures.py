"""The figures of docs/study.md, as SVG that is the same at every drawing."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from statistics import fmean, stdev
from typing import Any

from scripts.study.records import Estimate, Record, Runs, smooth

FAMILIES = {
    "MSSR and MVSR": "mssr mvsr mvsr_entropy_loss mvsr_text_anchor".split(),
    "one rollout a prompt": "mssr spo reinforce_pp flash_reinforce".split(),
    "groups": "mssr grpo rloo dr_grpo maxrl dbb vppo".split(),
}
COLORS = ["#000000", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]
"""Those of Okabe and Ito, which the colour-blind can tell apart. MSSR is black everywhere."""
STYLE = {
    "svg.hashsalt": "study", "svg.fonttype": "none", "font.size": 8, "axes.titlesize": 9,
    "legend.frameon": False, "axes.grid": True, "grid.alpha": 0.3, "lines.linewidth": 1.2,
    "axes.spines.top": False, "axes.spines.right": False,
}  # fmt: skip
EVERY = 4
"""Of the points of a curve that has one a step so many are drawn as one."""
Dots = tuple[str, Mapping[str, Mapping[str, Estimate | None]]]
"""Name of the axis, and the points by series and row."""


def draw(
    runs: Runs, rates: Sequence[float], seconds: Mapping[str, float], dots: Mapping[str, Dots]
) -> dict[str, str]:
    """SVG by name; a figure without runs is left out."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        entropies = {"": [*FAMILIES["MSSR and MVSR"], "grpo", "rloo", "reinforce_pp"]}
        found = {
            "accuracy": _by_rate(runs, rates, FAMILIES, "val", "validation accuracy"),
            "entropy": _by_rate(runs, rates, entropies, "entropy", "entropy, nats a token"),
            "own_best": _own_best(runs, seconds),
        } | {name: _dots(*one) for name, one in dots.items()}
        return {name: _svg(figure) for name, figure in found.items() if figure is not None}


def _figure(width: float, height: float, **margins: float) -> Any:
    """Margins in inches: a layout that measures texts would depend on the version that draws them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    figure.subplots_adjust(
        left=margins["left"] / width, right=1 - margins["right"] / width, bottom=0.45 / height,
        top=1 - margins.get("top", 0.25) / height, wspace=0.06, hspace=0.12,
    )  # fmt: skip
    return figure


def _points(record: Record, curve: str) -> tuple[Sequence[float], Sequence[float]]:
    """Steps and values of a curve; for "accuracy" the means of WINDOW steps."""
    values = record["curves"][curve]
    if curve == "val":
        return values["steps"], values["accuracy"]
    values = smooth(values) if curve == "accuracy" else values
    steps = range(record["steps"] - len(values) + 1, record["steps"] + 1)
    first = (len(values) - 1) % EVERY  # so that the last is drawn
    return steps[first::EVERY], values[first::EVERY]


def _line(
    axis: Any, runs: Iterable[Record], curve: str, band: bool, scale: float = 1.0, **style: Any
) -> None:
    """Mean over seeds, and a band of one standard error."""
    points = [_points(record, curve) for record in runs]
    x = [step * scale for step in points[0][0]]
    values = list(zip(*(ys for _, ys in points), strict=True))
    means = [fmean(ys) for ys in values]
    axis.plot(x, means, **style)
    if band and len(points) > 1:
        errors = [stdev(ys) / len(ys) ** 0.5 for ys in values]
        low, high = ([m + sign * e for m, e in zip(means, errors, strict=True)] for sign in (-1, 1))
        axis.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)


def _by_rate(
    runs: Runs, rates: Sequence[float], families: Mapping[str, Sequence[str]], curve: str, name: str
) -> Any:
    """A row a family, a column a learning rate."""
    figure = _figure(9.5, 0.7 + 1.9 * len(families), left=0.75, right=1.65)
    axes = figure.subplots(len(families), len(rates), sharex=True, sharey=True, squeeze=False)
    for row, (family, labels) in enumerate(families.items()):
        for label, color in zip(labels, COLORS, strict=False):
            axes[row, -1].plot([], [], color=color, label=label)  # in the legend, run or not
            for axis, lr in zip(axes[row], rates, strict=True):
                if found := runs.of(label, lr):
                    _line(axis, found.values(), curve, True, color=color)
        axes[row, 0].set_ylabel(f"{family}\n{name}" if family else name)
        axes[row, -1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    for column, lr in enumerate(rates):
        axes[0, column].set_title(f"learning rate {lr:.0e}".replace("e-0", "e-"))
        axes[-1, column].set_xlabel("steps")
    axes[0, 0].set_ylim(bottom=0)
    return figure


def _own_best(runs: Runs, seconds: Mapping[str, float]) -> Any:
    """Sampled accuracy at each method's own best rate, over steps (and rollouts) and over seconds."""
    labels = [label for label in dict.fromkeys(chain(*FAMILIES.values())) if runs.of(label)]
    if not labels:
        return None
    figure = _figure(9.5, 3.6, left=0.5, right=1.65, top=0.5)
    steps, time = figure.subplots(1, 2, sharey=True)
    for index, label in enumerate(labels):
        found = runs.of(label).values()
        style: dict[str, Any] = {
            "color": COLORS[index % len(COLORS)],
            "linestyle": "-" if index < len(COLORS) else "--",
        }
        _line(steps, found, "accuracy", False, label=label, **style)
        if label in seconds:
            _line(time, found, "accuracy", False, seconds[label], **style)
    rollouts = next(iter(runs.of(labels[0]).values()))["rollouts"]
    above = steps.secondary_xaxis("top", functions=(lambda x: x * rollouts, lambda x: x / rollouts))
    above.set_xlabel("rollouts")
    steps.set(xlabel="steps", ylabel="sampled accuracy, means of 5 steps")
    time.set_xlabel("seconds")
    figure.legend(loc="center left", bbox_to_anchor=(0.83, 0.5))
    return figure


def _dots(name: str, series: Mapping[str, Mapping[str, Estimate | None]]) -> Any:
    """A row a name, and in it a point with its interval for each series."""
    names = list(dict.fromkeys(row for rows in series.values() for row, one in rows.items() if one))
    if not names:
        return None
    figure = _figure(8, 0.8 + 0.28 * len(names), left=3.2, right=0.9)
    axis = figure.subplots()
    for index, (label, rows) in enumerate(series.items()):
        points = [(names.index(row), one) for row, one in rows.items() if one]
        y = [place + 0.22 * (index - (len(series) - 1) / 2) for place, _ in points]
        errors = [
            [max(0.0, e.value - e.low) for _, e in points],
            [max(0.0, e.high - e.value) for _, e in points],
        ]
        style: dict[str, Any] = {"fmt": "o", "color": COLORS[index], "markersize": 3, "linewidth": 1}
        axis.errorbar([one.value for _, one in points], y, xerr=errors, label=label, **style)
    axis.set_yticks(range(len(names)), names)
    axis.set(xlabel=name, ylim=(len(names) - 0.5, -0.5))
    if len(series) > 1:
        axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    if "difference" in name:
        axis.axvline(0, color="#555555", linewidth=0.8)
    if "share" in name:
        axis.set_xlim(0, 1)
    return figure


def _svg(figure: Any) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"
