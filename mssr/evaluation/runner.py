"""`mssr eval`: benchmarks -> prompts -> responses -> verdicts -> results, with the engines of training.

Whatever ends it, the same command goes on: responses are kept part by part (`responses`), and everything
else follows from them anew. Prompts and an exported checkpoint lie in ``<out>/scratch`` while engines run.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from rich.progress import TimeRemainingColumn

from mssr.cluster import machine
from mssr.cluster.launch import launch
from mssr.config import Config
from mssr.data.cache import digest_of
from mssr.data.encoder import PromptEncoder
from mssr.errors import EXIT_OK, StopRequestedError, UserError
from mssr.evaluation import local_judge, registry, results
from mssr.evaluation.base import Benchmark
from mssr.evaluation.model import EvaluatedModel, engine_config, open_model
from mssr.evaluation.prompts import Question, prompt_data, write_prompts
from mssr.evaluation.responses import Response, ResponseFile
from mssr.evaluation.verdicts import VerdictBook
from mssr.models.loading import check_model_path, load_processor
from mssr.models.memory import slots
from mssr.rollout.seeds import request_seed
from mssr.runs.console import ProgressLine, captured_output
from mssr.runs.events import EventLog
from mssr.runs.manifest import package_versions
from mssr.runs.run_directory import hold_directory
from mssr.runs.signals import StopRequest
from mssr.types import Rollout, RolloutRequest, SamplingParams

SCRATCH = "scratch"
PARTS_PER_ENGINE = 4
"""A part is so many times what the engines decode at once: few waits for the longest, little to lose."""


@dataclass(frozen=True, slots=True)
class EvaluationRequest:
    """What the user asks for; see the options of ``mssr eval``."""

    model: str
    benchmarks: tuple[str, ...]
    data_dir: Path | None = None
    limit: int | None = None
    n: int = 1
    temperature: float | None = None
    """None: greedy for one response, else rollout.temperature. 0 is greedy."""
    judge: str | None = None
    reward: bool = False
    """Score own data with the config's reward, as training does."""
    out: Path | None = None
    config: str | None = None
    part_size: int | None = None
    """Responses that are generated, and kept, together."""
    overrides: tuple[str, ...] = ()

    def check(self) -> None:
        """Refuse options that cannot be meant."""
        for name, value in (("--limit", self.limit), ("--n", self.n), ("--part-size", self.part_size)):
            if value is not None and value < 1:
                raise UserError(f"{name} {value} must be at least 1")
        if self.temperature is not None and not 0 <= self.temperature < float("inf"):
            raise UserError(f"--temperature {self.temperature:g} must not be negative")
        if self.temperature == 0 and self.n > 1:
            raise UserError(f"--n {self.n} with --temperature 0 would give the same response {self.n} times")

    def sampling(self, config: Config) -> SamplingParams:
        greedy = self.temperature == 0 or (self.temperature is None and self.n == 1)
        temperature = self.temperature or config.rollout.temperature
        return SamplingParams(temperature, config.rollout.max_response_length, greedy)


def evaluate(request: EvaluationRequest) -> int:
    """Run an evaluation, or go on with one; returns the exit code.

    Raises:
        UserError: the input is wrong; before any engine starts wherever that can be known.
    """
    request.check()

    def note(line: str) -> None:
        print(f"mssr: {line}", flush=True)

    model = open_model(request.model, request.config, request.overrides, request.reward, note)
    check_model_path(model.config.model, model.config.rollout.tensor_parallel)
    benchmarks = _benchmarks(request, model.config)
    out = request.out or Path("evaluations") / model.label
    with hold_directory(out, "--out") as notes:
        for line in (f"evaluation directory {out}", *notes):
            note(line)
        with captured_output(out / "logs" / "driver.log") as terminal:
            try:
                code = _Evaluation(request, model, out).run(benchmarks, terminal)
            finally:
                shutil.rmtree(out / SCRATCH, ignore_errors=True)
    if code == EXIT_OK:
        print((out / results.TABLE).read_text(), end="")
        note(f"{out / results.PAGE} shows the items")
    return code


