"""A model as reinforcement learning needs it: packed in, log-probs and entropies out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from mssr.models.attention import NAME
from mssr.models.bounded_cache import BoundedCache
from mssr.models.encoded import EncodedPrompt
from mssr.models.families import family_of
from mssr.models.families.base import Grid
from mssr.models.head import Head, PartLoss, token_log_probs_and_entropy, token_loss
from mssr.models.packing import PackedBatch


class PolicyModel(nn.Module):
    """Wraps a transformers model of one of the `FAMILIES`; tokens that stand for pixels have probability 0.

    Args:
        model: as `load_model` returns it.
        temperature: the sampling temperature, so that log-probs are those of what was sampled.
        head_chunk: as many logits exist at the same time as so many tokens have.
        features: of images by their keys, (merged patches, W) on the device, where the vision tower is frozen
            and whole on every rank; None if it is trained or sharded.

    Attributes:
        measured: what the family measures of a pass, see `Family.measure`; of the last one.
    """

    def __init__(
        self,
        model: Any,
        temperature: float = 1.0,
        head_chunk: int = 256,
        features: BoundedCache[bytes, torch.Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.temperature = temperature
        self.head_chunk = head_chunk
        self.features = features
        self.family = family_of(model.config)
        self.banned_ids = self.family.placeholder_ids(model.config)
        self.merge_size = self.family.merge_size(model.config)
        self.measured: dict[str, torch.Tensor] = {}

    @property
    def layers(self) -> Sequence[nn.Module]:
        """Those of the decoder."""
        return self.family.language_model(self.model).layers

    @property
    def tower(self) -> Any:
        """The vision tower, or None."""
        return self.family.tower(self.model)

    def rope_positions(self, prompt: EncodedPrompt) -> torch.Tensor:
        """(3, P) int64 mrope rows of a prompt."""
        return self.family.rope_positions(self.model, prompt)

    def forward(
        self, batch: PackedBatch, touch_vision: bool = False, loss: PartLoss | None = None
    ) -> tuple[torch.Tensor, ...]:
        """Log-probs and entropies of the response tokens, or a loss over them.

        Args:
            batch: packed sequences on the model's device.
            touch_vision: run the vision tower on a blank image, with no effect on the result, when
                the batch has none. Ranks that share a sharded tower must all run it or none.
            loss: one in which every token stands for itself, see `token_loss`. It is evaluated
                in here because a sharded weight of the head is whole only in here.

        Returns:
            (N,) float32 log-probs and (N,) float32 exact entropies, in nats. With a loss its () sum
            comes first, and it alone has a gradient.
        """
        family, config = self.family, self.model.config
        language_model = family.language_model(self.model)
        embeds = language_model.embed_tokens(batch.input_ids)
        inputs = {"inputs_embeds": embeds}
        if batch.pixels is not None:
            assert batch.normalizer is not None
            if self.features is None:
                features = self._image_features(batch.normalizer(batch.pixels), batch.image_grids)
            else:
                features = self._known_features(batch, self.features)
            inputs = family.place(embeds, batch.image_index, features[batch.feature_index])
        elif touch_vision and self.features is None and self.tower is not None:
            blank = self._image_features(*self._blank_image()).sum()
            inputs = {"inputs_embeds": embeds + 0.0 * blank.to(embeds.dtype)}
        varlen = family.text_config(config)._attn_implementation == NAME
        output = language_model(
            **inputs,
            **family.attention_inputs(config, batch, varlen),
            use_cache=False,
            # Where the sequences are, for attention that needs no mask.
            cu_seq_lens_q=batch.cu_seqlens,
            cu_seq_lens_k=batch.cu_seqlens,
            max_length_q=batch.max_length,
            max_length_k=batch.max_length,
        )
        self.measured = family.measure(language_model)
        hidden = output.last_hidden_state
        tokens = hidden[0, batch.response_index], self.model.lm_head.weight, batch.targets
        head = Head(self.temperature, self.banned_ids, self.head_chunk)
        return token_log_probs_and_entropy(*tokens, head) if loss is None else token_loss(*tokens, loss, head)

    def _image_features(self, pixel_values: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
        """(merged patches, W)."""
        tower = self.tower
        positions = self.family.tower_positions(tower, grids, pixel_values.device)
        pixel_values = pixel_values.to(tower.patch_embed.proj.weight.dtype)
        return self.family.features(tower(pixel_values, grid_thw=torch.tensor(grids), **positions))

    @torch.no_grad()
    def _known_features(self, batch: PackedBatch, cache: BoundedCache[bytes, torch.Tensor]) -> torch.Tensor:
        """(merged patches, W), the tower run on those images only whose features are not kept."""
        assert batch.pixels is not None and batch.normalizer is not None
        grids, keys = batch.image_grids, batch.image_keys
        found = {key: kept for key in keys if (kept := cache.get(key)) is not None}
        pixels = torch.split(batch.pixels, [math.prod(grid) for grid in grids])
        for k, key in enumerate(keys):
            if key not in found:
                # One by one: what is kept must not depend on what else was in the pass.
                found[key] = self._image_features(batch.normalizer(pixels[k]), grids[k : k + 1])
                cache.put(key, found[key], found[key].nbytes)
        return torch.cat([found[key] for key in keys])

    def _blank_image(self) -> tuple[torch.Tensor, list[Grid]]:
        m, values = self.merge_size, math.prod(self.tower.patch_embed.proj.weight.shape[1:])
        return torch.zeros(m * m, values, device=self.model.lm_head.weight.device), [(1, m, m)]
