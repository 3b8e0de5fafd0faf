"""One training of the study in this process: what is measured, and nothing that is left over."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from mssr.cluster.local import LocalCluster
from mssr.config import Config
from mssr.errors import StopRequestedError
from mssr.evaluation.statistics import bolded_steps
from mssr.rewards import RewardInput, RowAccess, Scorer, check
from mssr.rewards.base import Outcome, RewardResult
from mssr.runs.checkpoint import CheckpointStore
from mssr.runs.config import load_config
from mssr.runs.console import Console, captured_output
from mssr.runs.events import EventLog
from mssr.runs.jsonl import read_records
from mssr.runs.loggers import MetricsLog
from mssr.runs.run_directory import prepare_run_directory
from mssr.runs.signals import StopRequest
from mssr.trainer.data import load_data
from mssr.trainer.loop import Run, Trainer

# One process with one thread, and nothing written that no record needs.
ALONE = """
cluster.launcher=local cluster.threads_per_rollout=1 rollout.workers=1 actor.num_ranks=1
trainer.save_every=0 trainer.samples_every=0 trainer.progress=off trainer.resume=never
""".split()
CURVES = {
    "accuracy": "reward/accuracy",
    "careful": "reward/careful",
    "bold": "reward/bold",
    "entropy": "policy/entropy",
    "length": "rollout/response_length",
    "kl_update": "policy/kl_update",
    "grad_norm": "policy/grad_norm",
    "eta": "baseline/eta",
}
"""Name in a record -> metric of a step; one that a method does not have is left out."""
PHASES = ("step", "rollout", "reward", "score", "update", "sync")
SAMPLES = 8
"""Responses a validation prompt at the end."""


class CountingScorer(Scorer):
    """The rule of the config without processes, and how responses reason.

    A score depends on response and answer alone, so what comes again in a run costs nothing.
    """

    def __init__(self, config: Config, rows: RowAccess) -> None:
        # (Not the parent's, which starts processes.)
        (loaded,) = check(config.reward, rows)
        reward = config.reward
        penalties = (reward.overlong_buffer, reward.length_penalty, reward.repetition_penalty)
        assert loaded is not None and reward.rule and not any(penalties), (
            "one of the named rules, nothing else"
        )
        self.name, self.takes_cells, self.labels, self.pool, self.sources = reward.rule, False, [], None, []

        @cache
        def score(whole: str, answer: str) -> Outcome:
            return loaded.call([RewardInput(whole, answer, 0)])[0]

        self._score = score

    def submit(self, item: RewardInput) -> list[Future[Outcome]]:
        found = self._score(item.whole, item.answer)
        assert isinstance(found, RewardResult)
        future: Future[Outcome] = Future()
        future.set_result(RewardResult(found.score, {**found.parts, **reasoning(item.response)}))
        return [future]

    def outcome(self, item: RewardInput, outcomes: Sequence[Outcome]) -> Outcome:
        return outcomes[0]


def reasoning(response: str) -> dict[str, float]:
    """``careful``: whether it writes down steps with what comes of them, ``3=3``; ``bold``: steps in bold."""
    return {"careful": float("=" in response), "bold": float(bolded_steps(response))}


def train(config_file: str, overrides: Sequence[str], directory: Path) -> dict[str, Any]:
    """Train in a new directory; gives task, steps, rollouts, updates, curves, final and seconds of a record.

    Raises:
        UserError: the config does not load, or data or base are not there.
        KeyboardInterrupt: SIGINT or SIGTERM came.
    """
    config = load_config(config_file, [*overrides, *ALONE, f"trainer.run_dir={directory}"])
    with prepare_run_directory(config), captured_output(directory / "logs" / "driver.log") as terminal:
        console = Console(terminal, "off", config.trainer.steps)
        data = load_data(config)
        with StopRequest(console.announce, "stopping without a record") as stop:
            log = MetricsLog(config, None)
            events = EventLog(directory, lambda line: None, 0)
            run = Run(config, CheckpointStore(directory, 1), log, events, console, stop)
            cluster = LocalCluster(config, lambda: stop.requested)
            try:
                scorer = CountingScorer(config, data.access)
                trainer = Trainer(run, data.train.dataset, data.val, scorer, cluster)
                trainer.run()
                # The policy as it is now, sampled.
                (prompts,) = data.val
                several = replace(prompts, set=replace(prompts.set, n=SAMPLES, temperature=1.0))
                _, _, sampled = trainer.validation.ask(several)
            except StopRequestedError:
                raise KeyboardInterrupt from None
            finally:
                cluster.shutdown()
            if stop.requested:
                raise KeyboardInterrupt
    return {
        "task": task_of(config),
        "steps": config.trainer.steps,
        "rollouts": config.rollout.rollouts_per_step,
        "updates": config.actor.updates_per_step,
    } | measured(read_records(log.path), sampled)


def task_of(config: Config) -> str:
    """Data and base, by content: runs of different ones cannot be compared."""
    files = config.data.train, config.data.val, f"{config.model.path}/model.safetensors"
    return sha256(b"".join(sha256(Path(file).read_bytes()).digest() for file in files)).hexdigest()[:12]


def measured(metrics: Sequence[dict[str, Any]], sampled: dict[str, float]) -> dict[str, Any]:
    """What a record keeps of the metrics of a run and of the sampled validation."""
    steps = [m for m in metrics if m["step"] > 0]
    validated = [m for m in metrics if "val/accuracy" in m]
    val = {"steps": [m["step"] for m in validated], "accuracy": [m["val/accuracy"] for m in validated]}
    curves = {name: [m[key] for m in steps] for name, key in CURVES.items() if key in steps[-1]}
    final = {"val": val["accuracy"][-1], "sampled": sampled["val/accuracy"]}
    final |= {f"pass@{SAMPLES}": sampled[f"val/pass_at_{SAMPLES}"]}
    final |= {name: sampled[f"val/{name}"] for name in ("bold", "careful")}
    seconds = {name: [m.get(f"timing/{name}_s", 0.0) for m in steps] for name in PHASES}
    return rounded({"curves": {**curves, "val": val}, "final": final, "seconds": seconds})


def rounded(value: Any) -> Any:
    """The floats in it to 4 significant digits."""
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value
