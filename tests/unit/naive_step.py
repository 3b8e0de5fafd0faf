"""The whole update step again, as a naive loop: the oracle of test_step_oracle.py.

One sequence at a time goes through the public transformers model, with what its processor makes of images and
text. Every term is written out from the formulas (docs/algorithms.md, and the papers named there);
nothing of `mssr.algorithms`, `mssr.models` or `mssr.actor` is used.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import torch
from PIL import Image
from torch.optim import AdamW

from mssr.types import TrainBatch

BANNED = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
Pairs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Recipe:
    """Everything that the step depends on beside model and batch; the defaults switch all of it off."""

    loss: str = "ppo"
    clip_low: float = 0.2
    clip_high: float = 0.3
    dual_clip: float | None = 3.0
    tau_positive: float = 1.0
    tau_negative: float = 1.05
    aggregation: str = "token_mean"
    constant_length: int = 12
    shaping: str | None = None
    """exact or sampled"""
    shaping_coef: float = 0.4
    shaping_divisor: float = 2.0
    kl: str = "k3"
    kl_coef: float = 0.0
    anchor_coef: float = 0.0
    entropy_coef: float = 0.0
    weight: str = "none"
    max_weight: float = 2.0
    mask: str = "none"
    mask_low: float = 0.5
    mask_high: float = 5.0
    max_kl: float = 0.003
    visual: str = "none"
    visual_fraction: float | None = None
    negative_fraction: float = 1.0
    entropy_alpha: float = 0.0
    confident: float = 0.95
    temperature: float = 1.0
    max_grad_norm: float = 1.0
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01


@dataclass
class _Tokens:
    """Of one response: what the loss of its tokens is made of, and what is reported."""

    old: torch.Tensor
    engine: torch.Tensor
    advantages: torch.Tensor
    reference: torch.Tensor | None
    anchor: torch.Tensor | None
    credit: torch.Tensor | None = None
    metrics: Pairs = field(default_factory=dict)


class NaiveStep:
    """A model, a frozen copy of it as it was, and AdamW."""

    def __init__(self, model: Path, table: Path, recipe: Recipe, start: dict[str, torch.Tensor]) -> None:
        from transformers import AutoProcessor

        self.recipe = recipe
        self.processor = AutoProcessor.from_pretrained(model)
        self.rows = {row["id"]: row for row in parquet.read_table(table).to_pylist()}
        self.reference = _load(model)
        self.model = _load(model)
        self.model.load_state_dict(start)
        self.banned = self.processor.tokenizer.convert_tokens_to_ids(list(BANNED))
        self.optimizer = AdamW(
            self.model.parameters(), lr=recipe.lr, betas=recipe.betas, weight_decay=recipe.weight_decay
        )

    def score(
        self, model: Any, batch: TrainBatch, s: int, images: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(T,) log-probs of response ``s`` under what is sampled from, and (T,) entropies."""
        row = self.rows[batch.prompt_ids[s]]
        pictures = (
            [Image.open(io.BytesIO(i["bytes"])).convert("RGB") for i in row["images"]] if images else []
        )
        content = [{"type": "image"} for _ in pictures] + [{"type": "text", "text": row["problem"]}]
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        inputs = self.processor(text=[text], images=pictures or None, return_tensors="pt")
        prompt = inputs["input_ids"][0]
        sequence = batch.tokens[batch.offsets[s] : batch.offsets[s + 1]]
        p = int(batch.prompt_lengths[s])
        if images:
            assert sequence[:p].tolist() == prompt.tolist()
        response = torch.tensor(sequence[p:].astype(np.int64))
        more: dict[str, torch.Tensor] = {}
        if pictures:
            more = {"pixel_values": inputs["pixel_values"], "image_grid_thw": inputs["image_grid_thw"]}
        ids = torch.cat([prompt, response])[None]
        types = (ids == model.config.image_token_id).int()
        logits = model(input_ids=ids, mm_token_type_ids=types, use_cache=False, **more).logits
        model.model.rope_deltas = None
        logits = logits[0, len(prompt) - 1 : -1] / self.recipe.temperature
        allowed = torch.ones(logits.shape[1], dtype=torch.bool)
        allowed[self.banned] = False
        log_p = torch.log_softmax(logits[:, allowed], dim=1)
        entropy = -(log_p.exp() * log_p).sum(1)
        column = allowed.cumsum(0)[response] - 1
        return log_p[torch.arange(len(response)), column], entropy

    def step(
        self, batch: TrainBatch, parts: list[tuple[int, ...]], probed: tuple[int, ...]
    ) -> dict[str, float]:
        """One update for each part of the batch's sequences; returns the metrics, the KL of those probed."""
        every = range(len(batch))
        old: dict[int, torch.Tensor] = {}
        anchor: dict[int, torch.Tensor] = {}
        entropy: dict[int, torch.Tensor] = {}
        blind: dict[int, torch.Tensor] = {}
        reference: dict[int, torch.Tensor] = {}
        with torch.no_grad():
            for s in every:
                old[s], entropy[s] = self.score(self.model, batch, s)
                if batch.old_log_probs is not None:
                    old[s] = _of(batch, batch.old_log_probs, s)
                with_anchor = self.recipe.anchor_coef or self.recipe.visual != "none"
                if with_anchor and self.rows[batch.prompt_ids[s]]["images"]:
                    anchor[s], blind[s] = self.score(self.model, batch, s, images=False)
                if self.recipe.kl_coef:
                    reference[s] = self.score(self.reference, batch, s)[0]
                if batch.reference_log_probs is not None:
                    reference[s] = _of(batch, batch.reference_log_probs, s)
        tokens = {
            s: _Tokens(
                old[s],
                _of(batch, batch.engine_log_probs, s),
                self._advantages(batch, s),
                reference.get(s),
                anchor.get(s),
            )
            for s in every
        }
        self._add_credit(tokens, parts, entropy, blind)
        losses, norms = [], []
        trained = [s for part in parts for s in part]
        for part in parts:
            losses.append(self._accumulate(batch, part, tokens))
            norms.append(self._clip())
            self.optimizer.step()
            self.optimizer.zero_grad()
        metrics = {
            name: float(torch.cat([tokens[s].metrics[name] for s in trained]).double().mean())
            for name in tokens[trained[0]].metrics
        }
        with torch.no_grad():
            change = torch.cat([self.score(self.model, batch, s)[0] - old[s] for s in probed])
        metrics["policy/kl_update"] = float((change.exp() - 1 - change).mean())
        metrics["policy/loss"] = float(np.mean(losses))
        metrics["policy/grad_norm"] = float(np.mean(norms))
        mismatch = torch.cat([tokens[s].engine - tokens[s].old for s in trained])
        metrics["rollout/mismatch_max"] = float(mismatch.abs().max())
        return metrics

    def _add_credit(
        self, tokens: dict[int, _Tokens], parts: list[tuple[int, ...]], entropy: Any, blind: Any
    ) -> None:
        """What the advantages of tokens are multiplied with."""
        r = self.recipe
        kl = {s: _k3(t.old, t.anchor).clamp(max=10) for s, t in tokens.items() if t.anchor is not None}
        for part in parts if r.visual != "none" else ():
            means = {s: float(kl[s].mean()) for s in part if s in kl and len(kl[s])}
            for s in part:
                tokens[s].credit = torch.ones_like(tokens[s].old)
            for s in means:
                if r.visual == "vppo":
                    above = means[s] - min(means.values())
                    spread = sum(means.values()) / len(means) - min(means.values())
                    above = above / spread if spread else 1.0
                    score, factor = kl[s], 0.9 + 0.1 * above
                else:
                    unlike = 1 - _unit(kl[s])
                    gap = 1 - _unit((entropy[s] - blind[s]).abs())
                    score = (1 - unlike**0.7 * gap**0.3) * _unit(entropy[s])
                    factor = len(score) / _count(r.visual_fraction or 0.2, score)
                chosen = _most(score, r.visual_fraction or (0.4 if r.visual == "vppo" else 0.2))
                tokens[s].credit = factor * chosen
        for t in tokens.values() if r.negative_fraction < 1 else ():
            keep = (t.advantages >= 0) | _most(-t.engine, r.negative_fraction)
            t.credit = keep.double() if t.credit is None else t.credit * keep

    def _advantages(self, batch: TrainBatch, s: int) -> torch.Tensor:
        if batch.token_advantages is not None:
            return _of(batch, batch.token_advantages, s)
        return torch.full((int(batch.response_lengths[s]),), float(batch.advantages[s]), dtype=torch.float64)

    def _accumulate(self, batch: TrainBatch, part: tuple[int, ...], tokens: dict[int, _Tokens]) -> float:
        lengths = batch.response_lengths[list(part)]
        total = 0.0
        for s in part:
            per_token = self._token_losses(*self.score(self.model, batch, s), tokens[s])
            if self.recipe.aggregation == "token_mean":
                loss = per_token.sum() / int(lengths.sum())
            elif self.recipe.aggregation == "sequence_mean":
                loss = per_token.sum() / max(len(per_token), 1) / int((lengths > 0).sum())
            else:
                loss = per_token.sum() / (len(part) * self.recipe.constant_length)
            loss.backward()
            total += loss.item()
        return total

    def _token_losses(self, log_p: torch.Tensor, entropy: torch.Tensor, t: _Tokens) -> torch.Tensor:
        r, m = self.recipe, t.metrics
        m["policy/entropy"] = entropy.detach()
        a = t.advantages
        if r.shaping is not None:
            h = (entropy if r.shaping == "exact" else -log_p.exp() * log_p).detach()
            psi = torch.minimum(r.shaping_coef * h, a.abs() / r.shaping_divisor)
            m["shaping/mean"] = psi
            m["shaping/entropy_branch_fraction"] = (psi == r.shaping_coef * h).double()
            m["shaping/sign_flip_fraction"] = ((a < 0) & (a + psi > 0)).double()
            a = a + psi
        a = a + r.entropy_alpha * a.abs() * (log_p.exp() > r.confident)
        if t.credit is not None:
            a = a * t.credit
            m["shaping/credit"], m["shaping/left_out_fraction"] = t.credit, (t.credit == 0).double()
        against = t.engine if r.loss in ("dis", "flash_reinforce") else t.old
        loss = self._policy_loss(log_p, against, a.detach(), m)
        m["rollout/mismatch_kl"] = _k3(t.engine, t.old)
        if (r.weight, r.mask) != ("none", "none"):
            log_rho = t.old - t.engine
            rho = {
                "token": log_rho.exp(),
                "sequence": log_rho.sum().exp().expand(len(log_rho)),
                "geometric": log_rho.mean().exp().expand(len(log_rho)),
            }
            ones = torch.ones_like(log_rho)
            weight = ones if r.weight == "none" else rho[r.weight].clamp(max=r.max_weight)
            keep = (
                ones.bool()
                if r.mask == "none"
                else (rho[r.mask] >= r.mask_low) & (rho[r.mask] <= r.mask_high)
            )
            m["correction/weight"], m["correction/masked"] = weight, (~keep).double()
            loss = loss * weight * keep
        if t.reference is not None:
            d = t.reference - log_p
            kl = {"k1": -d, "k2": d**2 / 2, "k3": d.exp() - d - 1}[r.kl]
            loss = loss + r.kl_coef * kl
            m["policy/kl_ref"] = (d.exp() - d - 1).detach()
        if r.anchor_coef or r.visual != "none":
            kl = torch.zeros_like(log_p) if t.anchor is None else _k3(log_p, t.anchor)
            loss = loss + r.anchor_coef * kl
            m["policy/kl_anchor"] = kl.detach()
        return loss - r.entropy_coef * entropy

    def _policy_loss(self, log_p: torch.Tensor, old: torch.Tensor, a: torch.Tensor, m: Pairs) -> torch.Tensor:
        r = self.recipe
        rho = (log_p - old).exp()
        if (
            r.loss == "gspo"
        ):  # one ratio for the sequence; its mean over the tokens is the loss of the sequence
            rho = (log_p - old).mean().exp().expand(len(log_p))
        m["policy/ratio"] = rho.detach()
        if r.loss == "flash_reinforce":
            p, q = old.exp(), log_p.detach().exp()
            kl = m["policy/binary_kl"] = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
            dropped = bool(kl.mean() > r.max_kl)
            m["policy/dropped_fraction"] = torch.full_like(p, float(dropped))
            return log_p * 0 if dropped else -rho.detach() * a * log_p
        if r.loss == "dis":
            outside = (rho <= 1 - r.clip_low) | (rho >= 1 + r.clip_high)
            m["policy/clip_fraction"] = outside.double()
            return -rho.detach() * a * log_p * ~outside
        if r.loss == "sapo":
            tau = torch.where(a > 0, r.tau_positive, r.tau_negative)
            return -4 / tau / (1 + torch.exp(-tau * (rho - 1))) * a
        clipped = rho.clamp(1 - r.clip_low, 1 + r.clip_high)
        if r.loss == "cispo":
            m["policy/clip_fraction"] = (clipped != rho).double()
            return -clipped.detach() * a * log_p
        loss = -torch.minimum(rho * a, clipped * a)
        m["policy/clip_fraction"] = (clipped * a < rho * a).double()
        if r.loss == "ppo":
            bound = -a * (float("inf") if r.dual_clip is None else r.dual_clip)
            dual = (a < 0) & (loss > bound)
            m["policy/dual_clip_fraction"] = dual.double()
            loss = torch.where(dual, bound, loss)
        return loss

    def _clip(self) -> float:
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = float(torch.cat([g.flatten() for g in gradients]).norm())
        for g in gradients:
            g *= min(1.0, self.recipe.max_grad_norm / norm)
        return norm


def _unit(values: torch.Tensor) -> torch.Tensor:
    return (values - values.min()) / max(float(values.max() - values.min()), 1e-8)


def _count(fraction: float, values: torch.Tensor) -> int:
    return int(np.ceil(fraction * len(values)))


def _most(values: torch.Tensor, fraction: float) -> torch.Tensor:
    """Which are among the largest."""
    return values >= values.sort(descending=True).values[: _count(fraction, values)].min()


def _k3(log_p: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Of KL(p || other) at tokens drawn from p."""
    d = other - log_p
    return d.exp() - d - 1


def _of(batch: TrainBatch, values: np.ndarray, s: int) -> torch.Tensor:
    start, end = batch.response_offsets[s : s + 2]
    return torch.tensor(values[start:end], dtype=torch.float64)


def _load(model: Path) -> Any:
    from transformers import Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration.from_pretrained(model, dtype=torch.float32).double().eval()
