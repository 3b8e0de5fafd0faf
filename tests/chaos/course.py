"""A course: injuries at seeded moments of one run, and what must be true at its end."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.injuries import DRIVER_ENDS, INJURIES, nan_on_one_rank
from tests.chaos.run import PATIENCE_S, STEPS, Run, Skipped, abandoned_memory, comparable


@dataclass(frozen=True, slots=True)
class Injected:
    """A line of the table."""

    kind: str
    after_step: int
    what: str
    outcome: str


def undisturbed(directory: Path, config: Path, extra: Sequence[str] = ()) -> Run:
    """What every disturbed run must equal. ``extra``: overrides that do not change what is computed."""
    run = Run(directory, config)
    run.extra = extra
    run.start()
    assert run.wait() == 0, run.screen.read_text()
    return run


def injure(directory: Path, config: Path, reference: Run, kinds: list[str], seed: int) -> list[Injected]:
    """Run with these injuries, one after the other, and compare the end.

    Raises:
        AssertionError: a promise is broken.
    """
    rng = random.Random(seed)
    memory_before = abandoned_memory()
    run = Run(directory, config, small_disk="disk_full" in kinds)
    steps = sorted(rng.sample(range(2, STEPS - 1), len(kinds)))
    # A second within which a step begins, generates, scores, updates, or a checkpoint is written.
    injected = []
    try:
        run.start()
        for kind, step in zip(kinds, steps, strict=True):
            run.reach(step)
            time.sleep(rng.random())
            try:
                what = INJURIES[kind](run, rng)
            except Skipped as reason:
                injected.append(Injected(kind, step, "", f"skipped: {reason}"))
                continue
            at = run.metrics()[-1]["step"]
            if kind in DRIVER_ENDS:
                began = time.monotonic()
                code = run.wait()
                if kind in ("sigterm", "ctrl_c"):
                    what += f", ended after {time.monotonic() - began:.1f} s"
                assert code in (DRIVER_ENDS[kind], 0), f"exit code {code}; see {directory}"
                run.start()
            injected.append(Injected(kind, at, what, "as undisturbed"))
        code = run.wait()
        if code == 1 and [e["event"] for e in run.events()][-1:] == ["checkpoint_failed"]:
            run.start()  # the last checkpoint could not be written, as the run has said
            code = run.wait()
        assert code == 0, f"exit code {code}: {run.screen.read_text()[-2000:]}"
        check(run, reference, memory_before)
    finally:
        run.close()
    return injected


def check(run: Run, reference: Run, memory_before: set[str]) -> None:
    """Nothing is lost, nothing comes twice, nothing is left behind."""
    ours, theirs = comparable(run.metrics()), comparable(reference.metrics())
    assert [r["step"] for r in ours] == [r["step"] for r in theirs], f"steps differ; see {run.directory}"
    for a, b in zip(ours, theirs, strict=True):
        different = {k: (a.get(k), b.get(k)) for k in a.keys() | b.keys() if a.get(k) != b.get(k)}
        assert not different, f"step {a['step']} differs: {different}; see {run.directory}"
    assert run.samples() == reference.samples(), f"samples differ; see {run.directory}"
    happened = {e["event"] for e in run.events()}
    assert run.expected_events <= happened, f"no word of {run.expected_events - happened}"
    screen = run.screen.read_text()
    for event in run.events():
        assert event["detail"] in screen
    deadline = time.monotonic() + PATIENCE_S
    while left := run.processes():
        assert time.monotonic() < deadline, f"processes are left: {left}"
        time.sleep(0.2)
    # Twice, for another run on this machine may be about to use what it has just made.
    left_memory = abandoned_memory() - memory_before
    time.sleep(1)
    left_memory &= abandoned_memory()
    assert not left_memory, f"shared memory is left: {left_memory}"


def nan_course(directory: Path, config: Path, reference: Run, kinds: list[str], seed: int) -> list[Injected]:
    """A NaN on one rank: both skip that update, the prompts are written down, and the run goes on.

    An update is missing, so from there on the metrics are others than those of the undisturbed run.
    """
    rng = random.Random(seed)
    run = Run(directory, config)
    try:
        run.start()
        step = rng.randrange(2, STEPS - 1)
        run.reach(step)
        what = nan_on_one_rank(run, rng)
        assert run.wait() == 0, run.screen.read_text()
        records = run.metrics()
        skipped = [r for r in records if r.get("policy/skipped_updates")]
        assert len(skipped) == 1, f"updates were skipped in {len(skipped)} steps; see {directory}"
        hit = skipped[0]["step"]
        assert comparable(records[:hit]) == comparable(reference.metrics()[:hit])
        assert [r["step"] for r in records] == list(range(STEPS + 1))
        # Engine and both ranks still have the same weights.
        assert max(r["rollout/mismatch_max"] for r in records[1:]) < 1e-5
        dumps = [p.name for p in (run.run_dir / "nonfinite").glob(f"step-{hit:06d}-*-rank-1.json")]
        assert dumps, f"the prompts were not written down; see {directory}"
    finally:
        run.close()
    return [Injected("nan_on_one_rank", hit, what, "skipped on both ranks, dumped")]