class EvaluationProgress(ProgressLine):
    """What the user sees: responses so far, of ``total`` in the whole evaluation, and their accuracy."""

    def __init__(self, stream: TextIO, mode: str, total: int) -> None:
        super().__init__(stream, mode, total, "{}/{} responses", TimeRemainingColumn())

    def update(self, done: int, counts: dict[str, tuple[int, int]]) -> None:
        """Show so many responses; ``counts`` has the right ones and all by benchmark."""
        parts = []
        if counts:
            right, count = map(sum, zip(*counts.values(), strict=True))
            parts.append(f"accuracy so far {right / count:.3f}")
        if len(counts) > 1:
            parts.append(" ".join(f"{name} {right / count:.3f}" for name, (right, count) in counts.items()))
        self.show(done, "  ".join(parts))


class _Evaluation:
    """One call of the command."""

    def __init__(self, request: EvaluationRequest, model: EvaluatedModel, out: Path) -> None:
        self.request, self.model, self.config, self.out = request, model, model.config, out
        self.params = request.sampling(model.config)
        self.scratch = out / SCRATCH
        self._generation_s = 0.0

    def run(self, benchmarks: Sequence[Benchmark], terminal: TextIO) -> int:
        start = time.monotonic()
        shutil.rmtree(self.scratch, ignore_errors=True)
        encoder = PromptEncoder(load_processor(self.config.model), self.config.data)
        loaded = [(b, b.load(self.request.data_dir, self.request.limit)) for b in benchmarks]
        questions, prompts = write_prompts(loaded, encoder, self.scratch / "prompts")
        responses = ResponseFile(self.out, self._decides(prompts))
        before = len(responses.found)
        total = self.request.n * sum(q.asked for q in questions)
        with contextlib.ExitStack() as stack:
            progress = EvaluationProgress(terminal, self.config.trainer.progress, total)
            stack.callback(progress.close)
            stop = stack.enter_context(StopRequest(progress.note, "stopping; responses so far are kept"))
            book = stack.enter_context(
                VerdictBook(
                    self.config,
                    questions,
                    self.request.reward,
                    encoder.response_prefix,
                    progress.announce,
                    self.out,
                )
            )
            events = EventLog(self.out, progress.announce, self.config.trainer.max_restarts)
            engines = partial(_engines, events, stop)
            judge = None
            if self.request.judge is not None:
                judge = local_judge.make(self.request.judge, self.config, self.out, self.scratch, engines)
            book.add(list(responses.found.values()))
            progress.update(len(responses.found), book.counts())
            with contextlib.suppress(StopRequestedError):
                self._answer(questions, responses, book, progress, engines)
            problem = None
            if judge is not None and not stop.requested:
                problem = book.judge(judge, self.request.n)
            if stop.exit_code is not None:
                return stop.exit_code
            if problem:
                progress.announce(f"judge: {problem}")
            timing = {
                "generation_s": self._generation_s,
                "wall_s": time.monotonic() - start,
                "responses": total,
                "generated_now": len(responses.found) - before,
                "tokens": sum(r.tokens for r in responses.found.values()),
            }
            book.write(self.out, self.request.n, self._meta(), timing)
            for line in book.notes():
                progress.announce(line)
        return EXIT_OK

    def _decides(self, prompts: str) -> dict[str, str]:
        """Everything that a response depends on."""
        model, rollout, data = self.config.model, self.config.rollout, self.config.data
        engine: list[Any] = [rollout.engine, rollout.engine_options, model.dtype, self.config.cluster.device]
        engine += [rollout.tensor_parallel]  # sums over devices round otherwise
        engine += [data.min_pixels, data.max_pixels, data.max_prompt_length]
        return {
            "model": self.model.identity,
            "prompts": prompts,
            "sampling": digest_of(asdict(self.params), self.config.seed, self.request.n),
            "engine": digest_of(engine),
            "versions": digest_of(package_versions()),
        }

    def _answer(
        self,
        questions: Sequence[Question],
        responses: ResponseFile,
        book: VerdictBook,
        progress: EvaluationProgress,
        engines: local_judge.Launch,
    ) -> None:
        """Have all responses that are missing generated.

        Raises:
            StopRequestedError: the user wants it to end; what is in the file stays.
        """
        wanted = [(q, k) for q in questions if q.asked for k in range(self.request.n)]
        missing = [(q, k) for q, k in wanted if q.key(k) not in responses.found]
        if not missing:
            return
        progress.note(f"{len(missing)} of {len(wanted)} responses to generate; starting engines")
        path = self.model.directory(self.scratch)
        data = prompt_data(self.config.data, self.scratch / "prompts")
        size = self._part_size()
        with engines(engine_config(self.config, path, data, self.out)) as generate:
            for first in range(0, len(missing), size):
                part = missing[first : first + size]
                requests = [
                    RolloutRequest(q.prompt_id, k, request_seed(self.config.seed, 0, q.prompt_id, k))
                    for q, k in part
                ]
                start = time.monotonic()
                rollouts = generate(requests, self.params)
                self._generation_s += time.monotonic() - start
                answers = [
                    Response(*q.key(k), r.text, len(r.response_token_ids), r.finish_reason)
                    for (q, k), r in zip(part, rollouts, strict=True)
                ]
                responses.append(answers)
                book.add(answers)
                progress.update(len(responses.found), book.counts())

    def _part_size(self) -> int:
        if self.request.part_size:
            return self.request.part_size
        smallest = min((gpu.total_bytes for gpu in machine.describe().gpus), default=0)
        return PARTS_PER_ENGINE * slots(self.config, smallest) * self.config.rollout.workers

    def _meta(self) -> dict[str, Any]:
        """What results.json says of how the responses came about."""
        data, rollout = self.config.data, self.config.rollout
        keys = "system_prompt instruction prompt_template chat_template min_pixels max_pixels".split()
        return {
            "model": self.model.name,
            "step": self.model.step,
            "config": {
                "n": self.request.n,
                "temperature": 0.0 if self.params.greedy else self.params.temperature,
                "seed": self.config.seed,
                "limit": self.request.limit,
                "judge": self.request.judge,
                "reward": self.config.reward.name if self.request.reward else None,
                "engine": rollout.engine,
                "dtype": self.config.model.dtype,
                "max_response_length": rollout.max_response_length,
                "max_prompt_length": data.max_prompt_length,
                **{key: getattr(data, key) for key in keys},
            },
            "versions": package_versions(),
        }


@contextlib.contextmanager
def _engines(events: EventLog, stop: StopRequest, config: Config) -> Iterator[local_judge.Generate]:
    """Engines that end with the context."""
    cluster = launch(config, events, lambda: stop.requested)

    def generate(requests: Sequence[RolloutRequest], params: SamplingParams) -> list[Rollout]:
        if stop.requested:
            raise StopRequestedError
        rollouts = cluster.generate(requests, params)
        events.progress()
        return rollouts

    try:
        stop.install()  # Ray has signal handlers of its own
        yield generate
    finally:
        cluster.shutdown()


def _benchmarks(request: EvaluationRequest, config: Config) -> list[Benchmark]:
    found: list[Benchmark] = []
    for name in request.benchmarks:
        benchmark = registry.get(name, config.reward if request.reward else None, config.data)
        if benchmark.name in (b.name for b in found):
            raise UserError(f"--benchmarks: two are called {benchmark.name}; evaluate one after the other")
        found.append(benchmark)
    if request.reward and not any(b.rewarded for b in found):
        raise UserError("--reward scores own data, and --benchmarks names none; leave it out")
    return found
