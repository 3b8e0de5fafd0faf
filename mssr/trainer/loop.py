"""The driver: one training step after the other, readable top to bottom."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mssr.algorithms import Algorithm
from mssr.cluster.base import Cluster
from mssr.config import Config
from mssr.data.dataset import VAL_PREFIX, PromptDataset
from mssr.data.mixture import MixtureSampler
from mssr.data.sampler import EpochSampler, PromptSampler, UncertaintySampler
from mssr.errors import UserError
from mssr.rewards import Scorer
from mssr.trainer.checkpoint import CheckpointStore, read_state
from mssr.trainer.collect import RolloutCollector, reward_inputs, score_metrics
from mssr.trainer.console import Console
from mssr.trainer.estimate import Estimator
from mssr.trainer.initial_values import initialize_values
from mssr.trainer.loggers import MetricsLog
from mssr.trainer.run_directory import write_samples
from mssr.trainer.signals import StopRequest
from mssr.trainer.timing import PhaseTimer
from mssr.types import Rollout, RolloutRequest, SamplingParams

TRAIN_SAMPLES = 16
"""Train rollouts written to a samples file; validation writes all of its own."""


class Trainer:
    """The state of a run and the loop over its steps.

    Steps count updates that are done: step 0 is the base model, a record with step k describes the
    k-th update, and ``checkpoints/step-k`` is the policy after it.

    Args:
        train, val: data sets, narrowed to usable prompts; ``val`` is None to train without.
        scorer: of ``config.reward``; the caller closes it.
        cluster: running workers with the base model's weights.
    """

    def __init__(
        self,
        config: Config,
        train: PromptDataset,
        val: PromptDataset | None,
        scorer: Scorer,
        cluster: Cluster,
        store: CheckpointStore,
        log: MetricsLog,
        console: Console,
    ) -> None:
        self.config = config
        self.train, self.val = train, val
        self.cluster = cluster
        self.store, self.log, self.console = store, log, console
        self.timer = PhaseTimer()
        self.estimator = Estimator(config, cluster, self.timer)
        self.sampler = make_sampler(config, train, self.estimator.algorithm)
        self.collector = RolloutCollector(config, train, self.sampler, scorer, cluster, self.timer)
        self.step = 0
        self._saved_step = 0

    def resume(self, checkpoint: Path) -> None:
        """Take over everything that the next step depends on.

        Raises:
            UserError: the checkpoint is of another data set or algorithm.
        """
        state = read_state(checkpoint)
        try:
            self.sampler.load_state_dict(state["sampler"])
            self.estimator.load_state_dict(state["estimator"])
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
        if self.step == 0 and self.estimator.algorithm.init_rollouts:
            algorithm, note = self.estimator.algorithm, self.console.note
            initialize_values(self.config, algorithm, self.collector, note, lambda: stop.requested)
            self.timer.take()
        self.console.begin()
        while self.step < steps and not stop.requested:
            with self.timer("step"):
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
        """Collect scored rollouts, estimate their advantages, update, learn, send the weights on."""
        collected = self.collector.collect(self.step)
        batch, metrics = self.estimator.batch(collected)
        with self.timer("update"):
            metrics |= self.cluster.update(batch, self.step)
        metrics |= self.estimator.observe(collected, metrics)
        with self.timer("sync"):
            self.cluster.sync_weights(version=self.step + 1)
        self.step += 1
        if self._due(self.config.trainer.samples_every):
            rollouts = collected.rollouts[:TRAIN_SAMPLES]
            self._write_samples("train", self.train, rollouts, collected.scores)
        return metrics | collected.metrics

    def validate(self) -> dict[str, float]:
        """One greedy response to every validation prompt; all of them go to the samples file."""
        if self.val is None:
            return {}
        with self.timer("val"):
            ids = self.val.ids[: self.config.trainer.val_max_prompts]
            rollout = self.config.rollout
            params = SamplingParams(rollout.temperature, rollout.max_response_length, greedy=True)
            rollouts = self.cluster.generate([RolloutRequest(i, 0, 0) for i in ids], params)
            scored = self.collector.scorer.score(reward_inputs(self.val, rollouts))
        self._write_samples("val", self.val, rollouts, scored.scores)
        length = float(np.mean([len(r.response_token_ids) for r in rollouts]))
        return {"val/response_length": length} | score_metrics("val", scored)

    def save(self) -> None:
        """A checkpoint of the current step, unless there is one (or it is the base model)."""
        if self.step == self._saved_step:
            return
        state = {
            "step": self.step,
            "sampler": self.sampler.state_dict(),
            "estimator": self.estimator.state_dict(),
        }
        with self.timer("save"):
            self.store.save(self.step, state, self.cluster.save)
        self._saved_step = self.step

    def _due(self, every: int, at_end: bool = False) -> bool:
        """Whether something that is done every so many steps (0 never) is to be done now."""
        last = at_end and self.step == self.config.trainer.steps
        return every > 0 and (last or self.step % every == 0)

    def _write_samples(
        self, split: str, dataset: PromptDataset, rollouts: Sequence[Rollout], scores: np.ndarray
    ) -> None:
        records = []
        for rollout, score in zip(rollouts, scores[: len(rollouts)], strict=True):
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

    def _timing_metrics(self, tokens: float) -> dict[str, float]:
        """Wall time of the phases, and rates over the step without validation and checkpoint."""
        timing = self.timer.take()
        seconds = timing["timing/step_s"]
        return timing | {
            "perf/rollouts_per_s": self.config.rollout.rollouts_per_step / seconds,
            "perf/tokens_per_s": tokens / seconds,
        }


def make_sampler(config: Config, dataset: PromptDataset, algorithm: Algorithm) -> PromptSampler:
    """The sampler that ``sampler.name`` means; of each source, where ``data.train`` weighs several."""

    def sampler(ids: Sequence[str]) -> PromptSampler:
        if config.sampler_name == "uncertainty":
            baseline = algorithm.baseline
            assert baseline is not None  # the config check asks for one
            keys = baseline.keys(ids)
            return UncertaintySampler(
                ids, config.seed, lambda: baseline.values(keys), config.sampler.uncertainty_eps
            )
        return EpochSampler(ids, config.seed, config.data.shuffle)

    if dataset.weights is None:
        return sampler(dataset.ids)
    return MixtureSampler({k: sampler(ids) for k, ids in dataset.ids_by_source().items()}, dataset.weights)
