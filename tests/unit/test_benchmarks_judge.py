"""A judge that answers, refuses, talks nonsense or is silent: the denominator stays the same with all."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mssr.errors import UserError
from mssr.evaluation import registry
from mssr.evaluation.items import Item, Verdict
from mssr.evaluation.verdicts import apply
from mssr.rewards import judge as judging
from mssr.rewards.judge import HttpJudge, Judge, JudgeInput, VerdictCache
from tests.unit.benchmark_data import CASES, T, write_parquet
from tests.unit.judge_server import Server, serving

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("no_keys")]


def http(url: str, **options: Any) -> HttpJudge:
    return HttpJudge("m", url, **({"time_limit_s": 5.0, "pause_s": 0.01, "concurrency": 4} | options))


# The denominator ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def by_rules(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[list[Item], list[str], list[Verdict]]:
    root = tmp_path_factory.mktemp("judged")
    write_parquet("mathverse", root / "mathverse.parquet")
    benchmark = registry.get("mathverse")
    items = benchmark.load(root)
    responses = [case.response for case in CASES["mathverse"]]
    return items, responses, [benchmark.verdict(i, r) for i, r in zip(items, responses, strict=True)]


def applied(judge: Judge, by_rules: tuple[list[Item], list[str], list[Verdict]]) -> list[Verdict]:
    benchmark = registry.get("mathverse")
    return apply(judge, [(benchmark, *answer) for answer in zip(*by_rules, strict=True)])


OPEN = [3, 7, 11]
"""Rows of MathVerse that the rules leave open: no answer, 12 for 4 pi, (4, 3) for (3, 4); not a letter."""


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("I like both answers.", {}),
        ("correct or incorrect, who knows", {}),
        ("", {}),
        ("401", {}),
        ("403", {}),
        ("404", {}),
        ("500", {}),
        ("429", {}),
        ("302", {}),
        ("silent", {"time_limit_s": 0.2, "attempts": 2}),
        ("drip", {"time_limit_s": 0.3, "attempts": 1}),
        ("closed", {}),
        ("html", {}),
        ("empty", {}),
        ("null", {}),
    ],
)
def test_a_judge_that_fails_leaves_the_denominator(
    mode: str,
    options: dict[str, Any],
    server: tuple[Server, str],
    by_rules: tuple[list[Item], list[str], list[Verdict]],
) -> None:
    state, url = server
    state.mode = mode
    judge = http(url, **options)
    before, after = by_rules[2], applied(judge, by_rules)
    assert len(after) == len(before) == 13
    assert [k for k, v in enumerate(after) if v.status == "judge_failed"] == OPEN
    assert [v for k, v in enumerate(after) if k not in OPEN] == [
        v for k, v in enumerate(before) if k not in OPEN
    ]
    metrics = registry.get("mathverse").metrics(by_rules[0], after)
    assert (metrics["accuracy"], metrics["judge_failed"]) == (9 / 13, 3 / 13)
    assert judge.problem and "\n" not in judge.problem
    assert len(judge.cache) == 0  # a failure is asked again next time


def test_no_server_at_all_is_a_failure_too(by_rules: tuple[list[Item], list[str], list[Verdict]]) -> None:
    with serving() as (_, url):
        pass
    after = applied(http(url, attempts=2), by_rules)
    assert Counter(v.status for v in after) == {"right": 9, "judge_failed": 3, "wrong": 1}


def test_a_verdict_decides(
    server: tuple[Server, str], by_rules: tuple[list[Item], list[str], list[Verdict]]
) -> None:
    state, url = server
    state.mode = "They are the same. Verdict: correct"
    after = applied(http(url), by_rules)
    assert [(v.status, v.rule) for k, v in enumerate(after) if k in OPEN] == [("right", "judge")] * 3
    state.mode = "Verdict: **incorrect**"
    after = applied(http(url), by_rules)
    assert [(v.status, v.rule) for k, v in enumerate(after) if k in OPEN] == [
        ("extraction_failed", "judge"),
        ("wrong", "judge"),
        ("wrong", "judge"),
    ]
    assert after[7].extracted == "12"


def test_the_judge_sees_the_question_without_its_picture(
    server: tuple[Server, str], by_rules: tuple[list[Item], list[str], list[Verdict]]
) -> None:
    state, url = server
    applied(http(url), by_rules)
    assert len(state.requests) == len(OPEN)
    request = next(r for r in state.requests if r"4\pi" in r["messages"][0]["content"])
    assert (request["path"], request["model"], request["temperature"]) == ("/v1/chat/completions", "m", 0)
    prompt = request["messages"][0]["content"]
    assert "As shown, the angle 8 is unknown" in prompt and r"\boxed{12}" in prompt
    assert "I look at the picture" not in prompt  # the thinking


# Requests -------------------------------------------------------------------------------------------

ONE = [JudgeInput("q", "a", "r")]


def test_what_may_pass_is_tried_again_and_no_more(server: tuple[Server, str]) -> None:
    state, url = server
    state.fail_first = 2
    assert http(url, attempts=3).verdicts(ONE) == [True]
    assert len(state.requests) == 3
    state.fail_first = 9
    assert http(url, attempts=3).verdicts(ONE) == [None]
    assert len(state.requests) == 6


@pytest.mark.parametrize(("mode", "requests"), [("401", 1), ("400", 8), ("html", 8)])
def test_a_refusal_is_not_tried_again(mode: str, requests: int, server: tuple[Server, str]) -> None:
    state, url = server
    state.mode = mode
    judge = http(url, concurrency=1)
    assert judge.verdicts([JudgeInput("q", "a", str(k)) for k in range(8)]) == [None] * 8
    assert len(state.requests) == requests
    state.mode = "correct"
    assert judge.verdicts(ONE) == [True]  # a later call starts anew


def test_the_time_limit_holds(server: tuple[Server, str]) -> None:
    """Without it these requests would never end."""
    state, url = server
    for mode in ("silent", "drip"):
        state.mode = mode
        assert http(url, time_limit_s=0.3, attempts=1).verdicts(ONE) == [None]
        assert not state.release.is_set()


def test_the_key_comes_from_the_environment_and_goes_nowhere_else(
    server: tuple[Server, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    state, url = server
    http(url).verdicts(ONE)
    monkeypatch.setenv("OPENAI_API_KEY", "general-1")
    http(url).verdicts(ONE)
    monkeypatch.setenv("MSSR_JUDGE_API_KEY", "special-2")
    cache = tmp_path / "cache.jsonl"
    http(url, cache=cache).verdicts(ONE)
    assert [h.get("Authorization") for h in state.headers] == [None, "Bearer general-1", "Bearer special-2"]
    assert "special-2" not in cache.read_text() + json.dumps(state.requests)
    state.mode = "401"
    judge = http(url)
    judge.verdicts(ONE)
    assert judge.problem == f"{url} answers with status 401"
    state.mode, before = "302", len(state.requests)
    assert http(url).verdicts(ONE) == [None]
    assert len(state.requests) == before + 1  # the redirect was not followed


def test_specs_name_a_model_and_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    judge = judging.from_spec("Qwen/Qwen2.5-7B-Instruct@http://localhost:8000/v1/")
    assert (judge.model, judge.url) == ("Qwen/Qwen2.5-7B-Instruct", "http://localhost:8000/v1")
    with pytest.raises(UserError, match="needs a key in MSSR_JUDGE_API_KEY or OPENAI_API_KEY"):
        judging.from_spec("gpt-4o-mini")
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    assert judging.from_spec("gpt-4o-mini").url == judging.OPENAI_URL
    for bad in ("", "@http://localhost/v1", "http://localhost/v1"):
        with pytest.raises(UserError, match="is not of the form MODEL"):
            judging.from_spec(bad)
    with pytest.raises(UserError, match="does not begin with http"):
        HttpJudge("m", "localhost:8000")


# Replies and the cache ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("Verdict: correct", True),
        ("Verdict: incorrect", False),
        ("verdict: **Correct**.", True),
        ("**Verdict:** incorrect", False),
        ("Both say 12.\n\nVerdict: correct\n", True),
        ("Verdict: correct\nNo, wait.\nVerdict: incorrect", False),
        ("<think>Verdict: incorrect?</think>Verdict: correct", True),
        ("Correct.", True),
        ("INCORRECT", False),
        ("The answer is correct", None),
        ("It is not correct.", None),
        ("correct incorrect", None),
        ("Verdict: unsure", None),
        ("Verdict: correctly answered?", None),
        ("<think>Verdict: correct", None),
        ("", None),
        ("yes", None),
    ],
)
def test_a_reply_is_a_verdict_or_none(reply: str, verdict: bool | None) -> None:
    assert judging.parse_reply(reply) is verdict


def test_verdicts_are_kept_and_failures_are_not(tmp_path: Path) -> None:
    asked: list[str] = []
    replies = {"1": "Verdict: correct", "2": "Verdict: incorrect", "3": "hm"}

    def ask(prompts: list[str]) -> list[str | None]:
        asked.extend(prompts)
        return [next(v for k, v in replies.items() if f"response:\nr{k}" in p) for p in prompts]

    inputs = [JudgeInput("q", "a", f"r{k}") for k in "1231"]
    cache = tmp_path / "sub/cache.jsonl"
    judge = Judge("m", ask, cache)
    assert judge.verdicts(inputs) == [True, False, None, True]
    assert len(asked) == 3  # equal ones once
    assert judge.problem == "the reply 'hm' is no verdict"
    asked.clear()
    assert Judge("m", ask, cache).verdicts(inputs) == [True, False, None, True]
    assert len(asked) == 1
    asked.clear()
    assert Judge("other", ask, cache).verdicts(inputs) == [True, False, None, True]
    assert len(asked) == 3  # another model's verdicts are its own


def test_a_change_of_anything_is_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [
        JudgeInput("q", "a", "r").key("m"),
        JudgeInput("q", "a", "r").key("n"),
        JudgeInput("p", "a", "r").key("m"),
        JudgeInput("q", "b", "r").key("m"),
        JudgeInput("q", "a", "s").key("m"),
        JudgeInput("qa", "", "r").key("m"),
    ]
    monkeypatch.setattr(judging, "PROMPT_VERSION", "0")
    keys.append(JudgeInput("q", "a", "r").key("m"))
    assert len(set(keys)) == 7


def test_a_cache_that_a_crash_cut_off_is_read_and_continued(tmp_path: Path) -> None:
    path = tmp_path / "cache.jsonl"
    first = VerdictCache(path)
    first.put("a", True, "m")
    first.put("b", False, "m")
    path.write_text(path.read_text()[:-9])
    second = VerdictCache(path)
    assert (second.get("a"), second.get("b"), len(second)) == (True, None, 1)
    second.put("b", False, "m")
    path.write_text(path.read_text() + 'null\n{"key": "c", "correct": "yes"}\n[]\n')
    third = VerdictCache(path)
    assert (third.get("a"), third.get("b"), third.get("c")) == (True, False, None)


def test_a_cache_that_cannot_be_written_costs_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    judge = Judge("m", lambda prompts: ["correct"] * len(prompts), tmp_path / "file/cache.jsonl")
    assert judge.verdicts(ONE) == [True]


@pytest.mark.parametrize("fault", ["raises", "few", "numbers"])
def test_a_callable_that_fails_gives_no_verdicts(
    fault: str, by_rules: tuple[list[Item], list[str], list[Verdict]]
) -> None:
    def ask(prompts: list[str]) -> Any:
        if fault == "raises":
            raise RuntimeError("the engine is dead\nlong trace")
        return ["correct"] if fault == "few" else [1] * len(prompts)

    after = applied(Judge("m", ask), by_rules)
    assert [k for k, v in enumerate(after) if v.status == "judge_failed"] == OPEN


# What is left to a judge ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "answer", "kind", "response", "undecided"),
    [
        ("mmk12", "B", "choice", r"\boxed{C}", False),
        ("mmk12", "B", "choice", r"\boxed{the second one}", True),
        ("mmk12", "B", "choice", "No\nidea", True),
        ("mathverse", "5", "math", r"\boxed{6}", False),
        ("mathverse", "5", "math", r"\boxed{five}", True),
        ("mathverse", r"5\pi", "math", r"\boxed{15.7}", True),
        ("mathverse", "5", "math", r"\boxed{5}", False),
        ("hallusionbench", "no", "yes_no", r"\boxed{Yes}", False),
        ("hallusionbench", "no", "yes_no", r"\boxed{They differ}", True),
        ("mathvista", "5", "number", r"\boxed{6}", False),
        ("mathvista", "5", "number", r"\boxed{five}", False),
        ("mathvista", "5", "number", "No\nidea", True),
        ("mathvista", "up", "text", r"\boxed{upwards}", True),
    ],
)
def test_a_judge_is_only_asked_where_the_rules_do_not_decide(
    name: str, answer: str, kind: Any, response: str, undecided: bool
) -> None:
    benchmark = registry.get(name)
    metadata = {"precision": None, "category": "VD", "figure_id": "0"}
    item = Item(name, "1", "q", (), answer, kind=kind, metadata=metadata)
    assert benchmark.undecided(item, benchmark.verdict(item, T + response)) == undecided
    cut = benchmark.verdict(item, "<think>so far", truncated=True)
    assert cut.status == "truncated" and not benchmark.undecided(item, cut)
