"""The verdicts of an evaluation, as its responses come."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from mssr.config import Config
from mssr.evaluation import judge as judges
from mssr.evaluation.base import Benchmark
from mssr.evaluation.benchmarks.own import Own
from mssr.evaluation.items import Item, Verdict
from mssr.evaluation.prompts import Question
from mssr.evaluation.responses import Key, Response
from mssr.rewards import RowAccess, Scorer
from mssr.rewards.rows import NO_ROWS


class VerdictBook:
    """Every response with its verdict; an item that was not asked counts as one without an answer.

    Args:
        reward: score own data with the config's reward, in processes that a hanging function cannot stop.
        prefix: what the rules see before a response, see `PromptEncoder.response_prefix`.
        tell: called with one sentence when those processes or their function fail.
    """

    def __init__(
        self,
        config: Config,
        questions: Sequence[Question],
        reward: bool,
        prefix: str = "",
        tell: Callable[[str], None] | None = None,
    ) -> None:
        self._prefix = prefix
        self._reward_prefix = prefix if config.reward.rule else ""
        self.questions = list(questions)
        self.responses: dict[Key, Response] = {}
        self.verdicts: dict[Key, Verdict] = {}
        self._by_key = {(q.benchmark.name, q.item.id): q for q in questions}
        self._scorer = self._make_scorer(config, tell) if reward else None

    def _make_scorer(self, config: Config, tell: Callable[[str], None] | None) -> Scorer:
        own = [b for b, _ in self.by_benchmark() if isinstance(b, Own) and b.rewarded]
        rows = (
            RowAccess.of([b.rows() for b in own], config.model) if own and not config.reward.rule else NO_ROWS
        )
        length = config.rollout.max_response_length
        return Scorer(config.reward, length, rows=rows, on_restart=tell, on_failure=tell)

    def __enter__(self) -> VerdictBook:
        return self

    def __exit__(self, *_: object) -> None:
        if self._scorer is not None:
            self._scorer.close()

    def add(self, responses: Sequence[Response]) -> None:
        """Score responses by the rules."""
        rewarded: list[tuple[Response, Item, Own]] = []
        for response in responses:
            self.responses[response.key] = response
            question = self._by_key[response.benchmark, response.id]
            truncated = response.finish_reason == "length"
            if isinstance(question.benchmark, Own) and question.benchmark.rewarded:
                rewarded.append((response, question.item, question.benchmark))
            else:
                self.verdicts[response.key] = question.benchmark.verdict(
                    question.item, self._prefix + response.text, truncated, response.tokens
                )
        if rewarded:
            self._add_rewarded(rewarded)

    def _add_rewarded(self, rewarded: Sequence[tuple[Response, Item, Own]]) -> None:
        assert self._scorer is not None
        inputs = [own.reward_input(item, self._reward_prefix + r.text, r.tokens) for r, item, own in rewarded]
        scored = self._scorer.score(inputs)
        for (response, _, own), accuracy in zip(
            rewarded, scored.parts.get("accuracy", scored.scores), strict=True
        ):
            truncated = response.finish_reason == "length"
            self.verdicts[response.key] = own.scored(self._prefix + response.text, float(accuracy), truncated)

    def accuracies(self) -> tuple[dict[str, float], float | None]:
        """By benchmark and of all, of the responses so far."""
        right: Counter[str] = Counter()
        count: Counter[str] = Counter()
        for (name, _, _), verdict in self.verdicts.items():
            count[name] += 1
            right[name] += verdict.correct
        if not count:
            return {}, None
        return {name: right[name] / count[name] for name in count}, right.total() / count.total()

    def of(self, question: Question, sample: int) -> tuple[Response, Verdict]:
        """The response to a question and its verdict, whether it was asked or not."""
        key = (question.benchmark.name, question.item.id, sample)
        if question.asked:
            return self.responses[key], self.verdicts[key]
        rule = question.benchmark.rule(question.item)
        return Response(*key, "", 0, "not_asked"), Verdict(False, None, "extraction_failed", rule)

    def by_benchmark(self) -> Iterator[tuple[Benchmark, list[Question]]]:
        """Benchmarks in the order asked for, with their questions."""
        groups: dict[str, list[Question]] = {}
        for question in self.questions:
            groups.setdefault(question.benchmark.name, []).append(question)
        for group in groups.values():
            yield group[0].benchmark, group

    def judge(self, judge: judges.Judge, n: int) -> str | None:
        """Let a judge decide what the rules leave open; returns its last problem, if verdicts failed."""
        failed = 0
        for benchmark, questions in self.by_benchmark():
            asked = [(q, k) for q in questions if q.asked for k in range(n)]
            if not asked:
                continue
            pairs = [self.of(q, k) for q, k in asked]
            judged = judges.apply(
                judge,
                benchmark,
                [q.item for q, _ in asked],
                [self._prefix + response.text for response, _ in pairs],
                [verdict for _, verdict in pairs],
            )
            for (response, _), verdict in zip(pairs, judged, strict=True):
                self.verdicts[response.key] = verdict
                failed += verdict.status == "judge_failed"
        return f"{failed} verdicts failed, the last because {judge.problem}" if failed else None

    def notes(self) -> list[str]:
        """A line for every benchmark of which something could not be asked as it is."""
        lines = []
        for benchmark, questions in self.by_benchmark():
            unasked = sum(not q.asked for q in questions)
            changed = sum(q.asked and q.note is not None for q in questions)
            if unasked:
                lines.append(
                    f"{benchmark.name}: {unasked} of {len(questions)} items could not be asked and count as "
                    "wrong; items.jsonl notes why (of longer prompts: data.max_prompt_length)"
                )
            if changed:
                lines.append(
                    f"{benchmark.name}: {changed} of {len(questions)} items were asked without a damaged "
                    "image; items.jsonl notes which"
                )
        return lines
