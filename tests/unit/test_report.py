"""The report: curves that show without a script, samples with their images, and what happened to the run."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mssr.runs import samples
from mssr.runs.charts import MOST_POINTS, Series, chart, short, ticks
from mssr.runs.plot import EVENTS_SHOWN, episodes, write_report
from mssr.runs.run_directory import MACHINE, RECIPE

pytestmark = pytest.mark.unit


def report(run_dir: Path, records: list[dict[str, Any]]) -> str:
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    write_report(run_dir)
    return (run_dir / "report.html").read_text()


def series(flag: str, steps: set[int]) -> list[dict[str, Any]]:
    before: dict[str, Any] = {"step": 0, "val/accuracy": 0.2}
    return [before] + [
        {"step": k, "reward/accuracy": 0.5, "policy/entropy": 0.3, flag: float(k in steps)}
        for k in range(1, 13)
    ]


def test_steps_of_a_collapse_are_named_and_shaded(tmp_path: Path) -> None:
    records = series("watch/entropy_collapsed", {3, 4, 5, 9})
    assert episodes(records, "watch/entropy_collapsed") == [(3, 5), (9, 9)]
    page = report(tmp_path / "collapsed/run", records)
    assert "entropy collapsed, noticed in steps 3 to 5, 9." in page
    shaded = [figure for figure in page.split("<figure") if '<rect class="shade"' in figure]
    assert len(shaded) == 1 and '<figcaption title="">entropy, nats per token<' in shaded[0]
    assert shaded[0].count("<rect") == 2  # two episodes
    healthy = report(tmp_path / "healthy/run", series("watch/entropy_collapsed", set()))
    assert "Collapse watch" not in healthy and "<rect" not in healthy


def test_events_are_listed(tmp_path: Path) -> None:
    events = [
        {"time": 1.7e9, "step": 7, "event": "restart", "detail": "rollout worker <2> died"},
        {"time": "2026-01-01T00:00:00", "step": 8, "event": "collapse", "detail": {"flag": "entropy"}},
    ]
    text = "".join(json.dumps(e) + "\n" for e in events) + '{"time": 3, "st'  # cut off by a crash
    (tmp_path / "events.jsonl").write_text(text)
    page = report(tmp_path, series("watch/entropy_collapsed", set()))
    assert "<td>2023-11-14 22:13:20 UTC</td><td>7</td><td>restart</td>" in page
    assert "rollout worker &lt;2&gt; died" in page and "<2>" not in page
    assert "2026-01-01T00:00:00" in page and "{&#34;flag&#34;: &#34;entropy&#34;}" in page
    many = [{"time": 0, "step": k, "event": f"event-{k}."} for k in range(EVENTS_SHOWN + 5)]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in many))
    page = report(tmp_path, series("watch/entropy_collapsed", set()))
    assert "event-4." not in page and "event-5." in page and "5 earlier ones" in page


def test_curves_are_there_without_a_script(tmp_path: Path) -> None:
    records = series("watch/entropy_collapsed", set())
    records[4]["policy/entropy"] = None  # NaN: a gap
    page = report(tmp_path, records)
    [entropy] = [f for f in page.split("<figure") if ">entropy, nats per token<" in f]
    [path] = re.findall(r'<path class="line s0" d="([^"]+)"', entropy)
    assert path.count("M") == 2 and path.count("L") == 9  # 3 and 8 points
    assert 'aria-label="entropy, nats per token: policy from 0.3 to 0.3"' in entropy
    # Every metric, with its meaning.
    assert ">policy/entropy, nats per token<" in page and "the policy explores no more" in page
    assert ">watch/entropy_collapsed, 0 or 1<" in page and "below <code>watch.entropy_floor</code>" in page


def test_a_curve_by_value() -> None:
    figure = chart("a<b", [Series("x", [0, 10], [0.0, 1.0])], bounds=(0, 1), about='say "so"')
    assert 'd="M56.0 178.0L392.0 8.0"' in figure
    assert "a&lt;b" in figure and "a<b" not in figure and "say &quot;so&quot;" in figure
    assert chart("t", [Series("</script><script>", [0], [1.0])] * 2).count("<script") == 1
    assert ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1]) and ticks(7, 93) == [20, 40, 60, 80]
    assert [short(v) for v in (1500, 2e6, 0.00012, 0)] == ["1.5k", "2M", "0.00012", "0"]
    for values in ([], [None], [3.0], [0.0]):  # nothing to divide by
        assert "NaN" not in chart("t", [Series("x", range(len(values)), values)])
    stacked = chart("t", [Series("x", [0, 1], [1, 1], [0, 0], [1, 1])])
    [area] = re.findall(r'class="area s0" d="([^"]+)"', stacked)
    assert area.count(" ") == 4 and area.endswith("Z")


def test_a_long_curve_shows_means_of_equal_stretches() -> None:
    steps = 10 * MOST_POINTS
    figure = chart("t", [Series("x", range(steps), [float(k % 10) for k in range(steps)])])
    data = json.loads(re.findall(r"<script[^>]*>(.*)</script>", figure)[0])
    [one] = data["series"]
    assert len(one["x"]) == MOST_POINTS and set(one["y"]) == {4.5} and one["x"][:2] == [4.5, 14.5]


def test_config_and_machine(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("actor: {lr: 0.5, api_key: abc}\ntrainer: {steps: 40}\n")
    changed = {"actor.lr": [1e-06, 0.5]}
    (tmp_path / RECIPE).write_text(json.dumps({"file": "mssr.yaml", "changed": changed}))
    machine = {"host": "h", "cores": 8, "memory_bytes": 2**36, "gpus": [], "driver": "", "cuda": "13.0"}
    (tmp_path / MACHINE).write_text(json.dumps(machine | {"versions": {"torch": "2.9"}}))
    page = report(tmp_path, series("watch/entropy_collapsed", set()))
    assert "step 12 of 40" in page and "h: 8 cores, 64 GiB" in page and "torch 2.9" in page
    row = "<td><code>actor.lr</code></td><td><code>1e-06</code></td><td><code>0.5</code></td>"
    assert row in page and "What differs from <code>mssr.yaml</code>" in page and "abc" not in page


def test_a_damaged_neighbour_costs_its_part_only(tmp_path: Path) -> None:
    for name in ("config.yaml", RECIPE, MACHINE):
        (tmp_path / name).write_text("[")
    page = report(tmp_path, series("watch/entropy_collapsed", set()))
    assert "step 12 of ?" in page and "Not recorded." in page


# Samples


def sample(prompt: str, score: float | None, **more: Any) -> dict[str, Any]:
    return {
        "split": "val", "id": prompt, "question": f"what is {prompt}?", "response": f"it is <b>{score}</b>",
        "answer": "8", "score": score, "finish_reason": "stop", "response_tokens": 5,
    } | more  # fmt: skip


def write(run_dir: Path, step: int, records: list[dict[str, Any]]) -> None:
    path = samples.samples_file(run_dir, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in records))


def test_a_prompt_has_its_images_and_its_visits(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8), "red").save(tmp_path / "images/a.jpg")
    shown = {"chosen": "followed", "images": ["images/a.jpg", "images/gone.jpg"]}
    for step, score in ((0, 0.0), (10, 0.0), (20, 1.0)):
        more = {"baseline": 0.25 * step / 10, "advantage": -1.5}
        write(tmp_path, step, [sample("p", score, **shown, **more), sample("prompt-17", 1.0)])
    [prompt], left_out = samples.recorded_prompts(tmp_path)
    assert (prompt["id"], len(prompt["images"]), left_out) == ("p", 1, 0)
    assert [(v["step"], v["verdict"], v["changed"]) for v in prompt["visits"]] == [
        (0, "wrong", False), (10, "wrong", False), (20, "right", True),
    ]  # fmt: skip
    page = report(tmp_path, series("watch/entropy_collapsed", set()))
    assert page.count("data:image/jpeg;base64,") == 1
    assert "baseline 0.500, advantage -1.500" in page and "prompt-17" not in page
    # What a model says is text, and no script but the page's own is run.
    assert "it is &lt;b&gt;1.0&lt;/b&gt;" in page and "<b>1.0</b>" not in page
    script = page.rpartition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page
    assert not re.search(r'(src|href)="(?!data:|#)', page)


def test_responses_of_one_step_say_nothing_of_a_change(tmp_path: Path) -> None:
    for step, scores in ((1, [0.0, 1.0, 0.0]), (2, [1.0, 0.0]), (3, [0.0, 0.0]), (4, [1.0])):
        write(tmp_path, step, [sample("p", s, response=str(k), chosen="best") for k, s in enumerate(scores)])
    [prompt], _ = samples.recorded_prompts(tmp_path)
    assert [(v["step"], v["response"]) for v in prompt["visits"]][:3] == [(1, "0"), (1, "1"), (1, "2")]
    assert [v["step"] for v in prompt["visits"] if v["changed"]] == [4]


def test_older_samples_are_left_out_of_a_page_that_grows_too_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "MOST_BYTES", 20_000)
    for step in range(10):
        write(
            tmp_path,
            step,
            [sample(f"p{step}", 1.0, response="<字"[step % 2 == 0] * 9000, chosen="best", images=[])],
        )
        write(tmp_path / "short", step, [sample(f"p{step}", 1.0, chosen="best", images=[])])
    prompts, left_out = samples.recorded_prompts(tmp_path)
    assert [p["id"] for p in prompts] == ["p9"] and left_out == 9  # 12,000 and 9,000 bytes in the page
    monkeypatch.setattr(samples, "MOST_BYTES", samples.ROW_BYTES * 3)  # what is around a text counts, too
    assert len(samples.recorded_prompts(tmp_path / "short")[0]) == 2
    monkeypatch.setattr(samples, "MOST_BYTES", 20_000)
    page = report(tmp_path, series("watch/entropy_collapsed", set()))
    assert "9 older samples" in page and "[... 6000 characters left out ...]" in page


def test_the_extremes_of_a_step_and_followed_prompts_are_recorded() -> None:
    ids = [f"p{k}" for k in range(100)]
    scores = np.array([k % 2 for k in range(100)], np.float32)
    advantages = np.arange(100, dtype=np.float32)
    chosen = samples.choose_train(ids, scores, advantages)
    assert list(chosen) == sorted(chosen) and len(chosen) == samples.TRAIN
    by_reason = {why: [i for i, w in chosen.items() if w == why] for why in ("best", "worst", "followed")}
    assert by_reason["best"] == [93, 95, 97, 99] and by_reason["worst"] == [0, 2, 4, 6]
    # The same prompts at the next visit, in another order and beside others.
    followed = {ids[i] for i in by_reason["followed"]}
    again = samples.choose_train(ids[::-1], scores, advantages)
    assert len(followed & {ids[::-1][i] for i in again}) == len(followed)
    assert samples.choose_train(ids[:3], scores[:3], advantages[:3]) == {0: "worst", 1: "best", 2: "followed"}


def test_validation_prompts_whose_verdict_changed_are_recorded(tmp_path: Path) -> None:
    ids = [f"p{k}" for k in range(200)]
    before = dict.fromkeys(ids, 0.0) | {"p0": None}
    scores = np.zeros(200, np.float32)
    none = samples.choose_validation(ids, scores, before)
    assert list(none.values()) == ["followed"] * samples.FOLLOWED
    others = [i for i in range(1, 200) if i not in none]
    scores[others[:20]], scores[others[20]], scores[0] = 1.0, np.nan, 1.0
    before[ids[others[30]]] = 1.0
    changed = {i for i, why in samples.choose_validation(ids, scores, before).items() if why == "changed"}
    assert len(changed) == samples.CHANGED + 1 and others[30] in changed
    assert changed - {others[30]} <= set(others[:20])
    # Of several responses to a prompt the first.
    assert samples.choose_validation(["a", "a"], np.array([0.0, 1.0]), {"a": 0.0}) == {0: "followed"}
    others = [sample("b", None), sample("c", 1.0, split="train")]
    write(tmp_path, 5, [sample("a", 1.0), sample("a", 0.0), *others])
    write(tmp_path, 9, [sample("a", 0.0)])
    assert samples.earlier_scores(tmp_path, "val", 9) == {"a": 1.0, "b": None}
    assert samples.earlier_scores(tmp_path, "val", 5) == {}
