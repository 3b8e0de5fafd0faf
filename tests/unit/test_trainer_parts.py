"""Sampler, seeds, metrics file, checkpoints, weights on the wire: each keeps its promise by itself."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mssr.data.sampler import EpochSampler
from mssr.rollout.seeds import request_seed
from mssr.runs.checkpoint import read_state, write_state
from mssr.runs.jsonl import append_record, read_records, write_samples
from mssr.runs.loggers import discard_after

pytestmark = pytest.mark.unit


def test_sampler_sees_every_prompt_once_an_epoch_in_a_new_order() -> None:
    ids = [f"p{i}" for i in range(10)]
    sampler = EpochSampler(ids, seed=0)
    drawn = [i for _ in range(10) for i in sampler.next(3)]
    epochs = [drawn[k : k + 10] for k in (0, 10, 20)]
    assert all(sorted(e) == sorted(ids) for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert sampler.epoch == 3.0
    assert EpochSampler(ids, seed=1).next(10) != epochs[0]
    assert EpochSampler(ids, seed=0, shuffle=False).next(12) == ids + ids[:2]
    assert len(EpochSampler(ids, seed=0).next(25)) == 25  # more than an epoch at once


def test_sampler_goes_on_where_it_stopped() -> None:
    ids = [f"p{i}" for i in range(7)]
    straight, stopped = EpochSampler(ids, seed=3), EpochSampler(ids, seed=3)
    straight.next(4), stopped.next(4)
    resumed = EpochSampler(ids, seed=3)
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    assert [resumed.next(4) for _ in range(5)] == [straight.next(4) for _ in range(5)]
    with pytest.raises(ValueError, match="7 prompts, this has 6"):
        EpochSampler(ids[:6], seed=3).load_state_dict(stopped.state_dict())


def test_request_seeds_differ_in_every_coordinate() -> None:
    seeds = [
        request_seed(run, step, prompt, sample)
        for run in range(3)
        for step in range(20)
        for prompt in ("a", "b", "1", "11")
        for sample in range(8)
    ]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= s < 2**31 for s in seeds)
    assert request_seed(0, 1, "a", 2) == request_seed(0, 1, "a", 2)


def test_metrics_file_has_neither_gap_nor_duplicate_and_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    discard_after(path, None)
    for step in range(4):
        append_record(path, {"step": step, "run": 1})
    path.write_text(path.read_text() + '{"step": 4, "ru')  # cut off by a crash
    discard_after(path, 2)
    append_record(path, {"step": 3, "run": 2})
    records = [json.loads(x) for x in path.read_text().splitlines()]
    assert [(r["step"], r["run"]) for r in records] == [(0, 1), (1, 1), (2, 1), (3, 2)]
    discarded = (tmp_path / "metrics.discarded.jsonl").read_text()
    assert discarded == '{"step": 3, "run": 1}\n{"step": 4, "ru'


def test_a_record_is_not_lost_behind_one_that_a_crash_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    append_record(path, {"event": "a"})
    with path.open("a") as file:
        file.write('{"event": "b", "de')
    append_record(path, {"event": "\u00fc"})
    append_record(path, {"event": "d"})
    assert [r["event"] for r in read_records(path, skip_damaged=True)] == ["a", "\u00fc", "d"]


def test_samples_of_a_step_are_replaced_by_split(tmp_path: Path) -> None:
    path = tmp_path / "step.jsonl"
    write_samples(path, [{"split": "train", "n": 1}], "train")
    write_samples(path, [{"split": "val", "n": 2}], "val")
    write_samples(path, [{"split": "train", "n": 3}], "train")
    assert [json.loads(x) for x in path.read_text().splitlines()] == [
        {"split": "val", "n": 2},
        {"split": "train", "n": 3},
    ]


def test_state_round_trip_is_exact(tmp_path: Path) -> None:
    state = {
        "step": 3,
        "a": {"x": np.array([0.1, 1 / 3]), "names": ["ü", "b"], "deep": {"n": np.arange(3)}},
        "none": None,
        "f": 0.1 + 0.2,
    }
    write_state(tmp_path, state)
    back = read_state(tmp_path)
    assert back["step"] == 3 and back["none"] is None and back["f"] == 0.1 + 0.2
    assert back["a"]["names"] == ["ü", "b"]
    assert np.array_equal(back["a"]["x"], state["a"]["x"]) and back["a"]["x"].dtype == np.float64
    assert np.array_equal(back["a"]["deep"]["n"], np.arange(3))


def test_help_needs_no_heavy_library() -> None:
    code = (
        "import sys; from mssr.tools.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = set('torch transformers ray vllm numpy datasets omegaconf'.split()) & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "train" in done.stdout and "prepare" in done.stdout


def test_duplicate_draws_are_independent() -> None:
    """n responses of a prompt in one step, and one prompt in two steps, never share a seed."""
    counts = Counter(request_seed(0, step, "p", k) for step in range(50) for k in range(8))
    assert max(counts.values()) == 1
