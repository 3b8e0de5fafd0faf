"""The workers of a run on a Ray cluster: placement, calls, recovery, shutdown."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

import ray

from mssr.cluster import preflight
from mssr.cluster.base import Cluster, Events, OnFinished, SaveHandle, join_log_probs, rss_gib
from mssr.cluster.faults import explained, is_lost, is_replaceable
from mssr.cluster.placement import Places, Seat, decide, find_nodes
from mssr.cluster.ray_calls import HEALTH, Calls, Failure, Worker, WorkerDiedError, WorkerHungError, stacks
from mssr.cluster.ray_generation import FEEDING, Generation
from mssr.cluster.ray_start import init_ray, worker_environment
from mssr.cluster.ray_workers import RayPolicyWorker, RayRolloutWorker
from mssr.cluster.shared_prompts import PromptShelf
from mssr.cluster.turns import Turns, Workers
from mssr.config import Config
from mssr.errors import TrainingError, WorkersLostError
from mssr.models.cost import home
from mssr.rollout.heartbeat import CALL, SAVE
from mssr.types import Rollout, RolloutRequest, SamplingParams, TokenLogProbs, TrainBatch

PLACEMENT_TIMEOUT_S = 60.0
"""For what others, as a run that ends now, are about to give back."""
PREPARING = "preparing"
"""Concurrency group of the method that encodes prompts beside whatever else an engine does."""
SAVING = "saving"
"""Concurrency group of the method that waits for a checkpoint."""


class RayCluster(Cluster):
    """Actor ranks and engines, each a Ray actor, in the places that `mssr.cluster.placement` finds.

    Prompts travel as ids and responses as tokens. Weights go from ranks to engines as
    `mssr.cluster.turns` says, without passing through the driver.

    Args:
        note: shows a line about how workers are placed.

    Raises:
        UserError: the cluster has not the resources that the config asks for, or its machines differ.
    """

    def __init__(
        self, config: Config, events: Events, stop: Callable[[], bool], note: Callable[[str], None]
    ) -> None:
        self._config, self._stop = config, stop
        self._report, self._record = events.restart, events.record
        self._calls = Calls(config.cluster.hang_timeout_s)
        # As much of an engine's prompts as it keeps itself.
        self._shelf = PromptShelf(config.data.image_cache_bytes * config.rollout.workers)
        self._ranks: list[Worker] = []
        self._engines: list[Worker] = []
        """In the order of their numbers, without those that have no place."""
        self._missing: list[int] = []
        """The numbers of these."""
        self._env = worker_environment(config)
        with contextlib.ExitStack() as leave:
            if not ray.is_initialized():
                each = config.rollout.tensor_parallel
                init_ray(config, processes=config.actor.num_ranks + config.rollout.workers * each)
                leave.callback(ray.shutdown)
            self._find_places(note, leave)
            self._turns = Turns(config, self._workers(), self._calls, self._device, self._colocated)
            leave.callback(lambda: _kill(self._ranks + self._engines))
            self._launch()
            self._leave = leave.pop_all()

    def generate(
        self,
        requests: Sequence[RolloutRequest],
        params: SamplingParams,
        on_finished: OnFinished | None = None,
        stoppable: bool = True,
    ) -> list[Rollout]:
        self._turns.of_engines()
        slots = self._slots
        stop = self._stop if stoppable else None
        generation = Generation(self._calls, requests, params, slots, on_finished, stop, self._shelf.add)
        while not generation.done:
            self._replace_engines(generation.run(self._engines))
        return generation.result()

    def prepare(self, prompt_ids: Sequence[str]) -> None:
        of_engine: list[list[str]] = [[] for _ in self._engines]
        for prompt_id in prompt_ids:
            of_engine[home(prompt_id) % len(self._engines)].append(prompt_id)
        for engine, own in zip(self._engines, of_engine, strict=True):
            engine.handle.prepare.options(concurrency_group=PREPARING).remote(own)

    @property
    def ranks_idle_in_rollout(self) -> bool:
        return self._device == "cuda" and not self._colocated

    def update(self, batch: TrainBatch, step: int) -> dict[str, float]:
        self._turns.of_ranks()
        metrics: dict[str, float] = self._call_ranks("update", self._work(batch), step)[0]
        self._shelf.drop(batch.prompt_ids)
        return metrics

    def log_probs(self, batch: TrainBatch, reference: bool = False) -> TokenLogProbs:
        self._turns.of_ranks()
        return join_log_probs(self._call_ranks("log_probs", self._work(batch), reference), batch)

    def _work(self, batch: TrainBatch) -> Any:
        """A batch, and what gets those of its prompts that are encoded; stored once for all ranks."""
        return ray.put((batch, self._shelf.fetcher(batch.prompt_ids)))

    def sync_weights(self, version: int) -> None:
        self._turns.of_ranks()
        self._take_back()
        self._turns.sync(version)

    def begin_save(self, directory: str) -> SaveHandle:
        if self._config.actor.offload == "optimizer":  # its states come back to the device, to be copied
            self._turns.of_ranks()
        self._call_ranks("begin_save", directory)
        refs = [r.handle.finish_save.options(concurrency_group=SAVING).remote() for r in self._ranks]
        return SaveHandle(
            done=lambda: not ray.wait(refs, num_returns=len(refs), timeout=0)[1],
            result=lambda: {k: v for sums in self._of_ranks(refs, SAVE) for k, v in sums.items()},
        )

    def load(self, directory: str) -> None:
        self._turns.of_ranks()
        self._call_ranks("load", directory)

    def restart(self) -> None:
        _kill(self._ranks)
        self._ranks = []
        timeout_s = self._config.cluster.replace_timeout_s
        if gone := self._places.wait(self._places.ranks, timeout_s, self._stop):
            raise TrainingError(
                f"{len(gone)} of {len(self._places.ranks)} actor ranks have lost their machine, and "
                f"{_not_free(gone, timeout_s)}; start the run again, and it goes on from its last checkpoint"
            )
        self._turns.of_ranks()
        self._start(ranks=True)

    def write_timeline(self, path: str) -> None:
        ray.timeline(path)

    def metrics(self) -> dict[str, float]:
        actors, driver = self._call_ranks("rss_gib"), rss_gib()
        found = [metrics for metrics in self._call_engines(self._engines, "metrics") if metrics]
        of_engines = {key: [metrics[key] for metrics in found] for key in (found[0] if found else ())}
        rollouts = of_engines.pop("memory/rollout_rss_gib", [0.0])
        gpus = sum(unit.needs.get("GPU", 0.0) for unit in self._places.units)
        return {
            "memory/driver_rss_gib": driver,
            "memory/actor_rss_gib": max(actors),
            "memory/rollout_rss_gib": max(rollouts),
            "memory/total_rss_gib": driver + sum(actors) + sum(rollouts),
            **({"perf/gpus": gpus} if gpus else {}),
            **{k: sum(v) if k == "perf/preemptions" else max(v) for k, v in of_engines.items()},
        }

    def shutdown(self) -> None:
        self._leave.close()

    def _workers(self) -> Workers:
        return Workers(
            ranks=lambda: self._ranks,
            engines=lambda: self._engines,
            call_ranks=self._call_ranks,
            call_engines=self._call_engines,
            of_ranks=self._of_ranks,
            replace=self._replace_engines,
        )

    def _find_places(self, note: Callable[[str], None], leave: contextlib.ExitStack) -> None:
        """Have Ray reserve what all workers need, on nodes that can run them."""
        config = self._config
        self._device = config.cluster.device
        if self._device == "auto":
            self._device = "cuda" if ray.cluster_resources().get("GPU", 0) else "cpu"
        nodes = find_nodes(self._device)
        found = preflight.survey(config, nodes)
        decision = decide(config, self._device, preflight.gpu_bytes(found.values()))
        note(str(decision))
        self._colocated = decision.colocated
        self._places = places = Places(config, self._device, self._colocated)
        leave.callback(places.release)
        places.reserve(nodes, decision)
        if places.wait([*places.engines, *places.ranks], PLACEMENT_TIMEOUT_S, self._stop):
            raise places.no_room(nodes, decision)
        places.sort()
        used = dict.fromkeys(unit.node for unit in places.units)
        preflight.check(config, self._device, [found[node] for node in used if node in found])

    def _launch(self) -> None:
        engines = range(self._config.rollout.workers)
        if self._colocated:
            # vLLM gives up if memory becomes free while it measures how much there is: ranks come later.
            self._start(engines=engines)
            self._turns.of_ranks()
            self._start(ranks=True)
        else:
            self._start(engines=engines, ranks=bool(self._places.ranks))

    def _start(self, engines: Sequence[int] = (), ranks: bool = False) -> None:
        """Make workers, and wait until they have loaded the base model."""
        made = [self._worker(RayRolloutWorker, f"engine {k}", k, self._places.engines[k]) for k in engines]
        self._engines = sorted(self._engines + made, key=lambda engine: engine.number)
        self._missing = [k for k in self._missing if k not in engines]
        options = self._device, self._colocated
        starting = [(engine, engine.handle.start.remote(*options)) for engine in made]
        if ranks:
            self._ranks = [
                self._worker(RayPolicyWorker, f"actor rank {k}", k, seat)
                for k, seat in enumerate(self._places.ranks)
            ]
            first = self._ranks[0]
            [address] = self._started([(first, first.handle.rendezvous.remote())])
            for rank in self._ranks:
                starting.append((rank, rank.handle.start.remote(rank.number, address, *options)))
        outcomes = self._started(starting)
        if engines:
            self._slots = outcomes[0]

    def _started(self, refs: list[tuple[Worker, Any]]) -> list[Any]:
        limit_s = self._config.cluster.start_timeout_s
        outcomes = self._calls.gather(refs, together=True, stop=self._stop, hang_timeout_s=limit_s)
        failures = [x for x in outcomes if isinstance(x, Failure)]
        for failure in failures:
            if not is_lost(failure):
                raise explained(failure)
        if failures:
            _kill([failure.worker for failure in failures])  # or they would be called, without an engine
            self._report("start_failed", str(failures[0]))
            raise WorkersLostError(f"{failures[0]}; see {self._config.run_dir / 'logs'}")
        return outcomes

    def _worker(self, cls: type, name: str, number: int, seat: Seat) -> Worker:
        log = f"{'rollout' if cls is RayRolloutWorker else 'actor'}-{number}.log"
        groups = dict.fromkeys((HEALTH, SAVING, FEEDING, PREPARING), 1)
        actor = ray.remote(concurrency_groups=groups)(cls).options(
            scheduling_strategy=seat.unit.strategy, num_cpus=seat.cpus, num_gpus=0
        )
        env = self._env | ({"CUDA_VISIBLE_DEVICES": ",".join(seat.gpus)} if seat.gpus else {})
        log_file = os.path.abspath(self._config.run_dir / "logs" / log)
        return Worker(name, actor.remote(self._config, log_file, env, os.getcwd()), number)

    def _call_engines(self, engines: Sequence[Worker], method: str, *args: Any) -> list[Any]:
        """The results of a call of some engines. Those that fail are replaced, and have None."""
        results = self._calls.gather([(e, getattr(e.handle, method).remote(*args)) for e in engines])
        self._replace_engines([x for x in results if isinstance(x, Failure)])
        return [None if isinstance(x, Failure) else x for x in results]

    def _replace_engines(self, failures: Sequence[Failure]) -> None:
        """New engines, with the weights that the others have, where that helps and there is a place for them.

        Raises:
            TrainingError: there is no engine any more. What an engine raised, if a new one would do the same.
        """
        if not failures:
            return
        for failure in failures:
            if not is_replaceable(failure):
                raise explained(failure)
        hung = [f.worker for f in failures if isinstance(f.error, WorkerHungError)]
        where = self._write_stacks(hung) if hung else ""
        _kill([failure.worker for failure in failures])
        told = "; ".join(map(str, failures))
        done = "it is replaced" if len(failures) == 1 else "they are replaced"
        self._report("engine_hung" if hung else "engine_died", f"{told}{where}; {done}")
        numbers, timeout_s = [f.worker.number for f in failures], self._config.cluster.replace_timeout_s
        self._engines = [engine for engine in self._engines if engine.number not in numbers]
        self._missing += numbers  # until there are new ones, whatever comes between
        if made := self._make_engines(numbers, timeout_s):
            self._turns.welcome(made)
        if gone := [k for k in numbers if k in self._missing]:
            names = f"engine {', '.join(map(str, gone))}"
            lost = f"{names}: {_not_free([self._places.engines[k] for k in gone], timeout_s)}"
            self._check_engines(f"{lost}, and ")
            self._record("engine_lost", f"{lost}; the run goes on with {len(self._engines)} engines")

    def _make_engines(self, numbers: Sequence[int], timeout_s: float) -> list[Worker]:
        """New engines, those for which there is a place by then.

        Raises:
            WorkersLostError: a rank beside one of them is gone, too.
        """
        if not numbers:
            return []
        self._turns.make_room()  # now, so that nobody waits for a place where ranks are lost with it
        seats = {self._places.engines[k]: k for k in numbers}
        gone = self._places.wait(seats, timeout_s, self._stop)
        if new := [k for seat, k in seats.items() if seat not in gone]:
            self._start(engines=new)
        return [engine for engine in self._engines if engine.number in new]

    def _take_back(self) -> None:
        """Engines that are missing, where there is a place for them again."""
        ready = [k for k in self._missing if self._places.engines[k].unit.has_place]
        if back := self._make_engines(ready, PLACEMENT_TIMEOUT_S):
            self._record("engine_back", f"there is a place for {', '.join(e.name for e in back)} again")
            if self._colocated:
                self._turns.welcome(back)
        self._check_engines()

    def _check_engines(self, why: str = "") -> None:
        if not self._engines:
            raise TrainingError(f"{why}no engine is left; start the run again when machines are back")

    def _call_ranks(self, method: str, *args: Any) -> list[Any]:
        return self._of_ranks([getattr(r.handle, method).remote(*args) for r in self._ranks])

    def _of_ranks(self, refs: list[Any], task: str = CALL) -> list[Any]:
        """The results of a call of all ranks, which work at a task of `mssr.rollout.heartbeat`.

        Raises:
            WorkersLostError: a rank died or hung, or they lost touch with one another.
        """
        results = self._calls.gather(list(zip(self._ranks, refs, strict=True)), together=True, task=task)
        failures = [x for x in results if isinstance(x, Failure)]
        if not failures:
            return results
        lost = [f for f in failures if is_lost(f)]
        if not lost:
            raise explained(failures[0])
        # Those that died or hang are the cause of what the others say.
        died = [f for f in lost if isinstance(f.error, WorkerDiedError)]
        hung = [f for f in lost if isinstance(f.error, WorkerHungError)]
        detail = "; ".join(map(str, died or hung or lost)) + ("" if died else self._write_stacks(self._ranks))
        _kill(self._ranks)
        self._report("actor_rank_died" if died else "collective_failed", f"{detail}; all ranks are restarted")
        raise WorkersLostError(f"{detail}; see {self._config.run_dir / 'logs'}")

    def _write_stacks(self, workers: Sequence[Worker]) -> str:
        directory = self._config.run_dir / "stacks"
        directory.mkdir(exist_ok=True)
        path = directory / f"{datetime.now():%Y%m%d-%H%M%S}.txt"
        path.write_text(stacks(workers))
        return f" (stacks in {path})"


def _kill(workers: Sequence[Worker]) -> None:
    """At once; a process that is stopped and does not hear of it, Ray ends after five seconds."""
    for worker in workers:
        ray.kill(worker.handle)


def _not_free(seats: Sequence[Seat], timeout_s: float) -> str:
    """What some seats needed, all together, and had not in time."""
    units = {seat.unit: None for seat in seats}
    kind = "GPU" if any("GPU" in unit.needs for unit in units) else "CPU"
    needed = sum(unit.needs[kind] for unit in units)
    return f"{needed:.0f} {kind} did not become free within cluster.replace_timeout_s={timeout_s:g}"
