"""The driver: one training step after the other, readable top to bottom."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mssr.algorithms import Algorithm
from mssr.cluster.base import Cluster
from mssr.config import Config, to_dict
from mssr.config.secrets import redact
from mssr.data.dataset import PromptDataset
from mssr.data.sampler import EpochSampler, MixtureSampler, PromptSampler, UncertaintySampler
from mssr.errors import StopRequestedError, TrainingError, UserError
from mssr.rewards import Scorer
from mssr.runs.checkpoint import CheckpointStore, read_state
from mssr.runs.console import Console
from mssr.runs.events import EventLog
from mssr.runs.loggers import MetricsLog
from mssr.runs.signals import StopRequest
from mssr.trainer.collect import RolloutCollector
from mssr.trainer.estimate import Estimator
from mssr.trainer.initial_values import initialize_values
from mssr.trainer.pipeline import RolloutPipeline
from mssr.trainer.samples import SampleRecorder
from mssr.trainer.timing import PhaseTimer, speed
from mssr.trainer.validation import Validation, ValidationPrompts
from mssr.trainer.watch import CollapseWatch


@dataclass(frozen=True)
class Run:
    """What one start of a training writes to, is shown on and is stopped by; its owner closes them."""

    config: Config
    store: CheckpointStore
    log: MetricsLog
    events: EventLog
    console: Console
    stop: StopRequest


class Trainer:
    """The state of a run and the loop over its steps.

    Steps count updates that are done: step 0 is the base model, a record with step k describes the
    k-th update, and ``checkpoints/step-k`` is the policy after it.

    Args:
        train: data set, narrowed to usable prompts.
        val: sets to validate on; none to train without.
        scorer: of ``config.reward``; the caller closes it.
        cluster: running workers; `run` gives them their weights.
    """

    def __init__(
        self,
        run: Run,
        train: PromptDataset,
        val: Sequence[ValidationPrompts],
        scorer: Scorer,
        cluster: Cluster,
    ) -> None:
        config = self.config = run.config
        self.store, self.log, self.events = run.store, run.log, run.events
        self.console, self.stop = run.console, run.stop
        self.train = train
        self.cluster = cluster
        self.timer = PhaseTimer()
        self.estimator = Estimator(config, cluster, self.timer)
        self.sampler = make_sampler(config, train, self.estimator.algorithm)
        self.collector = RolloutCollector(config, train, self.sampler, scorer, cluster)
        self.pipeline = RolloutPipeline(config, self.collector, self.timer)
        self.validation = Validation(config, val, scorer, cluster)
        self.watch = CollapseWatch(config.watch)
        self.recorder = SampleRecorder(config.run_dir, partial(self.events.record, "report_failed"))
        self.step = 0
        self._unlogged: dict[str, float] | None = None
        """Metrics of the step that is done, from its update until they are in metrics.jsonl: a stop between
        the two leaves them to the checkpoint, and the next start finishes the step."""
        self._saved_step = 0
        self._save_failed = False

    def resume(self, checkpoint: Path) -> None:
        """Take over everything that the next step depends on.

        Raises:
            UserError: the checkpoint is of another data set or algorithm.
        """
        state = read_state(checkpoint)
        try:
            self.sampler.load_state_dict(state["sampler"])
            self.pipeline.load_state_dict(state["pipeline"])
            self.estimator.load_state_dict(state["estimator"])
            self.watch.load_state_dict(state["watch"])
        except ValueError as error:
            raise UserError(f"trainer.resume: {checkpoint} does not fit this run: {error}") from error
        self.step = self._saved_step = self.events.step = state["step"]
        self._unlogged = state["unlogged"]
        self.timer.add({k: v for k, v in (self._unlogged or {}).items() if k.startswith("timing/")})
        self.cluster.load(str((checkpoint / "actor").absolute()))

    def run(self) -> None:
        """Train until ``trainer.steps``, or until a stop is requested; then checkpoint.

        Raises:
            WorkersLostError: the policy is gone; a new trainer is to go on from the last checkpoint.
        """
        with contextlib.suppress(StopRequestedError), contextlib.closing(self.recorder), self.pipeline:
            self._run_steps()
        if self.stop.requested:
            self._begin_save()
        self._finish_save()
        if self._save_failed:
            raise TrainingError("the last checkpoint could not be written; see events.jsonl")

    def _run_steps(self) -> None:
        self.cluster.sync_weights(version=self.step)
        if self.step == 0:
            self._before_first_step()
        self.console.begin(self.step - (self._unlogged is not None))
        if self._unlogged is not None:
            self._finish_step()
        while self.step < self.config.trainer.steps and not self.stop.requested:
            self._train_step()
            self._finish_step()

    def _before_first_step(self) -> None:
        before = self.validate()
        if before or self._due(self.config.trainer.val_every):
            self.log.write({"step": 0, "epoch": 0.0} | before)
        if before:
            accuracies = [f"{key} {value:.3f}" for key, value in before.items() if key.endswith("accuracy")]
            self.console.note(f"step 0: {', '.join(accuracies)}")
        algorithm, note = self.estimator.algorithm, self.console.note
        if algorithm.init_rollouts:
            initialize_values(self.config, algorithm, self.collector, note, lambda: self.stop.requested)
        self.timer.take()
        self.collector.timer.take()

    def _train_step(self) -> None:
        """Take scored rollouts, estimate their advantages, update, learn, send the weights on."""
        with self.timer("step"):
            collected = self.pipeline.take(self.step)
            self.pipeline.begin_next(self.step + 1)
            batch, metrics = self.estimator.batch(collected)
            expected = self.estimator.expected(collected.prompt_ids)
            with self.timer("update"):
                metrics |= self.cluster.update(batch, self.step)
            metrics |= self.estimator.observe(collected, metrics)
            self.pipeline.finish_next()
            self.step += 1
            self._unlogged = {"epoch": collected.epoch} | metrics | collected.metrics
            with self.timer("sync"):
                self.cluster.sync_weights(version=self.step)
        if self.step in self.config.trainer.profile_steps:
            self.cluster.write_timeline(str(self.config.run_dir / f"profiles/step-{self.step:06d}-ray.json"))
        if self._due(self.config.trainer.samples_every):
            self.recorder.train(self.step, self.train, collected, batch, expected)

    def _finish_step(self) -> None:
        """Validate where it is due, log, checkpoint where it is due."""
        assert self._unlogged is not None
        metrics = self._unlogged | self.validate() | self.cluster.metrics() | self.timer.take()
        metrics |= speed(metrics, self.config.rollout.rollouts_per_step, self.config.actor.num_ranks)
        warnings = self.watch.observe(self.step, metrics)
        metrics |= self.watch.metrics()
        # Logged first: a crash in between repeats the step, where the other way round its record
        # would be missing. So timing/save_s appears in the record of the next step.
        self.log.write({"step": self.step} | metrics)
        self._unlogged = None
        self.events.step = self.step
        for warning in warnings:
            self.events.record("collapse", warning)
        if skipped := metrics["policy/skipped_updates"]:
            where = self.config.run_dir / "nonfinite"
            self.events.record("updates_skipped", f"{skipped:.0f} were not finite; see {where}")
        self.console.step(self.step, metrics)
        if self._due(self.config.trainer.samples_every):
            self.recorder.begin_report()
        if self.store.written:
            self._finish_save()
        collapsed = self.watch.collapsed and self.config.trainer.stop_on_collapse
        if collapsed or self._due(self.config.trainer.save_every, at_end=True):
            self._begin_save(metrics.get("val/accuracy"))
        if collapsed:
            self._finish_save()
            raise TrainingError(
                "the policy has collapsed, see events.jsonl, and trainer.stop_on_collapse=true; "
                "trainer.resume with an earlier checkpoint and a changed config goes on"
            )

    def validate(self) -> dict[str, float]:
        """Ask the validation sets that are due; all responses go to the samples file."""
        metrics: dict[str, float] = {}
        for prompts in self.validation.due(self.step):
            with self.timer("val"):
                rollouts, scores, found = self.validation.ask(prompts)
            self.recorder.validation(self.step, prompts.set.key, prompts.dataset, rollouts, scores)
            metrics |= found
        return metrics

    def _begin_save(self, val_accuracy: float | None = None) -> None:
        """Begin a checkpoint of the current step, unless there is one (or it is the base model)."""
        if self.step == self._saved_step:
            return
        with self.timer("save"):
            self._finish_save()
            state = {
                "step": self.step,
                "sampler": self.sampler.state_dict(),
                "pipeline": self.pipeline.state_dict(),
                "estimator": self.estimator.state_dict(),
                "watch": self.watch.state_dict(),
                "unlogged": None if self._unlogged is None else self._unlogged | self.timer.seconds,
            }
            config = redact(to_dict(self.config))
            with self._survived():
                self.store.begin(self.step, state, self.cluster.begin_save, config, val_accuracy)
                self._saved_step = self.step
            if not self.config.trainer.save_in_background:
                self._finish_save()

    def _finish_save(self) -> None:
        """Put the checkpoint that is being written in force."""
        if self.store.writing:
            with self._survived():
                self.store.finish()
                self._save_failed = False
                self.events.progress()

    @contextlib.contextmanager
    def _survived(self) -> Iterator[None]:
        """A checkpoint that cannot be written costs a line, not the run."""
        try:
            yield
        except OSError as error:
            self._saved_step, self._save_failed = 0, True
            reason = f"{error.strerror or error}; the one before stays in force, the run goes on"
            self.events.record("checkpoint_failed", reason)

    def _due(self, every: int, at_end: bool = False) -> bool:
        """Whether something that is done every so many steps (0 never) is to be done now."""
        last = at_end and self.step == self.config.trainer.steps
        return every > 0 and (last or self.step % every == 0)


def make_sampler(config: Config, dataset: PromptDataset, algorithm: Algorithm) -> PromptSampler:
    """The sampler that ``sampler.name`` means; of each source, where ``data.train`` weighs several."""

    def sampler(ids: Sequence[str]) -> EpochSampler | UncertaintySampler:
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
