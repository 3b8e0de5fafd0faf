"""The worker classes as Ray actors.

Importing this imports no torch: an actor first sets its thread counts and log file, which libraries
read when they are imported, and builds the real worker after that.
"""

from __future__ import annotations

import gc
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mssr.cluster.base import rss_gib
from mssr.cluster.shared_prompts import PromptFetcher, PromptOutbox, SharedPrompts
from mssr.config import Config
from mssr.models.loading import importing
from mssr.rollout import heartbeat
from mssr.rollout.queue import Finished, Numbered, RequestQueue
from mssr.types import PackedRollouts, RankLogProbs, SamplingParams, TrainBatch

if TYPE_CHECKING:
    from mssr.actor.worker import PolicyWorker
    from mssr.rollout.checksums import Loaded
    from mssr.rollout.engine import RolloutEngine

logger = logging.getLogger(__name__)

HANDFUL = 16
"""One in so many of an engine's slots: the rollouts that it returns together."""
MAX_DELAY_S = 5.0
"""Longest that a rollout waits for others to be returned with."""
PIECE = 8
"""Prompts that are prepared in one go; so long may an engine wait that gets requests meanwhile."""


class RayWorker:
    """What both kinds of workers share: a log file of their own, thread counts, signs of life.

    Args:
        env: environment variables, among them which GPUs are its own.
        directory: where the run was started, from which relative paths go out.
    """

    threads_option: str
    """Of ``config.cluster``."""

    def __init__(self, config: Config, log_file: str, env: Mapping[str, str], directory: str) -> None:
        self._config = config
        os.chdir(directory)
        os.environ.update(env)
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            os.environ[name] = str(getattr(config.cluster, self.threads_option) or 1)
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        # Everything that this process and its libraries print goes to the file.
        os.makedirs(os.path.dirname(log_file), exist_ok=True)
        file = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.close(file)

    def rss_gib(self) -> float:
        return rss_gib()

    def silent_s(self, task: str) -> float:
        """See `mssr.rollout.heartbeat`. Called in a thread of its own, as is `stacks`."""
        return heartbeat.silent_s(task)

    def stacks(self) -> str:
        return heartbeat.stacks()


@dataclass(frozen=True)
class Sent:
    """What a rank has to say after it sent weights."""

    source: Any = None
    """Where engines find them, if they are not on their way already."""
    checksums: dict[str, int] = field(default_factory=dict)


