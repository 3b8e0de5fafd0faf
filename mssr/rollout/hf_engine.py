"""Generation with transformers, for machines without vLLM and for debugging."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import LogitsProcessor, LogitsProcessorList

from mssr.config import Config
from mssr.data.prompt_source import PromptSource
from mssr.models.encoded import EncodedPrompt
from mssr.models.families import family_of
from mssr.models.loading import compute_dtype, load_model
from mssr.rollout.checksums import Arriving, Loaded, all_loaded
from mssr.rollout.heartbeat import beat
from mssr.rollout.queue import Finished, RequestQueue
from mssr.rollout.weights import WeightSource
from mssr.types import Rollout, RolloutRequest, SamplingParams

_DRAWN_AT_ONCE = 1 << 14  # random numbers of a response: 32 tokens with a vocabulary of 512


class HfEngine:
    """`RolloutEngine` on ``model.generate``. See `mssr.rollout.engine.RolloutEngine`."""

    def __init__(self, config: Config, device: str) -> None:
        dtype = compute_dtype(config.model.dtype, device)
        self._model = load_model(config.model, dtype, packed=False).to(device).requires_grad_(False)
        self.prompts = PromptSource(config)
        self.slots = config.rollout.max_num_seqs or 256
        self._version = 0
        self._kept: dict[str, Any] = {}
        self._banned = family_of(self._model.config).placeholder_ids(self._model.config)
        tokenizer = self._tokenizer = self.prompts.encoder.processor.tokenizer
        self._pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        ends = self._model.generation_config.eos_token_id
        # vLLM ends responses with either, too.
        self._eos = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}

    def generate(self, requests: RequestQueue, params: SamplingParams) -> Iterator[Finished]:
        while taken := requests.take(self.slots, wait=True):
            numbers, batch = zip(*taken, strict=True)
            yield list(zip(numbers, self._generate_batch(batch, params), strict=True))

    def load_weights(self, source: WeightSource, version: int, check: bool = False) -> Sequence[Loaded]:
        arriving = Arriving(source.tensors(self._model.device, 0, self._kept), check)
        with contextlib.closing(arriving):
            weights = dict(arriving)
        if not arriving.interrupted:
            self._model.load_state_dict(weights, strict=True)
        loaded = all_loaded([arriving.loaded(self._model)])
        self._version = version
        return loaded

    def sleep(self) -> None:
        """It keeps what it has."""

    def wake(self, part: str) -> None:
        """It never slept."""

    def metrics(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        """Nothing to give back."""

    @torch.inference_mode()
    def _generate_batch(self, requests: Sequence[RolloutRequest], params: SamplingParams) -> list[Rollout]:
        prompts = self.prompts.get([r.prompt_id for r in requests])
        inputs = self._padded(prompts)
        sampler = _SeededSampler([r.seed for r in requests], params, self._banned, self._model.device)
        output = self._model.generate(
            **inputs,
            max_new_tokens=params.max_tokens,
            do_sample=False,  # the seeded noise of the sampler makes the maximum a sample
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=self._pad,
            eos_token_id=sorted(self._eos),
            logits_processor=LogitsProcessorList([sampler]),
        )
        responses = output[:, inputs["input_ids"].shape[1] :].cpu()
        chosen = torch.stack(
            [lp.gather(1, t[:, None])[:, 0] for lp, t in zip(sampler.log_probs, responses.T, strict=True)],
            dim=1,
        )
        result = []
        for i, request in enumerate(requests):
            tokens = responses[i].tolist()
            end = next((k + 1 for k, token in enumerate(tokens) if token in self._eos), len(tokens))
            result.append(
                Rollout(
                    prompt_id=request.prompt_id,
                    sample_index=request.sample_index,
                    prompt_token_ids=prompts[i].token_ids.numpy().astype(np.int32),
                    response_token_ids=np.asarray(tokens[:end], dtype=np.int32),
                    log_probs=chosen[i, :end].float().numpy(),
                    finish_reason="stop" if tokens[end - 1] in self._eos else "length",
                    policy_version=self._version,
                    text=self._tokenizer.decode(tokens[:end], skip_special_tokens=True),
                )
            )
        return result

    def _padded(self, prompts: Sequence[EncodedPrompt]) -> dict[str, torch.Tensor]:
        """Prompts as one input of the model, filled up on the left."""

        def pad(rows: Sequence[torch.Tensor], value: int) -> torch.Tensor:
            return pad_sequence(list(rows), batch_first=True, padding_value=value, padding_side="left")

        inputs = {
            "input_ids": pad([p.token_ids for p in prompts], self._pad),
            "attention_mask": pad([torch.ones_like(p.token_ids) for p in prompts], 0),
        }
        if self.prompts.encoder.processor.sees_images:
            inputs["mm_token_type_ids"] = pad([p.token_types for p in prompts], 0)
        pixels = [p.pixel_values for p in prompts if p.pixel_values is not None]
        if pixels:
            inputs["pixel_values"] = torch.cat(pixels).to(self._model.dtype)
            grids = [p.image_grid_thw for p in prompts if p.image_grid_thw is not None]
            inputs["image_grid_thw"] = torch.cat(grids)
        return {name: value.to(self._model.device) for name, value in inputs.items()}


class _SeededSampler(LogitsProcessor):
    """Bans tokens, applies the temperature, and adds Gumbel noise from a generator of each request.

    argmax(log p + Gumbel noise) is an exact sample of p, so a greedy ``generate`` samples, and what a
    request gets does not depend on its neighbours in the batch.
    """

    def __init__(
        self, seeds: Sequence[int], params: SamplingParams, banned: list[int], device: torch.device
    ) -> None:
        self._params = params
        self._banned = torch.tensor(banned, dtype=torch.int64, device=device)
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._uniform: Iterator[torch.Tensor] = iter(())
        self.log_probs: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        beat()
        scores = scores.float().index_fill(1, self._banned, float("-inf"))
        if not self._params.greedy:
            scores = scores / self._params.temperature
        log_probs = torch.log_softmax(scores, dim=-1)
        self.log_probs.append(log_probs.cpu())
        if self._params.greedy:
            return log_probs
        gumbel = -torch.log(-torch.log(self._draw(scores.shape[1]).clamp_min(1e-20)))
        return log_probs + gumbel.to(log_probs.device)

    def _draw(self, vocabulary: int) -> torch.Tensor:
        """(B, V) uniform numbers of the next token, the same whether drawn for one token or for several."""
        if (drawn := next(self._uniform, None)) is None:
            size = max(1, _DRAWN_AT_ONCE // vocabulary), vocabulary
            self._uniform = iter(
                torch.stack([torch.rand(size, generator=g) for g in self._generators], dim=1)
            )
            drawn = next(self._uniform)
        return drawn
