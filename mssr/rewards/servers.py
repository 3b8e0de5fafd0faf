"""The rewards that ask a server: a language model as a judge, and remote rewards.

Both work in threads of the driver, where the key is and where requests are counted. A response that gets no
usable reply has no score: a server that is away says nothing of it.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mssr.config.data import JUDGE, RewardConfig
from mssr.errors import TrainingError, UserError, first_line
from mssr.rewards.base import Failure, Outcome, RewardInput, RewardResult, as_result
from mssr.rewards.endpoint import Endpoint
from mssr.rewards.rows import NO_ROWS, RowAccess, RowView

CACHE = "judge.jsonl"
KEY_VARIABLES = ("MSSR_REWARD_API_KEY",)

Score = Callable[[Sequence[RewardInput]], list[Outcome]]


class ServerReward:
    """Scores by a server, in threads that end with `close`.

    Args:
        config: named judge or remote.
        rows: where the rows are; without, questions and prompts are empty.
        directory: where verdicts of a judge are kept unless the config says where; None for nowhere.
    """

    def __init__(self, config: RewardConfig, rows: RowAccess, directory: Path | None) -> None:
        rows = replace(rows)  # what is opened here must not travel to other processes
        rows.open(sized=config.name != JUDGE and rows != NO_ROWS)
        self._score, self._endpoint = open_server(config, rows, directory)
        self._batch = 1 if config.name == JUDGE else config.batch_size
        self._waiting: queue.SimpleQueue[tuple[RewardInput, Future[Outcome]] | None] = queue.SimpleQueue()
        self._taking = threading.Lock()
        for _ in range(config.server.concurrency):  # daemons: a process that ends does not wait for a server
            threading.Thread(target=self._work, name=str(config.name), daemon=True).start()

    def submit(self, item: RewardInput) -> Future[Outcome]:
        """Have a response scored; the future raises TrainingError if the server may be asked no more."""
        future: Future[Outcome] = Future()
        self._waiting.put((item, future))
        return future

    def close(self) -> None:
        self._endpoint.closed.set()
        self._waiting.put(None)

    def _work(self) -> None:
        while True:
            with self._taking:
                taken = [self._waiting.get()]
                while len(taken) < self._batch and not self._waiting.empty():
                    taken.append(self._waiting.get())
            if None in taken:
                self._waiting.put(None)  # for the other threads
            call = [one for one in taken if one is not None and one[1].set_running_or_notify_cancel()]
            try:
                outcomes = self._score([item for item, _ in call]) if call else []
            except TrainingError as error:
                for _, future in call:
                    future.set_exception(error)
                continue
            except Exception as error:  # no reply that could be used, or a row that cannot be read
                outcomes = [_unscored(first_line(error))] * len(call)
            for (_, future), outcome in zip(call, outcomes, strict=True):
                future.set_result(outcome)
            if None in taken:
                return


def open_server(
    config: RewardConfig, rows: RowAccess = NO_ROWS, directory: Path | None = None
) -> tuple[Score, Endpoint]:
    """How responses are scored, and where; arguments as of `ServerReward`.

    Raises:
        UserError: the address, the model or the prompt template is missing or cannot be meant.
    """
    limits = asdict(config.server)
    del limits["concurrency"]
    if config.name != JUDGE:
        if not config.url:
            raise UserError("reward.name=remote needs reward.url, the address that scores responses")
        endpoint = Endpoint(config.url, KEY_VARIABLES, **limits)
        return lambda items: _ask(endpoint, [RowView(item, rows) for item in items]), endpoint

    from mssr.data.encoder import text_or_file
    from mssr.rewards.judge import JudgeInput, from_spec

    template = text_or_file(config.judge.prompt_template, "reward.judge.prompt_template")
    cache = Path(config.judge.cache) if config.judge.cache else directory and directory / CACHE
    judge = from_spec(
        config.judge.model, cache, "reward.judge.model=", template=template, concurrency=1, **limits
    )

    def score(items: Sequence[RewardInput]) -> list[Outcome]:
        views = [RowView(item, rows) for item in items]
        verdicts = judge.verdicts([JudgeInput(v.question(), v.answer_text(), v.item.whole) for v in views])
        return [_unscored(judge.problem) if v is None else RewardResult(float(v)) for v in verdicts]

    return score, judge.endpoint


def _ask(endpoint: Endpoint, views: Sequence[RowView]) -> list[Outcome]:
    """The scores of a remote reward. OpenRLHF's servers read the first three keys; the others are what verl's
    functions of a batch take."""
    prompts, responses = [view.prompt() for view in views], [view.item.response for view in views]
    answers = [view.item.answer for view in views]
    body = {
        "query": [prompt + response for prompt, response in zip(prompts, responses, strict=True)],
        "prompts": prompts,
        "labels": answers,
        "data_sources": [view.data_source() for view in views],
        "solution_strs": responses,
        "ground_truths": answers,
        "extra_infos": [view.extra_info() for view in views],
    }
    return read_reply(endpoint.post(body), len(views))


def read_reply(reply: Any, count: int) -> list[Outcome]:
    """The scores in a reply: a list of what a reward function may return, or a dict with such a list under
    ``rewards`` or ``scores``; numbers in lists of that length under ``extra_logs`` become parts.

    Raises:
        TypeError, ValueError: it holds no list of so many scores.
    """
    logs: Mapping[str, Any] = {}
    if isinstance(reply, Mapping):
        logs, rewards = reply.get("extra_logs") or {}, reply.get("rewards")
        reply = reply.get("scores") if rewards is None else rewards
    if not isinstance(reply, list):
        raise TypeError("the reply has no list of rewards")
    if len(reply) != count:
        raise ValueError(f"{len(reply)} rewards for {count} responses")
    outcomes: list[Outcome] = []
    for i, value in enumerate(reply):
        parts = {k: v[i] for k, v in logs.items() if isinstance(v, list) and len(v) == count}
        try:
            outcomes.append(as_result(value if isinstance(value, Mapping) else {**parts, "score": value}))
        except (TypeError, ValueError) as error:
            outcomes.append(_unscored(error))
    return outcomes


def _unscored(reason: object) -> Failure:
    return Failure(str(reason), unscored=True)
