"""The figures of docs/study.md, as SVG that is the same at every drawing."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from scripts.study.records import ESCAPED, Record, Runs, end, smooth, wilson

ROWS = {
    "MSSR and MVSR": "mssr mvsr mvsr_entropy_loss mvsr_text_anchor".split(),
    "one rollout a prompt": "mssr spo reinforce_pp flash_reinforce".split(),
    "groups": "mssr grpo rloo dr_grpo maxrl dbb vppo".split(),
}
COLORS = ["#000000", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]
"""Of a row's methods: those of Okabe and Ito, which the colour-blind can tell apart. MSSR is black everywhere."""
STYLE = {
    "svg.hashsalt": "study", "svg.fonttype": "none", "font.size": 8, "axes.titlesize": 9, "legend.frameon": False,
    "axes.grid": True, "grid.alpha": 0.3, "lines.linewidth": 1.2, "axes.spines.top": False,
    "axes.spines.right": False,
}  # fmt: skip
GRID = (1e-4, 2e-4, 3e-4)
Curve = Callable[[Record], tuple[Sequence[float], Sequence[float]]]


def validation(record: Record) -> tuple[Sequence[float], Sequence[float]]:
    return record["curves"]["val"]["steps"], record["curves"]["val"]["accuracy"]


def sampled(record: Record) -> tuple[Sequence[float], Sequence[float]]:
    values = smooth(record["curves"]["accuracy"])
    first = record["steps"] - len(values) + 1
    return range(first, record["steps"] + 1), values


def entropy(record: Record) -> tuple[Sequence[float], Sequence[float]]:
    """Every second step, which is enough to see."""
    values = record["curves"]["entropy"]
    return range(1, record["steps"] + 1, 2), values[::2]


def draw(runs: Runs, seconds: Mapping[str, float]) -> dict[str, str]:
    """SVG by name; a figure without runs is left out."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        found = {
            "accuracy": _grid(runs, validation, "validation accuracy", (0, 1)),
            "entropy": _grid(runs, entropy, "entropy, nats a token", None),
            "own_best": _own_best(runs, seconds),
            "escape": _escape(runs),
        }
        return {name: _svg(figure) for name, figure in found.items() if figure is not None}


def _grid(runs: Runs, curve: Curve, name: str, limits: tuple[float, float] | None) -> Any:
    """A row a family, a column a learning rate."""
    from matplotlib.figure import Figure

    if not any(runs.of(label, lr) for labels in ROWS.values() for label in labels for lr in GRID):
        return None
    figure = Figure(figsize=(9.5, 6.6))
    axes = figure.subplots(len(ROWS), len(GRID), sharex=True, sharey=True)
    figure.subplots_adjust(left=0.06, right=0.86, top=0.95, bottom=0.07, hspace=0.12, wspace=0.06)
    for row, (family, labels) in enumerate(ROWS.items()):
        for column, lr in enumerate(GRID):
            axis = axes[row, column]
            for label, color in zip(labels, COLORS, strict=False):
                _line(axis, list(runs.of(label, lr).values()), curve, label, color)
            if row == 0:
                axis.set_title(f"learning rate {lr:.0e}".replace("e-0", "e-"))
        axes[row, 0].set_ylabel(f"{family}\n{name}" if row == 1 else family)
        handles = [axes[row, -1].plot([], [], color=color)[0] for color in COLORS[: len(labels)]]
        axes[row, -1].legend(handles, labels, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    axes[-1, 1].set_xlabel("steps")
    if limits:
        axes[0, 0].set_ylim(*limits)
    else:
        axes[0, 0].set_ylim(bottom=0)
    return figure


def _line(axis: Any, found: Sequence[Record], curve: Curve, label: str, color: str, scale: float = 1.0) -> None:
    """Mean over seeds, and a band of one standard error."""
    if not found:
        return
    curves = [curve(record) for record in found]
    x = [step * scale for step in curves[0][0]]
    values = list(zip(*(ys for _, ys in curves), strict=True))
    means = [fmean(ys) for ys in values]
    axis.plot(x, means, color=color, label=label)
    if len(found) > 1:
        errors = [stdev(ys) / len(ys) ** 0.5 for ys in values]
        low, high = ([m + sign * e for m, e in zip(means, errors, strict=True)] for sign in (-1, 1))
        axis.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)


def _own_best(runs: Runs, seconds: Mapping[str, float]) -> Any:
    """Sampled accuracy at each method's own best rate, over steps (and rollouts) and over seconds."""
    from matplotlib.figure import Figure

    labels = [label for label in dict.fromkeys(sum(ROWS.values(), [])) if runs.of(label)]
    if not labels:
        return None
    figure = Figure(figsize=(9.5, 3.6))
    steps, time = figure.subplots(1, 2, sharey=True)
    figure.subplots_adjust(left=0.06, right=0.82, top=0.86, bottom=0.13, wspace=0.06)
    for index, label in enumerate(labels):
        color = COLORS[index % len(COLORS)]
        style = {"color": color, "linestyle": "-" if index < len(COLORS) else "--"}
        curves = [sampled(record) for record in runs.of(label).values()]
        means = [fmean(ys) for ys in zip(*(ys for _, ys in curves), strict=True)]
        steps.plot(curves[0][0], means, label=label, **style)
        if label in seconds:
            time.plot([step * seconds[label] for step in curves[0][0]], means, **style)
    rollouts = next(iter(runs.of(labels[0]).values()))["rollouts"]
    above = steps.secondary_xaxis("top", functions=(lambda x: x * rollouts, lambda x: x / rollouts))
    above.set_xlabel("rollouts")
    steps.set(xlabel="steps", ylabel="sampled accuracy, means of 5 steps")
    time.set_xlabel("seconds")
    figure.legend(loc="center left", bbox_to_anchor=(0.83, 0.5))
    return figure


def _escape(runs: Runs) -> Any:
    """Share of seeds that leave the local optimum, with Wilson's intervals."""
    from matplotlib.figure import Figure

    shares = []
    for label in dict.fromkeys(sum(ROWS.values(), [])):
        if found := runs.of(label, None, "escape").values():
            out = sum(end(record, "careful") >= ESCAPED for record in found)
            shares.append((label, wilson(out, len(found))))
    if not shares:
        return None
    figure = Figure(figsize=(6, 0.6 + 0.22 * len(shares)))
    axis = figure.subplots()
    figure.subplots_adjust(left=0.28, right=0.97, top=0.97, bottom=0.5 / (0.6 + 0.22 * len(shares)))
    values = [share.value for _, share in shares]
    errors = [[s.value - s.low for _, s in shares], [s.high - s.value for _, s in shares]]
    axis.errorbar(values, range(len(shares)), xerr=errors, fmt="o", color=COLORS[0], markersize=4)
    axis.set_yticks(range(len(shares)), [label for label, _ in shares])
    axis.invert_yaxis()
    axis.set(xlim=(0, 1), xlabel="share of seeds")
    return figure


def _svg(figure: Any) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"
