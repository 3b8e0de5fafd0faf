"""The driver: one training step after the other, readable top to bottom."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from mssr import algorithms
from mssr.cluster.base import Cluster
from mssr.config import Config
from mssr.data.dataset import VAL_PREFIX, PromptDataset
from mssr.data.sampler import EpochSampler
from mssr.errors import UserError
from mssr.rewards import ScoredBatch, Scorer
from mssr.rollout.seeds import request_seed
from mssr.trainer.checkpoint import CheckpointStore, read_state
from mssr.trainer.console import Console
from mssr.trainer.loggers import MetricsLog
from mssr.trainer.run_directory import write_samples
from mssr.trainer.signals import StopRequest
from mssr.types import Rollout, RolloutRequest, SamplingParams, TrainBatch

TRAIN_SAMPLES = 16
"""Train rollouts written to a samples file; validation writes all of its own."""


class Trainer:
    """The state of a run and the loop over its steps.

    Steps count updates that are done: step 0 is the base model, a record with step k describes the
    k-th update, and ``checkpoints/step-k`` is the policy after it.

    Args:
        train, val: data sets, narrowed to usable prompts; ``val`` is None to train without.
        cluster: running workers with the base model's weights.
    """

    def __init__(
        self,
        config: Config,
        train: PromptDataset,
        val: PromptDataset | None,
        cluster: Cluster,
        store: CheckpointStore,
        log: MetricsLog,
        console: Console,
    ) -> None:
        self.config = config
        self.train, self.val = train, val
        self.cluster = cluster
        self.store, self.log, self.console = store, log, console
        self.sampler = EpochSampler(train.ids, config.seed, config.data.shuffle)
        self.algorithm = algorithms.create(config.algorithm.name, **config.estimator_options)
        self.scorer = Scorer(config.reward.name)
        self.step = 0
        self._saved_step = 0
        self.timing: dict[str, float] = {}

    def resume(self, checkpoint: Path) -> None:
        """Take over everything that the next step depends on.

        Raises:
            UserError: the checkpoint is of another data set or algorithm.
        """
        state = read_state(checkpoint)
        try:
            self.sampler.load_state_dict(state["sampler"])
            self.algorithm.load_state_dict(state["algorithm"])
        except ValueError as error:
            raise UserError(f"trainer.resume: {checkpoint} does not fit this run: {error}") from error
        self.step = self._saved_step = state["step"]
        self.cluster.load(str((checkpoint / "actor").absolute()))
        self.cluster.sync_weights(version=self.step)

    def run(self, stop: StopRequest) -> None:
        """Train until ``trainer.steps``, or until a stop is requested; then checkpoint."""
        steps = self.config.trainer.steps
        if self.step == 0 and self._due(self.config.trainer.val_every):
            before = self.validate()
            self.log.write({"step": 0, "epoch": 0.0} | before)
            if before:
                self.console.note(f"step 0: validation accuracy {before['val/accuracy']:.3f}")
        self.console.begin()
        while self.step < steps and not stop.requested:
            with self._timed("step"):
                metrics = self.train_step()
            if self._due(self.config.trainer.val_every, at_end=True):
                metrics |= self.validate()
            metrics |= self._timing_metrics(metrics["rollout/tokens"]) | self.cluster.memory()
            # Logged first: a crash in between repeats the step, where the other way round its record
            # would be missing. So timing/save_s appears in the record of the next step.
            self.log.write({"step": self.step, "epoch": self.sampler.epoch} | metrics)
            self.console.step(self.step, metrics)
            if self._due(self.config.trainer.save_every, at_end=True):
                self.save()
        if stop.requested:
            self.save()

    def train_step(self) -> dict[str, float]:
        """Sample prompts, generate, score, estimate, update, send the weights on."""
        prompt_ids = self.sampler.next(self.config.prompts_per_step)
        with self._timed("rollout"):
            rollouts = self.generate(prompt_ids)
        with self._timed("reward"):
            scored = self.score(self.train, rollouts)
        ids = [r.prompt_id for r in rollouts]
        lengths = np.array([len(r.response_token_ids) for r in rollouts])
        advantages, metrics = self.algorithm.advantages(ids, scored.scores, lengths)
        with self._timed("update"):
            metrics |= self.cluster.update(make_batch(rollouts, advantages), self.step)
        try:
            self.algorithm.observe(ids, scored.scores, metrics["policy/kl_update"])
        except ValueError as error:
            raise UserError(f"reward.name={self.scorer.name}: {error}") from error
        with self._timed("sync"):
            self.cluster.sync_weights(version=self.step + 1)
        self.step += 1
        if self._due(self.config.trainer.samples_every):
            self._write_samples("train", self.train, rollouts[:TRAIN_SAMPLES], scored)
        return metrics | self.algorithm.metrics() | rollout_metrics(rollouts, scored)

    def generate(self, prompt_ids: Sequence[str]) -> list[Rollout]:
        """``rollout.n`` responses to every prompt, next to one another."""
        rollout = self.config.rollout
        requests = [
            RolloutRequest(i, k, request_seed(self.config.seed, self.step, i, k))
            for i in prompt_ids
            for k in range(self.config.responses_per_prompt)
        ]
        return self.cluster.generate(
            requests, SamplingParams(rollout.temperature, rollout.max_response_length)
        )

    def score(self, dataset: PromptDataset, rollouts: Sequence[Rollout]) -> ScoredBatch:
        answers = dataset.answers([r.prompt_id for r in rollouts])
        return self.scorer.score([r.text for r in rollouts], answers)

    def validate(self) -> dict[str, float]:
        """One greedy response to every validation prompt; all of them go to the samples file."""
        if self.val is None:
            return {}
        with self._timed("val"):
            ids = self.val.ids[: self.config.trainer.val_max_prompts]
            rollout = self.config.rollout
            params = SamplingParams(rollout.temperature, rollout.max_response_length, greedy=True)
            rollouts = self.cluster.generate([RolloutRequest(i, 0, 0) for i in ids], params)
            scored = self.score(self.val, rollouts)
        self._write_samples("val", self.val, rollouts, scored)
        length = float(np.mean([len(r.response_token_ids) for r in rollouts]))
        return {"val/response_length": length} | score_metrics("val", scored)

    def save(self) -> None:
        """A checkpoint of the current step, unless there is one (or it is the base model)."""
        if self.step == self._saved_step:
            return
        state = {
            "step": self.step,
            "sampler": self.sampler.state_dict(),
            "algorithm": self.algorithm.state_dict(),
        }
        with self._timed("save"):
            self.store.save(self.step, state, self.cluster.save)
        self._saved_step = self.step

    def _due(self, every: int, at_end: bool = False) -> bool:
        """Whether something that is done every so many steps (0 never) is to be done now."""
        last = at_end and self.step == self.config.trainer.steps
        return every > 0 and (last or self.step % every == 0)

    def _write_samples(
        self, split: str, dataset: PromptDataset, rollouts: Sequence[Rollout], scored: ScoredBatch
    ) -> None:
        records = []
        for rollout, score in zip(rollouts, scored.scores[: len(rollouts)], strict=True):
            row = dataset.row(rollout.prompt_id)
            records.append(
                {
                    "split": split,
                    "id": rollout.prompt_id.removeprefix(VAL_PREFIX),
                    "question": row.problem,
                    "response": rollout.text,
                    "answer": row.answer,
                    "score": float(score),
                    "finish_reason": rollout.finish_reason,
                    "response_tokens": len(rollout.response_token_ids),
                }
            )
        write_samples(self.log.run_dir / "samples" / f"step-{self.step:06d}.jsonl", records, split)

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.timing[f"timing/{phase}_s"] = time.perf_counter() - start

    def _timing_metrics(self, tokens: float) -> dict[str, float]:
        """Wall time of the phases, and rates over the step without validation and checkpoint."""
        timing, self.timing = self.timing, {}
        seconds = timing["timing/step_s"]
        return timing | {
            "perf/rollouts_per_s": self.config.rollout.rollouts_per_step / seconds,
            "perf/tokens_per_s": tokens / seconds,
        }


def make_batch(rollouts: Sequence[Rollout], advantages: np.ndarray) -> TrainBatch:
    """Rollouts laid end to end."""
    tokens = [part for r in rollouts for part in (r.prompt_token_ids, r.response_token_ids)]
    lengths = [len(r.prompt_token_ids) + len(r.response_token_ids) for r in rollouts]
    return TrainBatch(
        prompt_ids=tuple(r.prompt_id for r in rollouts),
        tokens=np.concatenate(tokens),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        prompt_lengths=np.array([len(r.prompt_token_ids) for r in rollouts], dtype=np.int64),
        advantages=advantages,
        engine_log_probs=np.concatenate([r.log_probs for r in rollouts]),
    )


def score_metrics(prefix: str, scored: ScoredBatch) -> dict[str, float]:
    """Means: ``score`` is what is learned from; ``accuracy`` is the reward's part of that name, if any."""
    parts = {"accuracy": scored.scores, "score": scored.scores} | scored.parts
    return {f"{prefix}/{name}": float(values.mean()) for name, values in parts.items()}


def rollout_metrics(rollouts: Sequence[Rollout], scored: ScoredBatch) -> dict[str, float]:
    """What was generated and how it scored."""
    lengths = np.array([len(r.response_token_ids) for r in rollouts])
    return {
        **score_metrics("reward", scored),
        "reward/errors": float(scored.errors),
        "rollout/tokens": float(lengths.sum()),
        "rollout/response_length": float(lengths.mean()),
        "rollout/truncated_fraction": float(np.mean([r.finish_reason == "length" for r in rollouts])),
    }
