"""The figure of `mssr compare`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mssr.evaluation.results import Evaluation
from mssr.tools.run_curves import AXES, RunCurves


def draw(
    runs: Mapping[str, RunCurves],
    evaluations: Mapping[str, Evaluation],
    targets: Sequence[float],
    metric: str,
    path: Path,
) -> None:
    """Runs: accuracy over steps, rollouts and hours, and entropy. Evaluations: accuracies with intervals."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    layout = [[*AXES, "entropy"]] if runs else []
    if evaluations:
        layout.append(["evaluations"] * (4 if runs else 1))
    figure = Figure(figsize=(17 if runs else 8, 4.2 * len(layout)), layout="constrained")
    axes: Mapping[str, Any] = figure.subplot_mosaic(layout)
    for index, (name, run) in enumerate(runs.items()):
        color = f"C{index % 10}"
        for key in AXES:
            _line(axes[key], run.training, key, color=color, alpha=0.3, linewidth=1)
            _line(axes[key], run.validation, key, color=color, label=name, marker="o", markersize=3.5)
        _line(axes["entropy"], run.entropy, "step", color=color)
    if runs:
        for key, label in AXES.items():
            for target in targets:
                axes[key].axhline(target, color="#555", linewidth=0.8, linestyle="--")
            axes[key].set(xlabel=label, title=f"accuracy over {label}")
            axes[key].grid(alpha=0.3)
        axes["step"].set_ylabel(f"accuracy ({metric}; faint: training)")
        axes["step"].legend(fontsize=8)
        axes["rollouts"].xaxis.set_major_formatter(EngFormatter(sep=""))
        axes["entropy"].set(xlabel="steps", title="entropy, nats per token")
        axes["entropy"].set_ylim(bottom=0)
        axes["entropy"].grid(alpha=0.3)
    if evaluations:
        _evaluations(axes["evaluations"], evaluations)
    figure.savefig(path, dpi=110)


def _line(axis: Any, points: Sequence[Any], key: str, **style: Any) -> None:
    axis.plot([getattr(point, key) for point in points], [point.value for point in points], **style)


def _evaluations(axis: Any, evaluations: Mapping[str, Evaluation]) -> None:
    """Groups of points with error bars, a group a benchmark."""
    benchmarks = sorted({name for e in evaluations.values() for name in e.summary["benchmarks"]})
    width = 0.5 / len(evaluations)
    for index, (name, evaluation) in enumerate(evaluations.items()):
        numbers = evaluation.summary["benchmarks"]
        have = [(k, numbers[b]) for k, b in enumerate(benchmarks) if b in numbers]
        places = [k + (index - (len(evaluations) - 1) / 2) * width for k, _ in have]
        values = [n["accuracy"] for _, n in have]
        low = [max(0.0, n["accuracy"] - n["interval"][0]) for _, n in have]
        high = [max(0.0, n["interval"][1] - n["accuracy"]) for _, n in have]
        axis.errorbar(
            places, values, yerr=[low, high], fmt="o", capsize=3, color=f"C{index % 10}", label=name
        )
    axis.set_xticks(range(len(benchmarks)), benchmarks)
    axis.set(xlim=(-0.5, len(benchmarks) - 0.5), title="accuracy with 95% intervals")
    axis.grid(axis="y", alpha=0.3)
    axis.legend(fontsize=8)