class RayPolicyWorker(RayWorker):
    """An actor rank. `rendezvous` on rank 0, then `start` on all, then the methods of `PolicyWorker`."""

    threads_option = "threads_per_actor"
    _worker: PolicyWorker

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._kept: dict[str, Any] = {}
        """By the transfers of weights, from one to the next."""

    def rendezvous(self) -> str:
        """Where the ranks meet: an address of this machine with a free port."""
        import ray

        host = ray.util.get_node_ip_address()
        with socket.socket() as s:
            s.bind(("", 0))
            return f"tcp://{host}:{s.getsockname()[1]}"

    def start(self, rank: int, init_method: str, device: str, colocated: bool) -> None:
        # Memory grows in place, so that what one pass freed serves the next of another size; not where an
        # engine maps it, which takes long then and a system call (pidfd_getfd) that containers may forbid.
        # torch reads this when CUDA is first used; what the user set stays.
        allocator = {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"}
        if device == "cuda" and not colocated and not allocator & os.environ.keys():
            os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
        with importing():
            from mssr.actor.worker import PolicyWorker

        self._worker = PolicyWorker(self._config, rank, init_method, device)

    def update(self, work: tuple[TrainBatch, PromptFetcher], step: int) -> dict[str, float]:
        """``work``: a batch, and what gets those of its prompts that are encoded already."""
        heartbeat.beat()
        return self._worker.update(work[0], step, work[1])

    def log_probs(self, work: tuple[TrainBatch, PromptFetcher], reference: bool) -> RankLogProbs:
        heartbeat.beat()
        return self._worker.log_probs(work[0], reference, work[1])

    def make_room(self) -> None:
        """Give back device memory that is not in use."""
        import torch

        if torch.cuda.is_available():
            gc.collect()
            torch.cuda.ipc_collect()
            torch.cuda.empty_cache()

    def open_door(self, transport: str) -> tuple[str, Any]:
        """Where engines may come for the next `send_weights`: what this rank's device is called, and the
        address of its door."""
        import ray

        from mssr.rollout.transports import Door, device_name

        host = "127.0.0.1" if transport == "ipc" else ray.util.get_node_ip_address()
        # Who waits for an engine that hangs is to outlive it.
        self._door = Door(host, self._config.cluster.hang_timeout_s / 2)
        number = self._worker.rank % self._config.rollout.tensor_parallel
        return device_name(self._worker.device, number), self._door.address

    def send_weights(self, transport: str, loads: list[Any], check: bool) -> Sent:
        """Gather the weights with the other ranks, and send them.

        Args:
            loads: references to the calls in which this rank's engines wait for them.
            check: take checksums.
        """
        import ray

        from mssr.rollout.transports import BroadcastSender, IpcSender, Sender, StoreSender
        from mssr.rollout.weights import Stored

        def ended() -> bool:
            return bool(ray.wait(loads, timeout=0, fetch_local=False)[0])

        heartbeat.beat()
        sender: Sender | None = None
        source = None
        if transport == "object_store":
            if self._worker.rank == 0:
                sender = StoreSender(ray.put, self._kept)
                source = Stored(sender.buckets, ray.get)
        elif not loads:
            self._door.close()
        elif transport == "ipc":
            sender = IpcSender(self._door, 1, ended)
        else:
            receivers = len(loads) * self._config.rollout.tensor_parallel
            sender = BroadcastSender(self._door, receivers, ended, self._kept)
        checksums = self._worker.sender.send(sender, check)
        self.make_room()
        return Sent(source, checksums)

    def begin_save(self, directory: str) -> None:
        heartbeat.beat()
        self._worker.checkpoint.begin(directory)

    def finish_save(self) -> dict[str, str]:
        """Called in a thread of its own."""
        return self._worker.checkpoint.result()

    def load(self, directory: str) -> None:
        heartbeat.beat()
        self._worker.checkpoint.load(directory)


@dataclass(frozen=True)
class FinishedPart:
    """Rollouts of an engine that have finished, at least one, by the numbers of their requests."""

    numbers: list[int]
    rollouts: PackedRollouts
    prompts: Sequence[SharedPrompts] = ()
    """Of those that the engine had to encode, for these rollouts or earlier ones."""


class RayRolloutWorker(RayWorker):
    """An engine. `start`, then the methods of `RolloutEngine`."""

    threads_option = "threads_per_rollout"
    _engine: RolloutEngine

    def __init__(self, config: Config, log_file: str, env: Mapping[str, str], directory: str) -> None:
        super().__init__(config, log_file, env, directory)
        self._lock = threading.Lock()
        self._queues: dict[int, RequestQueue] = {}

    def start(self, device: str, colocated: bool) -> int:
        """Returns how many sequences the engine runs at a time."""
        with importing():
            import torch

        torch.set_num_threads(self._config.cluster.threads_per_rollout)
        from mssr.rollout.engine import make_engine

        self._engine = make_engine(self._config, device, colocated)
        return self._engine.slots

    def generate(
        self, call: int, requests: Sequence[Numbered], params: SamplingParams
    ) -> Iterator[FinishedPart]:
        """Answer these requests, and those that `feed` brings until it ends the call.

        Rollouts that end are handed over by the handful, which costs the driver less than one by one.
        """
        queue = self._queue(call)
        queue.put(requests)
        handful = max(1, self._engine.slots // HANDFUL)
        outbox = PromptOutbox(self._config.actor.num_ranks)
        ended: Finished = []
        returned, since = 0, time.monotonic()
        for part in self._engine.generate(queue, params):
            heartbeat.beat()
            ended += part
            idle = queue.taken == returned + len(ended)
            late = time.monotonic() - since > MAX_DELAY_S
            if ended and (idle or late or len(ended) >= handful):
                prompts = self._engine.prompts.take_new(rollout.prompt_id for _, rollout in ended)
                numbers, rollouts = zip(*ended, strict=True)
                shared = outbox.share(prompts, everything=idle)
                yield FinishedPart(list(numbers), PackedRollouts.of(rollouts), shared)
                returned, since = returned + len(ended), time.monotonic()
                ended = []
        with self._lock:
            del self._queues[call]

    def feed(self, call: int, requests: Sequence[Numbered] | None) -> None:
        """Further requests for a call of `generate`, or None: no more will come. Called in a thread of its
        own, perhaps before that call has begun."""
        queue = self._queue(call)
        if requests is None:
            queue.close()
        else:
            queue.put(requests)

    def _queue(self, call: int) -> RequestQueue:
        with self._lock:
            return self._queues.setdefault(call, RequestQueue(open=True))

    def prepare(self, prompt_ids: Sequence[str]) -> None:
        """Encode prompts that `generate` is likely to get next. Called in a thread of its own, and nobody
        asks for the result: what fails here fails again, and is told, when the engine generates."""
        if sys.platform == "linux":  # elsewhere a thread has no priority of its own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        try:
            for start in range(0, len(prompt_ids), PIECE):
                self._engine.prompts.get(prompt_ids[start : start + PIECE])
        except Exception:
            logger.warning("prompts could not be prepared", exc_info=True)

    def metrics(self) -> dict[str, float]:
        """See `RolloutEngine.metrics`; and the process's resident memory, GiB."""
        heartbeat.beat()
        return {"memory/rollout_rss_gib": rss_gib()} | self._engine.metrics()

    def load_weights(self, source: Any, version: int, check: bool) -> Sequence[Loaded]:
        """See `RolloutEngine.load_weights`."""
        heartbeat.beat()
        return self._engine.load_weights(source, version, check)

    def sleep(self) -> None:
        heartbeat.beat()
        self._engine.sleep()

    def wake(self, part: str) -> None:
        heartbeat.beat()
        self._engine.wake(part)
