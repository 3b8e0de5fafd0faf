"""Wall time of a step's phases, and what was done in it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class PhaseTimer:
    """``with timer("rollout"): ...`` adds to that phase; `take` hands over what was collected."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        """By metric name, since they were taken last."""

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:  # a stop may end it, and the step be finished by the next start
            self.add({f"timing/{phase}_s": time.perf_counter() - start})

    def add(self, seconds: Mapping[str, float]) -> None:
        """Add seconds by metric name, for example those of another timer."""
        for key, value in seconds.items():
            self.seconds[key] = self.seconds.get(key, 0.0) + value

    def take(self) -> dict[str, float]:
        """Seconds by metric name, and start again."""
        seconds, self.seconds = self.seconds, {}
        return seconds


def speed(metrics: Mapping[str, float], rollouts: int, ranks: int) -> dict[str, float]:
    """How fast a step was; validation and checkpoint left out.

    ``perf/tokens_per_s_per_gpu``, where there are GPUs, counts the tokens of responses, and of its prompt for
    each, as EasyR1's ``perf/throughput`` does. MFU is

        perf/mfu = perf/update_tera_operations * 1e12 / (timing/update_s * ranks * peak of the GPU)

    with the operations of `mssr.actor.operations`; where the peak is not known there is only the numerator by
    the second and rank, ``perf/update_tflops``.
    """
    seconds = metrics["timing/step_s"]
    found = {
        "perf/rollouts_per_s": rollouts / seconds,
        "perf/tokens_per_s": metrics["rollout/tokens"] / seconds,
    }
    if "perf/gpus" in metrics:
        tokens = metrics["rollout/prompt_tokens"] + metrics["rollout/tokens"]
        found["perf/tokens_per_s_per_gpu"] = tokens / seconds / metrics["perf/gpus"]
    if "perf/update_tera_operations" in metrics:
        rate = metrics["perf/update_tera_operations"] / metrics["timing/update_s"] / ranks
        found["perf/update_tflops"] = rate
        if "perf/gpu_peak_tflops" in metrics:
            found["perf/mfu"] = rate / metrics["perf/gpu_peak_tflops"]
    return found
