"""``--judge``: a server's model, or ``local:MODEL`` on engines of our own after those of the policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from mssr.config import Config
from mssr.data.encoder import PromptEncoder
from mssr.data.rows import IMAGE_MARK, Row
from mssr.errors import UserError
from mssr.evaluation.model import engine_config
from mssr.evaluation.prompts import NO_ANSWER, prompt_data, save_rows
from mssr.models.loading import check_model_path, load_processor
from mssr.rewards import judge as judges
from mssr.types import Rollout, RolloutRequest, SamplingParams

CACHE = "judge.jsonl"
LOCAL = "local:"
MAX_PROMPT = 4096
"""Tokens. A longer prompt gets no verdict."""

Generate = Callable[[Sequence[RolloutRequest], SamplingParams], list[Rollout]]
"""See `mssr.cluster.base.Cluster.generate`."""
Launch = Callable[[Config], AbstractContextManager[Generate]]
"""Starts the engines of a config; they end with the context."""


def make(spec: str, config: Config, out: Path, scratch: Path, launch: Launch) -> judges.Judge:
    """The judge that ``--judge`` means; its verdicts are kept in the output directory.

    Args:
        spec: see `mssr.rewards.judge.from_spec`; or ``local:`` and a Hugging Face directory or hub name.
        config: of the evaluation, for engine, number of engines and machines.
        scratch: where its prompts lie while it works.

    Raises:
        UserError: there is no such judge.
    """
    if not spec.startswith(LOCAL):
        return judges.from_spec(spec, out / CACHE)
    path = spec.removeprefix(LOCAL)
    model = replace(config.model, path=path, dtype="auto")
    data = replace(  # prompts are asked as they are
        prompt_data(config.data, scratch / "judge"),
        system_prompt=None,
        instruction="",
        prompt_template=None,
        chat_template=None,
        chat_template_kwargs={},
        max_prompt_length=MAX_PROMPT,
    )
    try:
        check_model_path(model)
        encoder = PromptEncoder(load_processor(model), data)
    except UserError as error:
        raise UserError(f"--judge {spec}: {error}") from error
    rollout = replace(config.rollout, max_response_length=judges.MAX_REPLY)
    judge_config = engine_config(replace(config, model=model, rollout=rollout), path, data, out)

    def ask(prompts: list[str]) -> list[str | None]:
        rows = [row for k, prompt in enumerate(prompts) if (row := _row(str(k), prompt, encoder))]
        replies: list[str | None] = [None] * len(prompts)
        if rows:
            save_rows(rows, scratch / "judge")
            requests = [RolloutRequest(row.id, 0, 0) for row in rows]
            with launch(judge_config) as generate:
                for rollout in generate(requests, SamplingParams(1.0, judges.MAX_REPLY, greedy=True)):
                    if rollout.finish_reason != "length":  # as of a server
                        replies[int(rollout.prompt_id)] = rollout.text
        return replies

    return judges.Judge(path, ask, out / CACHE)


def _row(key: str, prompt: str, encoder: PromptEncoder) -> Row | None:
    """The row of a prompt; None for one that cannot be asked, which is then no verdict."""
    row = Row(key, prompt.replace(IMAGE_MARK, "[image]"), NO_ANSWER, (), "")
    try:
        return row if encoder.length(row, []) <= MAX_PROMPT else None
    except ValueError:  # a response with a token that stands for pixels
        return None
