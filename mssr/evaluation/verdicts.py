"""The verdicts of an evaluation, as its responses come, and what is written of them."""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from mssr.config import Config
from mssr.config.data import JUDGE
from mssr.evaluation import results
from mssr.evaluation.base import Benchmark, Counts
from mssr.evaluation.items import STATUSES, Item, Status, Verdict
from mssr.evaluation.own import Own
from mssr.evaluation.prompts import Question
from mssr.evaluation.responses import Key, Response
from mssr.evaluation.statistics import count_right
from mssr.rewards import RowAccess, Scorer
from mssr.rewards.judge import Judge, JudgeInput
from mssr.rewards.rows import NO_ROWS

FLAWS = {
    "not_asked": "could not be asked and count as wrong; items.jsonl notes why (of longer prompts: "
    "data.max_prompt_length)",
    "damaged_images": "were asked without a damaged image; items.jsonl notes which",
}
"""`Question.flaw` -> what the user hears of so many items."""


class VerdictBook:
    """Every response with its verdict; an item that was not asked counts as one without an answer.

    Args:
        reward: score own data with the config's reward, in processes that a hanging function cannot stop.
        prefix: what the rules see before a response, see `PromptEncoder.response_prefix`.
        tell: called with one sentence when those processes or their function fail.
        directory: where the verdicts of a judge are kept, if the reward has one.
    """

    def __init__(
        self,
        config: Config,
        questions: Sequence[Question],
        reward: bool,
        prefix: str = "",
        tell: Callable[[str], None] | None = None,
        directory: Path | None = None,
    ) -> None:
        self._prefix = prefix
        self._reward_prefix = prefix if config.reward.rule else ""
        self.questions = list(questions)
        self._answers: dict[Key, tuple[Response, Verdict]] = {}
        self._by_key = {(q.benchmark.name, q.item.id): q for q in questions}
        self._scorer: Scorer | None = None
        if reward:
            own = [b for b, _ in self.by_benchmark() if isinstance(b, Own) and b.rewarded]
            asks_for_rows = own and (config.reward.takes_cells or JUDGE in config.reward.names)
            rows = RowAccess.of([b.rows() for b in own], config.model) if asks_for_rows else NO_ROWS
            length = config.rollout.max_response_length
            self._scorer = Scorer(
                config.reward, length, rows=rows, on_restart=tell, on_failure=tell, directory=directory
            )

    def __enter__(self) -> VerdictBook:
        return self

    def __exit__(self, *_: object) -> None:
        if self._scorer is not None:
            self._scorer.close()

    def add(self, responses: Sequence[Response]) -> None:
        """Score responses by the rules, those to rewarded data by the reward."""
        rewarded: list[tuple[Response, Item, Own]] = []
        for r in responses:
            question = self._by_key[r.benchmark, r.id]
            item, benchmark = question.item, question.benchmark
            if isinstance(benchmark, Own) and benchmark.rewarded:
                rewarded.append((r, item, benchmark))
            else:
                self._answers[r.key] = r, benchmark.verdict(item, self._prefix + r.text, r.truncated)
        if not rewarded:
            return
        assert self._scorer is not None
        scored = self._scorer.score(
            [own.reward_input(item, r.text, r.tokens, self._reward_prefix) for r, item, own in rewarded]
        )
        for (r, _, own), accuracy in zip(rewarded, scored.accuracies, strict=True):
            verdict = own.rewarded_verdict(self._prefix + r.text, float(accuracy), r.truncated)
            self._answers[r.key] = r, verdict

    def counts(self) -> dict[str, tuple[int, int]]:
        """Benchmark -> (right, all) of the responses so far."""
        return count_right((r.benchmark, verdict.correct) for r, verdict in self._answers.values())

    def of(self, question: Question, sample: int) -> tuple[Response, Verdict]:
        """The response to a question and its verdict, whether it was asked or not."""
        if question.asked:
            return self._answers[question.key(sample)]
        unasked = Response(*question.key(sample), "", 0, "not_asked")
        return unasked, Verdict(False, None, "extraction_failed", question.benchmark.rule(question.item))

    def by_benchmark(self) -> Iterator[tuple[Benchmark, list[Question]]]:
        """Benchmarks in the order asked for, with their questions."""
        for benchmark, questions in groupby(self.questions, lambda q: q.benchmark):
            yield benchmark, list(questions)

    def judge(self, judge: Judge, n: int) -> str | None:
        """Let a judge decide what the rules leave open; returns its last problem, if verdicts failed."""
        asked = [(q, *self.of(q, k)) for q in self.questions if q.asked for k in range(n)]
        answers = [(q.benchmark, q.item, self._prefix + r.text, verdict) for q, r, verdict in asked]
        judged = apply(judge, answers)
        self._answers |= {r.key: (r, verdict) for (_, r, _), verdict in zip(asked, judged, strict=True)}
        failed = sum(verdict.status == "judge_failed" for verdict in judged)
        return f"{failed} verdicts failed, the last because {judge.problem}" if failed else None

    def write(self, out: Path, n: int, meta: Mapping[str, Any], timing: Mapping[str, Any]) -> None:
        """Write everything that `mssr.evaluation.results.write` does.

        Breakdowns and metrics are those of every sample apart, since pairs and figures are made of answers
        of the same one; then the counts are added and the metrics averaged.

        Args:
            n: responses of an item.
        """
        records = []
        breakdowns: dict[str, Counts] = {}
        metrics: dict[str, dict[str, float]] = {}
        for benchmark, questions in self.by_benchmark():
            items = [q.item for q in questions]
            counts = breakdowns[benchmark.name] = {}
            shares = metrics[benchmark.name] = defaultdict(float)
            for k in range(n):
                answers = [self.of(q, k) for q in questions]
                for q, (r, verdict) in zip(questions, answers, strict=True):
                    row = results.record(q.item, r, verdict)
                    records.append(row if q.note is None else row | {"note": q.note})
                verdicts = [verdict for _, verdict in answers]
                _add(counts, benchmark.breakdown(items, verdicts))
                for name, value in benchmark.metrics(items, verdicts).items():
                    if name not in ("accuracy", *STATUSES):  # which are counted anyway
                        shares[name] += value / n
        results.write(
            out,
            records,
            {**meta, **self.flawed()},
            breakdowns=breakdowns,
            metrics=metrics,
            image_of=self._image_of,
            timing=timing,
        )

    def _image_of(self, benchmark: str, item: str) -> list[bytes]:
        found = []
        for image in self._by_key[benchmark, item].item.images:
            with contextlib.suppress(OSError, ValueError):  # noted in its record
                found.append(image.read())
        return found

    def flawed(self) -> dict[str, dict[str, int]]:
        """Flaw -> benchmark -> number of its items with it."""
        flaws = {b.name: Counter(q.flaw for q in questions) for b, questions in self.by_benchmark()}
        return {flaw: {name: counts[flaw] for name, counts in flaws.items()} for flaw in FLAWS}

    def notes(self) -> list[str]:
        """A line for every benchmark of which something could not be asked as it is."""
        sizes = Counter(q.benchmark.name for q in self.questions)
        return [
            f"{name}: {count} of {sizes[name]} items {FLAWS[flaw]}"
            for flaw, counts in self.flawed().items()
            for name, count in counts.items()
            if count
        ]


def apply(judge: Judge, answers: Sequence[tuple[Benchmark, Item, str, Verdict]]) -> list[Verdict]:
    """The verdicts with the judge's in place of those that the rules leave open; as many, in the same order.

    "correct" makes one right, "incorrect" leaves its status; without a verdict it is ``judge_failed``.

    Args:
        answers: items of benchmarks, responses to them, and what the rules say of those.
    """
    result = [verdict for *_, verdict in answers]
    asked: dict[int, JudgeInput] = {}
    for k, (benchmark, item, response, verdict) in enumerate(answers):
        if benchmark.undecided(item, verdict):
            asked[k] = JudgeInput(*benchmark.judged(item), response)
    for k, correct in zip(asked, judge.verdicts(list(asked.values())), strict=True):
        status: Status = "judge_failed" if correct is None else "right" if correct else result[k].status
        result[k] = Verdict(bool(correct), result[k].extracted, status, "judge")
    return result


def _add(total: Counts, counts: Counts) -> None:
    for name, groups in counts.items():
        part = total.setdefault(name, {})
        for group, (right, count) in groups.items():
            before = part.get(group, (0, 0))
            part[group] = (before[0] + right, before[1] + count)
