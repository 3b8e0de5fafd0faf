"""What of vLLM runs on GPUs only, against recorded calls and the signatures of the installed vLLM."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import itertools
import json
import os
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mssr.cluster import local
from mssr.cluster.ray_workers import RayRolloutWorker
from mssr.config import Config, ModelConfig
from mssr.errors import EngineError, UserError
from mssr.models.families import FAMILIES
from mssr.models.loading import check_model_path
from mssr.rollout import vllm_engine
from mssr.rollout.checksums import Loaded
from mssr.rollout.encoding import AHEAD, PIECE, EncodingAhead
from mssr.rollout.engine_process import EngineProcess
from mssr.rollout.queue import RequestQueue
from mssr.rollout.vllm_engine import VllmEngine, vllm_options
from mssr.rollout.weights import InMemory
from mssr.runs.config import load_config
from mssr.types import RolloutRequest, SamplingParams
from tests.conftest import Workspace

pytestmark = pytest.mark.unit
PARAMS = SamplingParams(temperature=1.0, max_tokens=2)


def vllm_class(module: str, name: str) -> dict[str, ast.FunctionDef | None]:
    """Fields and methods of a class of vLLM, which is read and not imported: it would claim this process."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("vLLM is not installed")
    source = Path(spec.submodule_search_locations[0], *module.split(".")).with_suffix(".py").read_text()
    [found] = [n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == name]
    fields = {n.target.id: None for n in found.body if isinstance(n, ast.AnnAssign)}  # type: ignore[union-attr]
    return fields | {n.name: n for n in found.body if isinstance(n, ast.FunctionDef)}


class FakeVllm:
    """In place of the module and of ``LLM.llm_engine``: records calls in order, and answers a request two
    steps after it came."""

    __version__ = "0.32.0"
    sampling_params = types.SimpleNamespace(RequestOutputKind=types.SimpleNamespace(FINAL_ONLY=2))

    def __init__(self, workspace: Workspace) -> None:
        from transformers import AutoConfig

        self.calls: list[tuple[Any, ...]] = []
        self.options: dict[str, Any] = {}
        self.fails: dict[str, Exception] = {}
        self.prefix_cache_resets = True
        self.SamplingParams = types.SimpleNamespace
        hf_config = AutoConfig.from_pretrained(workspace.path / "model")
        self.model_config = types.SimpleNamespace(hf_config=hf_config)
        self.vllm_config = types.SimpleNamespace(scheduler_config=types.SimpleNamespace(max_num_seqs=1024))
        blocks = types.SimpleNamespace(usage=0.0)
        scheduler = types.SimpleNamespace(kv_cache_manager=blocks, _preempt_request=lambda *a, **k: None)
        core = types.SimpleNamespace(scheduler=scheduler, model_executor=types.SimpleNamespace())
        self.engine_core = types.SimpleNamespace(engine_core=core)
        self.scheduler = scheduler
        self.running: dict[str, int] = {}

    def LLM(self, **options: Any) -> Any:
        self.options = options
        self._called("LLM")
        return types.SimpleNamespace(llm_engine=self)

    def add_request(self, request_id: str, prompt: Any, params: Any) -> None:
        self._called("add_request", prompt)
        self.running[request_id] = 2

    def step(self) -> list[Any]:
        self._called("step", len(self.running))
        self.running = {name: left - 1 for name, left in self.running.items()}
        ended = [name for name, left in self.running.items() if left == 0]
        for name in ended:
            del self.running[name]
        return [self._output(name) for name in ended]

    def collective_rpc(self, method: str, args: Any = ()) -> list[Any]:
        self._called(method, *args)
        return [Loaded("")] if method == "load_from" else [2**30, 3 * 2**30]

    def reset_prefix_cache(self) -> bool:
        self._called("reset_prefix_cache")
        return self.prefix_cache_resets

    def reset_encoder_cache(self) -> None:
        self._called("reset_encoder_cache")

    def sleep(self, **options: Any) -> None:
        self._called("sleep", options)

    def wake_up(self, tags: list[str]) -> None:
        self._called("wake_up", tags)

    def _called(self, name: str, *details: Any) -> None:
        self.calls.append((name, *details))
        if name in self.fails:
            raise self.fails[name]

    @staticmethod
    def _output(name: str) -> Any:
        log_probs = types.SimpleNamespace(start_indices=[0], token_ids=[7], logprobs=[-1.0])
        completion = types.SimpleNamespace(token_ids=[7], logprobs=log_probs, finish_reason="stop")
        return types.SimpleNamespace(
            request_id=name, finished=True, outputs=[completion], prompt_token_ids=[1]
        )


