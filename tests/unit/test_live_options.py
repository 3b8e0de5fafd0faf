"""Every documented option of the algorithm and the sampler does something.

Each case trains a tiny model for a few steps with the real trainer, estimator and update step, with and
without one changed option; only the engine and the process boundaries are replaced (random responses, so
that a run takes well under a second). A case says what has to change: the ``samples`` (which responses
were trained on), the ``advantages``, or the ``parameters`` (through the gradient). What is read by the
estimator only changes the ``estimates``: its advantages over some steps of fixed scores, without a training.

An option without a case fails `test_every_option_has_a_case`.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import torch.distributed as dist

from mssr import algorithms
from mssr.actor.prompts import PromptCache
from mssr.actor.update import PolicyUpdater
from mssr.cluster.base import OnFinished, join_log_probs
from mssr.config import Config, flatten, to_dict
from mssr.data.dataset import PromptDataset
from mssr.data.prompt_source import PromptSource
from mssr.errors import TrainingError
from mssr.models.loading import load_model
from mssr.models.policy import PolicyModel
from mssr.rewards import Scorer
from mssr.runs.config import load_config
from mssr.trainer.loop import Trainer
from mssr.types import Rollout, RolloutRequest, SamplingParams, TokenLogProbs, TrainBatch
from tests.conftest import Workspace

pytestmark = pytest.mark.unit

PLUGIN = """
import numpy as np
from mssr.algorithms import Algorithm

class Centred(Algorithm):
    def __init__(self, *, shift=0.0):
        self.shift = shift
    def advantages(self, prompt_ids, rewards, lengths):
        return (np.asarray(rewards) - self.shift).astype(np.float32), {}

def reinforce(log_probs, old_log_probs, advantages, lengths, *, power=1.0):
    return -(log_probs - old_log_probs).exp() ** power * advantages.detach(), {}
