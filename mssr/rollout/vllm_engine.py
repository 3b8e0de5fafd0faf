"""Generation with vLLM. The only file that imports it.

vLLM rebinds threads and claims memory, so this belongs in a process of its own.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from mssr.config import Config
from mssr.data.prompt_source import PromptSource
from mssr.data.rows import MAX_IMAGES_PER_PROMPT
from mssr.errors import EngineError, UserError
from mssr.models.encoded import EncodedPrompt
from mssr.models.families import family_of
from mssr.models.loading import compute_dtype, import_transformers, importing, read_config
from mssr.models.memory import utilization
from mssr.rollout.checksums import Loaded, all_loaded
from mssr.rollout.encoding import EncodingAhead
from mssr.rollout.heartbeat import beat
from mssr.rollout.queue import Finished, Numbered, RequestQueue
from mssr.rollout.weights import WeightSource
from mssr.types import Rollout, RolloutRequest, SamplingParams

SUPPORTED_VLLM = "0.32"
MEMORY_HINT = (
    "the GPU's memory is used up: lower rollout.gpu_memory_utilization (keys and values take all of it that "
    "is left), rollout.max_num_batched_tokens or rollout.max_num_seqs"
)


class VllmEngine:
    """`RolloutEngine` on vLLM, inside this process. See `mssr.rollout.engine.RolloutEngine`.

    With ``rollout.tensor_parallel`` this process schedules and its children compute, one on a device.

    Raises:
        UserError: vLLM cannot be imported, or does not start with these settings.
    """

    def __init__(self, config: Config, device: str, colocated: bool = False) -> None:
        _prepare_environment(config, device, colocated)
        self._vllm = vllm = _import_vllm(device)
        self._version = 0
        self._device, self._sleeps = device, colocated and device == "cuda"
        self._dtype = compute_dtype(config.model.dtype, device)
        options = vllm_options(config, device, colocated)
        try:
            self._engine = vllm.LLM(**options).llm_engine
        except (ValueError, torch.OutOfMemoryError) as error:
            raise UserError(f"rollout.engine=vllm: vLLM does not start: {_reason(error)}") from error
        if config.rollout.tensor_parallel > 1:
            self._engine.collective_rpc("end_with_parent")
        if device == "cpu":
            # vLLM has put a function here that does nothing but log a warning, several times a request.
            torch.set_num_threads = lambda count: None  # type: ignore[assignment]
        self.prompts = PromptSource(config)
        model_config = self._engine.model_config.hf_config
        self._banned = family_of(model_config).placeholder_ids(model_config)
        self._merge_size = self.prompts.encoder.processor.merge_size
        self._final_only = vllm.sampling_params.RequestOutputKind.FINAL_ONLY
        self.slots = int(self._engine.vllm_config.scheduler_config.max_num_seqs)
        self._ids = itertools.count()
        # On CPU threads would take from the engine what they give it, and runs are to be bitwise the same.
        self._threads = 0 if device == "cpu" else config.cluster.threads_per_rollout
        self._preemptions, self._usage = 0, 0.0
        self._scheduler = self._engine.engine_core.engine_core.scheduler
        self._count_preemptions()

    def generate(self, requests: RequestQueue, params: SamplingParams) -> Iterator[Finished]:
        running: dict[str, Numbered] = {}
        with contextlib.closing(EncodingAhead(self._inputs, self._threads)) as coming:
            while True:
                coming.put(requests.take(wait=not running and not coming))
                if not running and not coming:
                    return
                for (number, request), inputs in coming.take(wait=not running):
                    name = str(next(self._ids))
                    with self._guarded():
                        self._engine.add_request(name, inputs, self._sampling(request, params))
                    running[name] = number, request
                beat()
                with self._guarded():
                    ended = [output for output in self._engine.step() if output.finished]
                self._usage = max(self._usage, self._scheduler.kv_cache_manager.usage)
                numbered = [(running.pop(output.request_id), output) for output in ended]
                yield [(number, self._rollout(request, output)) for (number, request), output in numbered]

    def load_weights(self, source: WeightSource, version: int, check: bool = False) -> Sequence[Loaded]:
        with self._guarded():
            processes = self._engine.collective_rpc("load_from", args=(source, check))
        loaded = all_loaded(processes)
        with self._guarded():
            # Either left stale, the same image keeps its old embedding.
            if not self._engine.reset_prefix_cache():
                raise RuntimeError("keys and values of the weights before are still in use")
            self._engine.reset_encoder_cache()
        self._version = version
        return loaded

    def sleep(self) -> None:
        if self._sleeps:
            with self._guarded():
                # Not even the weights are kept: new ones come. It also forgets everything cached; "wait",
                # the other mode, needs an engine in another process, and no request is left anyway.
                self._engine.sleep(level=2, mode="abort")

    def wake(self, part: str) -> None:
        if self._sleeps:
            with self._guarded():
                self._engine.wake_up([part])

    def metrics(self) -> dict[str, float]:
        found = {"perf/preemptions": float(self._preemptions), "perf/kv_cache_usage": self._usage}
        self._preemptions, self._usage = 0, 0.0
        if self._device == "cuda":
            with self._guarded():
                peaks = self._engine.collective_rpc("peak_gpu_bytes")
            found["memory/rollout_gpu_gib"] = max(peaks) / 2**30
        return found

    def close(self) -> None:
        # Now and not at exit, when the actor of a local run has taken the process group down.
        self._engine.engine_core.shutdown()

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """Let an engine that fails raise `EngineError`: vLLM has many types, and megabytes of input."""
        try:
            yield
        except Exception as error:
            reason = _reason(error)
            executor = self._engine.engine_core.engine_core.model_executor
            workers = getattr(executor, "workers", ())
            # What a call says if one is gone depends on how far vLLM is with noticing it.
            if workers and (executor.is_failed or not all(w.proc.is_alive() for w in workers)):
                reason = "one of the engine's processes has died; the engine's log says why"
            raise EngineError(f"vLLM failed: {reason}") from error

    def _count_preemptions(self) -> None:
        """vLLM tells nobody of them unless it keeps statistics of every token."""
        preempt = self._scheduler._preempt_request

        def counted(*args: Any, **options: Any) -> None:
            self._preemptions += 1
            preempt(*args, **options)

        self._scheduler._preempt_request = counted

    def _inputs(self, prompt_ids: Sequence[str]) -> list[Any]:
        """Inputs of vLLM for prompts; threads call it."""
        prompts = dict(zip(prompt_ids, self.prompts.get(prompt_ids), strict=True))
        inputs = {i: _engine_input(prompt, self._merge_size, self._dtype) for i, prompt in prompts.items()}
        return [inputs[i] for i in prompt_ids]

    def _sampling(self, request: RolloutRequest, params: SamplingParams) -> Any:
        return self._vllm.SamplingParams(
            temperature=0.0 if params.greedy else params.temperature,
            seed=None if params.greedy else request.seed,
            max_tokens=params.max_tokens,
            logprobs=0,
            flat_logprobs=True,  # not an object for each token
            output_kind=self._final_only,
            skip_clone=True,  # nobody else has it
            detokenize=False,  # token by token, and of log-probs too; `_rollout` decodes once
            logit_bias=dict.fromkeys(self._banned, float("-inf")),
        )

    def _rollout(self, request: RolloutRequest, output: Any) -> Rollout:
        completion = output.outputs[0]
        tokens = np.asarray(completion.token_ids, dtype=np.int32)
        # Flat lists over all positions; of each, the sampled token is the first.
        flat, first = completion.logprobs, completion.logprobs.start_indices
        assert np.array_equal(np.asarray(flat.token_ids, dtype=np.int32)[first], tokens)
        return Rollout(
            prompt_id=request.prompt_id,
            sample_index=request.sample_index,
            prompt_token_ids=np.asarray(output.prompt_token_ids, dtype=np.int32),
            response_token_ids=tokens,
            log_probs=np.asarray(flat.logprobs, dtype=np.float32)[first],
            finish_reason=completion.finish_reason or "length",
            policy_version=self._version,
            text=self.prompts.encoder.processor.tokenizer.decode(tokens, skip_special_tokens=True),
        )


def _engine_input(prompt: EncodedPrompt, merge_size: int, dtype: torch.dtype) -> Any:
    """A prompt as vLLM has it after its own preparation."""
    from vllm.inputs import mm_input, tokens_input
    from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems, PlaceholderRange

    token_ids = prompt.token_ids.tolist()
    if prompt.image_grid_thw is None or prompt.pixels is None or prompt.normalizer is None:
        return tokens_input(token_ids)
    patches = prompt.image_grid_thw.prod(-1)
    fields = {
        "pixel_values": MultiModalFieldConfig.flat_from_sizes("image", patches),
        "image_grid_thw": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
    }
    pixel_values = prompt.normalizer(prompt.pixels, dtype)
    pixels = {"pixel_values": pixel_values, "image_grid_thw": prompt.image_grid_thw}
    lengths = patches // merge_size**2
    starts = prompt.token_types.nonzero()[lengths.cumsum(0) - lengths, 0]
    return mm_input(
        token_ids,
        MultiModalKwargsItems.from_hf_inputs(pixels, fields),
        {"image": [key.hex() for key in prompt.image_keys]},  # by which its caches know the images
        {"image": list(map(PlaceholderRange, starts.tolist(), lengths.tolist()))},
    )


def vllm_options(config: Config, device: str, colocated: bool) -> dict[str, Any]:
    """The arguments of ``vllm.LLM``.

    Raises:
        UserError: vLLM does not know the model on this device in this dtype.
    """
    rollout, data = config.rollout, config.data
    dtype = compute_dtype(config.model.dtype, device)
    own = dict(rollout.engine_options)
    options: dict[str, Any] = {
        "model": config.model.path,
        "dtype": str(dtype).removeprefix("torch."),
        "trust_remote_code": config.model.trust_remote_code,
        "max_model_len": data.max_prompt_length + rollout.max_response_length,
        "max_num_seqs": rollout.max_num_seqs,
        "max_num_batched_tokens": rollout.max_num_batched_tokens,
        "limit_mm_per_prompt": {"image": MAX_IMAGES_PER_PROMPT, "video": 0},
        "mm_processor_kwargs": {"size": data.pixel_bounds},
        # Its own preparation of images, which it needs for trial runs only: ours is `_engine_input`.
        "mm_device_do_normalize": False,
        "mm_processor_cache_gb": 0,
        "logprobs_mode": "processed_logprobs",
        "generation_config": "vllm",
        "seed": config.seed,
        "disable_log_stats": True,
        "worker_extension_cls": "mssr.rollout.engine_process.EngineProcess",
    }
    if dtype != torch.float32:
        # As the actor's: log-probs of bfloat16 logits are off by hundredths, and ratios with them.
        options["hf_overrides"] = {"head_dtype": "float32"} | own.pop("hf_overrides", {})
    if rollout.tensor_parallel > 1:
        options |= {
            "tensor_parallel_size": rollout.tensor_parallel,
            # Of its own, vLLM would ask Ray for further workers. It has its processes as children.
            "distributed_executor_backend": "mp",
            "mm_encoder_tp_mode": "data",  # the vision tower is small: whole images go round the devices
        }
    if device == "cpu":
        # Chunked prefill and per-request seeds together crash the CPU sampler of vLLM 0.32.
        options |= {
            "enforce_eager": True,
            "enable_chunked_prefill": False,
            "skip_mm_profiling": True,
            "max_num_seqs": rollout.max_num_seqs or 256,
            "max_num_batched_tokens": rollout.max_num_batched_tokens or max(options["max_model_len"], 16384),
        }
    else:
        options |= {
            "enforce_eager": rollout.enforce_eager,
            "gpu_memory_utilization": utilization(config, colocated),
            "enable_sleep_mode": colocated,
        }
    return options | family_of(read_config(config.model)).engine_options(device, dtype) | own


def _reason(error: Exception) -> str:
    """The line of an error that says most, and what to do if memory is short."""
    said = [line.strip() for line in str(error).splitlines() if line.strip()]
    # CUDA's errors go on with advice, pydantic's with an address; of others the last line says most.
    telling = [x for x in said if "CUDA" in x] + [x for x in said[::-1] if "For further information" not in x]
    line = telling[0] if telling else ""
    out = isinstance(error, torch.OutOfMemoryError) or "out of memory" in line
    return (line[:300] or type(error).__name__) + (f"; {MEMORY_HINT}" if out else "")


def _import_vllm(device: str) -> Any:
    """The library, with the parts that it loads only when they are used.

    Raises:
        UserError: it cannot be imported, or is of another version.
    """
    worker = "cpu_worker" if device == "cpu" else "gpu_worker"
    with importing():
        import_transformers()  # before vLLM does
        try:
            vllm = importlib.import_module("vllm")
            if not vllm.__version__.startswith(SUPPORTED_VLLM + "."):
                raise UserError(f"vLLM {vllm.__version__} is installed; mssr works with {SUPPORTED_VLLM}.x")
            for part in ("entrypoints.llm", "v1.engine.core", f"v1.worker.{worker}"):
                importlib.import_module(f"vllm.{part}")
        except ImportError as error:
            raise UserError(
                f"rollout.engine=vllm: vLLM cannot be imported ({error}); install mssr[cpu] or mssr[gpu], or "
                "set rollout.engine=hf"
            ) from error
    return vllm


def _prepare_environment(config: Config, device: str, colocated: bool) -> None:
    """Settings that vLLM and torch read from the environment."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if config.rollout.tensor_parallel > 1:
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"  # a fork would inherit locks of our threads
        threads = config.cluster.threads_per_rollout // config.rollout.tensor_parallel
        os.environ["OMP_NUM_THREADS"] = str(max(1, threads))  # of the children
    allocator = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    shared = colocated or config.rollout.tensor_parallel > 1
    if device == "cuda" and not shared and not any(name in os.environ for name in allocator):
        # Less waste between tensors of many sizes. Neither the pool of an engine that sleeps nor the buffers
        # that the processes of one engine share can be made of such memory.
        os.environ[allocator[0]] = "expandable_segments:True"
    if device == "cpu":
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(config.rollout.kv_cache_gib)
        # Every process would run a C++ compiler for a small function or two at its first response. (Read from
        # the environment when torch._dynamo is imported, as it is here and will be in the children.)
        os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
        torch._dynamo.config.disable = os.environ["TORCH_COMPILE_DISABLE"] == "1"
        # Thread counts are ours (cluster.threads_per_rollout); vLLM would pin one thread a core.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