@pytest.fixture
def fake(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeVllm]:
    """Also restores the environment and what the engine replaces in torch."""
    fake, before = FakeVllm(workspace), dict(os.environ)
    workers = ["v1.worker.cpu_worker", "v1.worker.gpu_worker"]
    for part in ("", *(f".{name}" for name in ("entrypoints.llm", "v1.engine.core", *workers))):
        monkeypatch.setitem(__import__("sys").modules, f"vllm{part}", fake)
    monkeypatch.setattr(vllm_engine, "_engine_input", lambda prompt, merge_size, dtype: prompt)
    monkeypatch.setattr(torch, "set_num_threads", torch.set_num_threads)
    yield fake
    torch._dynamo.config.disable = False
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


def config_of(workspace: Workspace, *overrides: str) -> Config:
    return load_config(workspace.config, list(overrides))


def asked(count: int) -> RequestQueue:
    return RequestQueue(enumerate(RolloutRequest(f"t{i % 8}", i // 8, seed=i) for i in range(count)))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("colocated", [False, True])
def test_every_argument_exists_in_vllm(workspace: Workspace, device: str, colocated: bool) -> None:
    options = vllm_options(config_of(workspace, "rollout.tensor_parallel=2"), device, colocated)
    assert not options.keys() - vllm_class("engine.arg_utils", "EngineArgs").keys()


def test_what_is_called_of_vllm_exists_and_takes_these_arguments() -> None:
    engine = vllm_class("v1.engine.llm_engine", "LLMEngine")
    wanted = {"sleep": ["level", "mode"], "wake_up": ["tags"], "collective_rpc": ["method", "args"]}
    wanted |= {"add_request": ["request_id", "prompt", "params"], "step": [], "reset_encoder_cache": []}
    for name, arguments in wanted.items():
        method = engine[name]
        assert method is not None and set(arguments) <= {a.arg for a in method.args.args}, name
    assert (reset := engine["reset_prefix_cache"]) and ast.unparse(reset.returns or ast.Constant(0)) == "bool"
    assert "_preempt_request" in vllm_class("v1.core.sched.scheduler", "Scheduler")
    assert "usage" in vllm_class("v1.core.kv_cache_manager", "KVCacheManager")
    assert "proc" in vllm_class("v1.executor.multiproc_executor", "WorkerProcHandle")
    assert "engine_core" in ast.unparse(vllm_class("v1.engine.core_client", "InprocClient")["__init__"])  # type: ignore[arg-type]
    ours = {name for name in vars(EngineProcess) if not name.startswith("__")}
    assert not ours & vllm_class("v1.worker.gpu_worker", "Worker").keys()  # vLLM would refuse to start


def test_options_reach_vllm(workspace: Workspace) -> None:
    alone = vllm_options(config_of(workspace), "cuda", colocated=False)
    assert alone["max_num_seqs"] is None and alone["max_num_batched_tokens"] is None  # vLLM knows the GPU
    assert (alone["gpu_memory_utilization"], alone["enable_sleep_mode"]) == (0.9, False)
    assert alone["dtype"] == "bfloat16" and alone["hf_overrides"] == {"head_dtype": "float32"}
    assert "tensor_parallel_size" not in alone and "enable_chunked_prefill" not in alone
    shared = vllm_options(config_of(workspace), "cuda", colocated=True)
    assert (shared["gpu_memory_utilization"], shared["enable_sleep_mode"]) == (0.65, True)
    overrides = ["tensor_parallel=2", "max_num_seqs=7", "max_num_batched_tokens=512"]
    overrides += ["gpu_memory_utilization=0.5", "engine_options={hf_overrides: {a: 1}, block_size: 32}"]
    options = vllm_options(config_of(workspace, *(f"rollout.{x}" for x in overrides)), "cuda", True)
    assert (options["max_num_seqs"], options["max_num_batched_tokens"]) == (7, 512)
    assert (options["gpu_memory_utilization"], options["block_size"]) == (0.5, 32)
    assert options["hf_overrides"] == {"head_dtype": "float32", "a": 1}
    assert (options["tensor_parallel_size"], options["distributed_executor_backend"]) == (2, "mp")
    assert options["mm_encoder_tp_mode"] == "data"
    on_cpu = vllm_options(config_of(workspace), "cpu", colocated=True)
    assert (on_cpu["max_num_seqs"], on_cpu["max_num_batched_tokens"]) == (256, 16384)
    assert "hf_overrides" not in on_cpu and "enable_sleep_mode" not in on_cpu


def test_tensor_parallel_is_refused_where_it_cannot_be(workspace: Workspace) -> None:
    for overrides, words in (
        (["rollout.engine=hf"], "read by nothing with rollout.engine=hf"),
        (["cluster.launcher=local", "actor.num_ranks=1"], "set rollout.tensor_parallel=1"),
    ):
        with pytest.raises(UserError, match=words):
            config_of(workspace, "rollout.tensor_parallel=2", *overrides)
    model = config_of(workspace).model
    for devices in (1, 2, 4):  # of 4 heads, and 2 of keys and values
        check_model_path(model, devices)
    with pytest.raises(UserError, match=r"rollout\.tensor_parallel=3 does not divide num_attention_heads=4"):
        check_model_path(model, 3)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_devices_share_of_each_family_must_be_divisible(model_type: str, tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    names = FAMILIES[model_type].shared_out
    for odd in (None, *names):
        text = {"hidden_size": 8} | dict.fromkeys(names, 8) | ({odd: 3} if odd else {})
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "text_config": text}))
        with pytest.raises(UserError, match=f"does not divide {odd}=3") if odd else contextlib.nullcontext():
            check_model_path(ModelConfig(path=str(tmp_path)), 4)


def test_the_allocator_is_set_where_memory_is_not_shared(
    workspace: Workspace, fake: FakeVllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    for device, colocated, overrides, user, expected in (
        ("cuda", False, [], None, ("expandable_segments:True", None)),
        ("cuda", False, [], "max_split_size_mb:512", (None, "max_split_size_mb:512")),
        ("cuda", True, [], None, (None, None)),
        ("cuda", False, ["rollout.tensor_parallel=2"], None, (None, None)),
        ("cpu", False, [], None, (None, None)),
    ):
        for name in names:
            monkeypatch.delenv(name, raising=False)
        if user:
            monkeypatch.setenv(names[1], user)
        VllmEngine(config_of(workspace, *overrides), device, colocated)
        assert tuple(map(os.environ.get, names)) == expected


def test_the_threads_of_an_engine_are_shared_by_its_processes(workspace: Workspace, fake: FakeVllm) -> None:
    VllmEngine(
        config_of(workspace, "rollout.tensor_parallel=2", "cluster.threads_per_rollout=8"), "cuda", False
    )
    assert os.environ["OMP_NUM_THREADS"] == "4"
    assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"
    assert ("end_with_parent",) in fake.calls


def test_an_engine_sleeps_and_wakes_around_new_weights(workspace: Workspace, fake: FakeVllm) -> None:
    engine = VllmEngine(config_of(workspace), "cuda", colocated=True)
    source = InMemory({})
    engine.sleep()
    engine.wake("weights")
    engine.load_weights(source, 3)
    engine.wake("kv_cache")
    [part] = [part for part in engine.generate(asked(1), PARAMS) if part]
    assert part[0][1].policy_version == 3
    assert [call for call in fake.calls if call[0] != "add_request"] == [
        ("LLM",),
        ("sleep", {"level": 2, "mode": "abort"}),
        ("wake_up", ["weights"]),
        ("load_from", source, False),
        ("reset_prefix_cache",),
        ("reset_encoder_cache",),
        ("wake_up", ["kv_cache"]),
        ("step", 1),
        ("step", 1),
    ]


def test_a_worker_tells_its_engine_that_it_shares_its_device(workspace: Workspace, fake: FakeVllm) -> None:
    worker = RayRolloutWorker.__new__(RayRolloutWorker)
    worker._config = config_of(workspace)
    assert worker.start("cuda", colocated=True) == 1024
    assert fake.options["enable_sleep_mode"] is True


def test_in_one_process_the_engine_leaves_memory_to_the_rank(
    workspace: Workspace, fake: FakeVllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "PolicyWorker", lambda *args, **options: None)
    monkeypatch.setattr(local, "resolve_device", lambda name: "cuda")
    local.LocalCluster(config_of(workspace, "cluster.launcher=local", "actor.num_ranks=1"), lambda: False)
    assert fake.options["gpu_memory_utilization"] == 0.65


@pytest.mark.parametrize(("device", "colocated"), [("cuda", False), ("cpu", True)])
def test_an_engine_with_memory_of_its_own_never_sleeps(
    workspace: Workspace, fake: FakeVllm, device: str, colocated: bool
) -> None:
    engine = VllmEngine(config_of(workspace), device, colocated)
    engine.sleep()
    engine.wake("weights")
    engine.wake("kv_cache")
    assert fake.calls == [("LLM",)]


def test_what_fails_in_vllm_is_an_engine_error(workspace: Workspace, fake: FakeVllm) -> None:
    engine = VllmEngine(config_of(workspace), "cuda", colocated=True)
    fake.prefix_cache_resets = False
    with pytest.raises(EngineError, match="keys and values of the weights before are still in use"):
        engine.load_weights(InMemory({}), 1)
    fake.fails = {
        "step": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
        "wake_up": RuntimeError("CUDA error: an illegal memory access\nCompile with `TORCH_USE_CUDA_DSA`"),
    }
    with pytest.raises(EngineError, match=r"out of memory.*lower rollout\.gpu_memory_utilization") as error:
        list(engine.generate(asked(1), PARAMS))
    assert "\n" not in str(error.value)
    with pytest.raises(EngineError, match=r"an illegal memory access$"):
        engine.wake("weights")


@pytest.mark.parametrize("noticed", [True, False])
def test_a_process_that_died_is_told(workspace: Workspace, fake: FakeVllm, noticed: bool) -> None:
    """vLLM says "cancelled", "Executor failed." or another thing: that depends on time."""
    engine = VllmEngine(config_of(workspace, "rollout.tensor_parallel=2"), "cpu")
    alive = [True, True]
    processes = [types.SimpleNamespace(is_alive=lambda k=k: alive[k]) for k in range(2)]
    workers = [types.SimpleNamespace(proc=process) for process in processes]
    executor = types.SimpleNamespace(workers=workers, is_failed=False)
    fake.engine_core.engine_core.model_executor = executor
    fake.fails["load_from"] = RuntimeError("Worker failed with error 'heads'")
    with pytest.raises(EngineError, match="heads"):
        engine.load_weights(InMemory({}), 1)
    alive[1], executor.is_failed = noticed, noticed
    with pytest.raises(EngineError, match="one of the engine's processes has died"):
        engine.load_weights(InMemory({}), 1)


def test_what_vllm_refuses_at_its_start_is_one_line(workspace: Workspace, fake: FakeVllm) -> None:
    said = "1 validation error for VllmConfig\n  Value error, heads\n    For further information visit x"
    for error, words in (
        (ValueError(said), "vLLM does not start: Value error, heads$"),
        (torch.OutOfMemoryError("CUDA out of memory."), "lower rollout.gpu_memory_utilization"),
    ):
        fake.fails = {"LLM": error}
        with pytest.raises(UserError, match=words):
            VllmEngine(config_of(workspace), "cuda", colocated=False)


def test_preemptions_use_of_the_cache_and_memory_are_counted_since_the_last_call(
    workspace: Workspace, fake: FakeVllm
) -> None:
    engine = VllmEngine(config_of(workspace), "cuda", colocated=False)
    for usage in (0.75, 0.5):
        fake.scheduler.kv_cache_manager.usage = usage
        fake.scheduler._preempt_request("request", 0.0, drop_stale_output=True)
        list(engine.generate(asked(2), PARAMS))
    assert engine.metrics() == {
        "perf/preemptions": 2.0,
        "perf/kv_cache_usage": 0.75,
        "memory/rollout_gpu_gib": 3.0,
    }
    found = engine.metrics()
    assert (found["perf/preemptions"], found["perf/kv_cache_usage"]) == (0.0, 0.0)


def test_a_gpu_begins_before_all_prompts_are_encoded(
    workspace: Workspace, fake: FakeVllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Encoding waits for the second step here: an engine that waited for it would never take the first."""
    engine = VllmEngine(config_of(workspace), "cuda", colocated=False)
    stepped, get = threading.Event(), engine.prompts.get
    first = itertools.count()

    def slow(prompt_ids: Any) -> Any:
        assert next(first) == 0 or stepped.wait(60)
        return get(prompt_ids)

    monkeypatch.setattr(engine.prompts, "get", slow)
    found = []
    for part in engine.generate(asked(40), PARAMS):
        stepped.set()
        found += part
    assert sorted(number for number, _ in found) == list(range(40))
    assert next(call for call in fake.calls if call[0] == "step") == ("step", PIECE)


def test_on_cpu_all_prompts_are_in_the_engine_before_it_begins(workspace: Workspace, fake: FakeVllm) -> None:
    """What is computed together decides how it is rounded; it must not depend on time."""
    engine = VllmEngine(config_of(workspace), "cpu")
    assert len([number for part in engine.generate(asked(40), PARAMS) for number, _ in part]) == 40
    assert [call for call in fake.calls if call[0] == "step"] == [("step", 40)] * 2


def test_prompts_are_encoded_in_order_and_not_too_far_ahead() -> None:
    begun: list[str] = []
    go = threading.Semaphore(0)

    def encode(prompt_ids: Any) -> list[str]:
        begun.extend(prompt_ids)
        assert go.acquire(timeout=60)
        return [i.upper() for i in prompt_ids]

    numbered = [(k, RolloutRequest(f"p{k}", 0, seed=k)) for k in range(10 * AHEAD * PIECE)]
    with contextlib.closing(EncodingAhead(encode, 1)) as ahead:
        ahead.put(numbered)
        assert ahead.take(wait=False) == []
        go.release()
        taken = ahead.take(wait=True)
        assert len(ahead._pieces) == AHEAD  # the pieces after those
        go.release(1000)
        while ahead:
            taken += ahead.take(wait=True)
    assert [number for (number, _), _ in taken] == list(range(len(numbered)))
    assert [text for _, text in taken] == [i.upper() for i in begun]


@pytest.mark.parametrize("threads", [0, 2])
def test_a_prompt_that_cannot_be_encoded_is_told(threads: int) -> None:
    def encode(prompt_ids: Any) -> list[str]:
        raise UserError("image 0 cannot be read")

    ahead = EncodingAhead(encode, threads)
    with pytest.raises(UserError, match="image 0 cannot be read"), contextlib.closing(ahead):
        ahead.put([(0, RolloutRequest("p", 0, seed=0))])
        ahead.take(wait=True)