"""


@dataclass(frozen=True)
class Case:
    """``option`` set to ``value`` beside ``base`` (for both runs) changes ``what``."""

    option: str
    value: Any
    what: str
    base: dict[str, Any] = field(default_factory=dict)
    also: dict[str, Any] = field(default_factory=dict)
    """Set only in the changed run, where the option needs company."""

    def __str__(self) -> str:
        return f"{self.option}={self.value}"


def algorithm(**options: Any) -> dict[str, Any]:
    return {f"algorithm.{k.replace('__', '.')}": v for k, v in options.items()}


GROUPS = {"algorithm.name": "grpo", "rollout.n": 2}
UNCERTAIN = {"sampler.name": "uncertainty", "rollout.rollouts_per_step": 4, "trainer.steps": 5}
LAST_VISIT = algorithm(discount__kl_source="last_visit")
HALF_LIFE = LAST_VISIT | algorithm(discount__eta_rule="half_life", discount__eta_min=0.01)
TOKEN = algorithm(correction__weight="token")
MASK = algorithm(correction__mask="token")
CONFIDENT = algorithm(entropy_control__confident=1e-3)  # the tiny model is sure of nothing
CONTROLLED = CONFIDENT | algorithm(entropy_control__target=5.5)
CASES = [
    Case("algorithm.name", "reinforce_pp", "advantages"),
    Case("algorithm.name", "{plugin}:Centred", "advantages"),
    Case("algorithm.options.shift", 0.3, "advantages", algorithm(name="{plugin}:Centred")),
    Case("algorithm.name", "flash_reinforce", "estimates", {"actor.updates_per_step": 1}),
    Case("algorithm.name", "dbb", "estimates"),
    Case("algorithm.normalisation", "none", "estimates"),
    Case("algorithm.baseline.name", "batch_mean", "estimates", algorithm(normalisation="none")),
    Case("algorithm.baseline.shrinkage", True, "estimates", algorithm(normalisation="none")),
    Case("algorithm.floor", 0.45, "estimates", algorithm(normalisation="mean", baseline__prior_mean=0.1)),
    Case("algorithm.baseline.prior_strength", 5, "estimates"),
    Case("algorithm.baseline.prior_mean", 0.9, "estimates"),
    Case("algorithm.baseline.init_rollouts", 2, "advantages"),
    Case("algorithm.baseline.init_strength", 2, "estimates", algorithm(baseline__init_rollouts=2)),
    Case("algorithm.baseline.init_smoothing", 0, "estimates", algorithm(baseline__init_rollouts=2)),
    Case("algorithm.discount.eta", 0.5, "estimates"),
    Case("algorithm.discount.eta_min", 0.5, "estimates"),
    Case("algorithm.discount.eta_max", 0.9, "estimates", algorithm(discount__kl_target=10)),
    Case("algorithm.discount.kl_target", 10, "estimates"),
    Case("algorithm.discount.window", 1, "estimates", algorithm(discount__kl_target=10)),
    Case("algorithm.discount.eta_rule", "published_code", "estimates", algorithm(discount__kl_target=10)),
    Case("algorithm.discount.kl_source", "reference", "advantages", algorithm(discount__kl_target=10)),
    Case("algorithm.discount.kl_source", "last_visit", "advantages", algorithm(discount__kl_target=10)),
    Case("algorithm.discount.half_life", 1.0, "advantages", HALF_LIFE),
    Case("algorithm.shaping.enabled", False, "parameters"),
    Case("algorithm.shaping.coef", 0.02, "parameters", algorithm(shaping__coef=0.01)),
    Case("algorithm.shaping.divisor", 8, "parameters"),
    Case("algorithm.shaping.entropy", "sampled", "parameters"),
    Case("algorithm.shaping.visual", "vppo", "parameters"),
    Case("algorithm.shaping.visual", "vepo", "parameters"),
    Case("algorithm.shaping.visual_fraction", 0.9, "parameters", algorithm(shaping__visual="vepo")),
    Case("algorithm.shaping.negative_fraction", 0.3, "parameters"),
    Case("algorithm.entropy_control.target", 5.5, "parameters", also=CONFIDENT),
    Case("algorithm.entropy_control.proportional", 0.1, "parameters", CONTROLLED),
    Case("algorithm.entropy_control.integral", 0.1, "parameters", CONTROLLED),
    Case("algorithm.entropy_control.confident", 0.002, "parameters", CONTROLLED),
    Case("algorithm.loss.max_kl", 1e-4, "parameters", algorithm(loss__name="flash_reinforce")),
    Case("algorithm.loss.name", "gspo", "parameters"),
    Case("algorithm.loss.name", "cispo", "parameters"),
    Case("algorithm.loss.name", "sapo", "parameters"),
    Case("algorithm.loss.name", "{plugin}:reinforce", "parameters"),
    Case("algorithm.loss.options.power", 2.0, "parameters", algorithm(loss__name="{plugin}:reinforce")),
    Case("algorithm.loss.clip_low", 1e-5, "parameters"),
    Case("algorithm.loss.clip_high", 1e-5, "parameters"),
    Case("algorithm.loss.dual_clip", 1.0001, "parameters"),
    Case("algorithm.loss.tau_positive", 3, "parameters", algorithm(loss__name="sapo")),
    Case("algorithm.loss.tau_negative", 3, "parameters", algorithm(loss__name="sapo")),
    Case("algorithm.loss.aggregation", "sequence_mean", "parameters"),
    Case("algorithm.loss.aggregation", "constant_length", "parameters"),
    Case("algorithm.loss.constant_length", 3, "parameters", algorithm(loss__aggregation="constant_length")),
    Case("algorithm.loss.entropy_coef", 0.1, "parameters"),
    Case("algorithm.loss.text_anchor_coef", 1.0, "parameters"),
    Case("algorithm.kl.coef", 0.5, "parameters"),
    Case("algorithm.kl.coef", 0.0, "parameters"),
    Case("algorithm.kl.estimator", "k2", "parameters", algorithm(kl__coef=0.5)),
    Case("algorithm.kl.placement", "reward", "advantages", algorithm(name="reinforce_pp")),
    Case("algorithm.kl.placement", "reward", "advantages", algorithm(kl__coef=0.5) | GROUPS),
    Case("algorithm.kl.target", 1e-4, "parameters", also=algorithm(kl__horizon=20)),
    Case("algorithm.kl.horizon", 20, "parameters", algorithm(kl__target=1e-4)),
    Case("algorithm.correction.weight", "token", "parameters"),
    Case("algorithm.correction.weight", "sequence", "parameters"),
    Case("algorithm.correction.max_weight", 1.1, "parameters", TOKEN),
    Case("algorithm.correction.mask", "token", "parameters", also=algorithm(correction__mask_low=0.9)),
    Case("algorithm.correction.mask_low", 0.9, "parameters", MASK),
    Case("algorithm.correction.mask_high", 1.1, "parameters", MASK),
    Case("algorithm.weighting", "token", "estimates"),
    Case("algorithm.eps", 1.0, "advantages"),
    Case("sampler.name", "uncertainty", "samples", {"rollout.rollouts_per_step": 4}),
    # A weak prior: a visited prompt is then nearly certain, and seldom drawn but for eps.
    Case("sampler.uncertainty_eps", 100, "samples", UNCERTAIN | {"algorithm.baseline.prior_strength": 0.01}),
    Case("sampler.dynamic", True, "samples", GROUPS),
    Case("sampler.max_draws", 1, "samples", GROUPS | {"sampler.dynamic": True}),
]


def test_every_option_has_a_case() -> None:
    documented = {k for k in flatten(to_dict(Config())) if k.startswith(("algorithm.", "sampler."))}
    covered = {case.option for case in CASES}
    covered |= {k.rsplit(".", 1)[0] for k in covered if ".options." in k}
    assert documented <= covered, f"no case shows that these do anything: {documented - covered}"


@dataclass(frozen=True)
class Trace:
    """What a run did."""

    samples: str
    advantages: str
    parameters: str


class FakeCluster:
    """The real update step on one plain model; responses are random tokens."""

    def __init__(self, lab: Lab, config: Config) -> None:
        self.lab = lab
        lab.policy.load_state_dict(lab.initial)
        optimizer = torch.optim.AdamW(lab.policy.parameters(), lr=config.actor.lr)
        reference = lab.reference if config.needs_reference else None
        prompts = PromptCache(lab.source, lab.policy)
        device = torch.device("cpu")
        self.updater = PolicyUpdater(config, lab.policy, reference, optimizer, prompts, 0, device)
        self.batches: list[TrainBatch] = []

    ranks_idle_in_rollout = False

    def generate(
        self,
        requests: Sequence[RolloutRequest],
        params: SamplingParams,
        on_finished: OnFinished | None = None,
        stoppable: bool = True,
    ) -> list[Rollout]:
        rollouts = []
        for request in requests:
            rng = np.random.default_rng(request.seed)
            tokens = rng.integers(0, 250, rng.integers(1, 7)).astype(np.int32)
            rollouts.append(
                Rollout(
                    prompt_id=request.prompt_id,
                    sample_index=request.sample_index,
                    prompt_token_ids=self.lab.prompt_tokens(request.prompt_id),
                    response_token_ids=tokens,
                    log_probs=rng.normal(size=len(tokens)).astype(np.float32),
                    finish_reason="stop",
                    policy_version=0,
                    text=chr(32 + int(tokens[0]) % 64),
                )
            )
        batch = TrainBatch.of(rollouts)
        exact = np.split(self.log_probs(batch).policy, batch.response_offsets[1:-1])
        for rollout, values in zip(rollouts, exact, strict=True):
            # An engine that disagrees with the actor by some tenths.
            rollout.log_probs[:] = values + 0.3 * rollout.log_probs
        for index, rollout in enumerate(rollouts):
            if on_finished is not None:
                on_finished(index, rollout)
        return rollouts

    def prepare(self, prompt_ids: Sequence[str]) -> None:
        pass

    def log_probs(self, batch: TrainBatch, reference: bool = False) -> TokenLogProbs:
        return join_log_probs([self.updater.log_probs(batch, reference)], batch)

    def update(self, batch: TrainBatch, step: int) -> dict[str, float]:
        self.batches.append(batch)
        return self.updater.step(batch, step)

    def sync_weights(self, version: int) -> None: ...

    def metrics(self) -> dict[str, float]:
        return {}


class Lab:
    """What all runs share: the models, and the traces of base runs that several cases compare with."""

    def __init__(self, workspace: Workspace, directory: Path) -> None:
        self.workspace = workspace
        self.directory = directory
        self.plugin = directory / "plugin.py"
        self.plugin.write_text(PLUGIN)
        config = load_config(workspace.config)
        self.policy = PolicyModel(load_model(config.model, torch.float32))
        self.reference = PolicyModel(load_model(config.model, torch.float32).requires_grad_(False))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in self.policy.parameters():  # so that the KL to the reference is not 0 at the start
                p += 0.002 * torch.randn(p.shape, generator=generator)
        self.initial = {k: v.clone() for k, v in self.policy.state_dict().items()}
        self.source = PromptSource(config)
        self._tokens: dict[str, np.ndarray] = {}
        self._traces: dict[str, Trace] = {}
        self._scorers: dict[str, Scorer] = {}

    def close(self) -> None:
        for scorer in self._scorers.values():
            scorer.close()

    def _scorer(self, config: Config) -> Scorer:
        """One for each reward section: its processes take longer to start than a run of this file."""
        clip, length = config.method.bounded_rewards, config.rollout.max_response_length
        key = repr((config.reward, clip, length))
        if key not in self._scorers:
            self._scorers[key] = Scorer(config.reward, length, clip=clip)
        return self._scorers[key]

    def prompt_tokens(self, prompt_id: str) -> np.ndarray:
        if prompt_id not in self._tokens:
            encoded = self.source.encoder.encode(self.source.row(prompt_id))
            self._tokens[prompt_id] = encoded.token_ids.numpy().astype(np.int32)
        return self._tokens[prompt_id]

    def trace(self, overrides: dict[str, Any]) -> Trace:
        settings = {
            "actor.num_ranks": 1,
            "rollout.engine": "hf",
            "cluster.launcher": "local",
            "rollout.rollouts_per_step": 8,
            "actor.micro_batch_tokens": 4096,
            "trainer.val_every": 0,
            "trainer.save_every": 0,
            "trainer.samples_every": 0,
            **overrides,
        }
        arguments = [f"{k}={v}".replace("{plugin}", str(self.plugin)) for k, v in settings.items()]
        key = repr(sorted(arguments))
        if key not in self._traces:
            self._traces[key] = self._run(arguments)
        return self._traces[key]

    def estimates(self, overrides: dict[str, Any]) -> str:
        """A digest of the advantages of four steps, by the method as the trainer makes it of the config."""
        config = load_config(self.workspace.config, [f"{k}={v}" for k, v in overrides.items()])
        method = algorithms.create(config.algorithm.name, config.choices, **config.estimator_options)
        rng, n, signals = np.random.default_rng(0), config.responses_per_prompt, []
        if method.init_rollouts:
            method.initialize([f"p{i}" for i in range(12)], [i % 3 for i in range(12)], [2] * 12)
        for _ in range(4):
            ids = [f"p{i}" for i in rng.choice(12, 8, replace=False) for _ in range(n)]
            scores, lengths = rng.choice([0, 0.25, 1], len(ids)), rng.integers(1, 7, len(ids))
            signals.append(method.advantages(ids, scores, lengths)[0])
            method.observe(ids, scores, rng.uniform(0.002, 0.006))
        return _digest(signals)

    def _run(self, arguments: list[str]) -> Trace:
        run_dir = tempfile.mkdtemp(dir=self.directory)
        config = load_config(self.workspace.config, [*arguments, f"trainer.run_dir={run_dir}"])
        cluster = FakeCluster(self, config)
        train = PromptDataset(config.data.train, config.data)
        run = MagicMock(config=config, stop=MagicMock(requested=False))
        trainer = Trainer(run, train, [], self._scorer(config), cluster)  # type: ignore[arg-type]
        outcome = ""
        try:
            trainer.run()
        except TrainingError as error:
            outcome = str(error)
        batches = cluster.batches
        return Trace(
            samples=_digest([outcome, *(b.prompt_ids for b in batches), *(b.tokens for b in batches)]),
            advantages=_digest([b.advantages for b in batches] + [b.token_advantages for b in batches]),
            parameters=_digest([v.numpy() for v in self.policy.state_dict().values()]),
        )


def _digest(values: list[Any]) -> str:
    sha = hashlib.sha256()
    for value in values:
        sha.update(value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode())
    return sha.hexdigest()


@pytest.fixture(scope="module")
def lab(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    directory = tmp_path_factory.mktemp("options")
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=0, world_size=1)
    lab = Lab(workspace, directory)
    yield lab
    lab.close()
    dist.destroy_process_group()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_option_does_something(lab: Lab, case: Case) -> None:
    changed = case.base | case.also | {case.option: case.value}
    if case.what == "estimates":
        assert lab.estimates(case.base) == lab.estimates(case.base) != lab.estimates(changed)
        return
    assert getattr(lab.trace(case.base), case.what) != getattr(lab.trace(changed), case.what)


def test_a_run_repeats(lab: Lab) -> None:
    """Otherwise every case above would pass."""
    config: dict[str, Any] = {"algorithm.loss.text_anchor_coef": 0.1, **LAST_VISIT}
    first = lab.trace(config)
    lab._traces.clear()
    assert lab.trace(config) == first


EARLY: dict[str, dict[str, Any]] = {
    "loss": {"algorithm.kl.coef": 0.1, "actor.updates_per_step": 2},
    "reward": {"algorithm.name": "grpo", "rollout.n": 4, "algorithm.kl.placement": "reward"},
    "last visits": LAST_VISIT,
    "without reference": {"algorithm.kl.coef": 0.0, "actor.updates_per_step": 2},
}


@pytest.mark.parametrize("name", EARLY)
def test_scores_that_came_early_are_those_of_later(lab: Lab, name: str) -> None:
    """The ranks' log-probs before the step and the reference's, from another packing."""
    final = []
    for early in ("never", "always"):
        lab.trace(EARLY[name] | {"cluster.launcher": "ray", "actor.score_early": early, "actor.lr": 1e-3})
        lab._traces.clear()
        final.append({k: v.clone() for k, v in lab.policy.state_dict().items()})
    names = [k for k, p in lab.policy.named_parameters() if p.requires_grad]
    learned = torch.cat([(final[0][k] - lab.initial[k]).flatten() for k in names])
    difference = torch.cat([(final[1][k] - final[0][k]).flatten() for k in names])
    assert difference.norm() < 1e-2 * learned.norm()  # Adam makes the most of a gradient of almost 0
    assert difference.median() == 0 < learned.norm()
