"""What this project has to know of a kind of model. The defaults fit most of Qwen's that see images.

The methods come in the order in which a model meets them: its config.json, its modules, a forward pass, an
engine, and a tiny one for tests. ``config`` and ``model`` are those of transformers. torch and transformers
are imported where they are needed, for `mssr plan` asks for shapes only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from mssr.models.shapes import ModelShape, TextShape, VisionShape

if TYPE_CHECKING:
    import torch

    from mssr.models.encoded import EncodedPrompt
    from mssr.models.packing import PackedBatch
    from mssr.models.tiny import TinySize

Grid = tuple[int, int, int]
"""Patches of an image in time, height and width."""


class Family:
    """Models of one ``model_type`` that see images. A family overrides what is its own."""

    model_type: ClassVar[str]
    auto_class: ClassVar[str] = "AutoModelForImageTextToText"
    """Class of transformers that loads one."""
    experimental: ClassVar[str] = ""
    """What is not yet as it is for the others; every run says it."""
    tower_name: ClassVar[str | None] = "model.visual"
    """Of the module that makes features of pixels; None in a family that takes text only."""
    language_model_name: ClassVar[str] = "model.language_model"
    """Of the module with embedding, decoder layers and last norm."""
    shared_out: ClassVar[Sequence[str]] = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    """Of what in the language model each device of an engine has a part, by names in config.json."""

    # --- config.json

    def shape(self, tree: Mapping[str, Any]) -> ModelShape:
        """From the content of config.json; older ones have the language model's keys at the top level."""
        text = tree.get("text_config") or tree
        tied = tree.get("tie_word_embeddings")
        tied = bool(text.get("tie_word_embeddings") if tied is None else tied)
        image_token = tree.get("image_token_id", 151655)
        vision = self.vision_shape(tree.get("vision_config") or {})
        return ModelShape(self.text_shape(text), vision, tied, image_token)

    def text_shape(self, text: Mapping[str, Any]) -> TextShape:
        """From the language model's part of config.json."""
        raise NotImplementedError

    def vision_shape(self, vision: Mapping[str, Any]) -> VisionShape | None:
        """From the tower's part of config.json."""
        raise NotImplementedError

    def text_config(self, config: Any) -> Any:
        """The part of a config that is the language model's."""
        return config.text_config

    def merge_size(self, config: Any) -> int:
        """Patches per side of what becomes one token."""
        return int(config.vision_config.spatial_merge_size)

    def placeholder_ids(self, config: Any) -> list[int]:
        """Tokens that stand for pixels. A policy that samples one breaks every later forward pass."""
        names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        return sorted({int(i) for n in names if (i := getattr(config, n, None)) is not None})

    def check_files(self, tree: Mapping[str, Any], directory: Path) -> None:
        """Refuse weights that are laid out otherwise than published ones, without importing torch.

        Raises:
            UserError: says how to write them anew.
        """

    # --- the modules of a model

    def language_model(self, model: Any) -> Any:
        return model.get_submodule(self.language_model_name)

    def tower(self, model: Any) -> Any:
        """The vision tower, or None."""
        return model.get_submodule(self.tower_name) if self.tower_name else None

    def adapt(self, model: Any, packed: bool) -> None:
        """Replace, in place, what is to be computed otherwise. The names of weights may not change.

        Args:
            packed: for passes over packed sequences; else the model generates.
        """

    def save(self, model: Any, directory: Path) -> None:
        """Write weights and config.json as published models have them, which is how vLLM reads them."""
        model.save_pretrained(directory)

    # --- a forward pass

    def rope_positions(self, model: Any, prompt: EncodedPrompt) -> torch.Tensor:
        """(3, P) int64 positions of a prompt's tokens in time, height and width."""
        positions, _ = model.model.get_rope_index(
            prompt.token_ids[None],
            mm_token_type_ids=prompt.token_types[None],
            image_grid_thw=prompt.image_grid_thw,
        )
        return positions[:, 0]

    def attention_inputs(self, config: Any, batch: PackedBatch, varlen: bool) -> dict[str, Any]:
        """Position ids and mask, in the language model's arguments.

        Args:
            varlen: attention knows where sequences are; else transformers finds it out by the position ids.
        """
        # Where no layer wants a mask, transformers need not look, on the device, whether the batch is packed.
        no_masks = dict.fromkeys(self.text_config(config).layer_types) if varlen else None
        return {"position_ids": batch.position_ids, "attention_mask": no_masks}

    def tower_positions(self, tower: Any, grids: Sequence[Grid], device: torch.device) -> dict[str, Any]:
        """Where the patches of images are, in the tower's arguments; worked out once for each size."""
        raise NotImplementedError

    def features(self, output: Any) -> torch.Tensor:
        """(merged patches, W) all that an image gives the language model, from the tower's output."""
        return output.pooler_output

    def place(self, embeds: torch.Tensor, index: torch.Tensor, features: torch.Tensor) -> dict[str, Any]:
        """Put features where placeholders are.

        Args:
            embeds: (1, S, D) of the tokens.
            index: (placeholders,) where they are.
            features: (placeholders, W).

        Returns:
            Arguments of the language model.
        """
        return {"inputs_embeds": embeds.index_copy(1, index, features[None].to(embeds.dtype))}

    def measure(self, language_model: Any) -> dict[str, torch.Tensor]:
        """Metric -> (n,) values of the pass that the language model made last; their mean is reported."""
        return {}

    # --- an engine

    def engine_weight(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """A weight of the model in the layout in which vLLM loads it."""
        return weight

    def before_load(self, engine_model: Any) -> None:
        """Called with vLLM's own model before it is given new weights."""

    def engine_options(self, device: str, dtype: torch.dtype) -> dict[str, Any]:
        """Arguments of ``vllm.LLM`` that these models need.

        Raises:
            UserError: it does not know them on this device in this dtype.
        """
        return {}

    # --- a tiny one

    def tiny_config(self, ids: Mapping[str, int], size: TinySize) -> Any:
        """A config for `mssr.models.tiny`.

        Args:
            ids: the tokenizer's vocabulary.
        """
        raise NotImplementedError

    def tiny_processor(self, tokenizer: Any, pixels: Mapping[str, int]) -> Any:
        """What stands before it, with the chat template in the structure of the family's own.

        Args:
            pixels: bounds of images, as image processors take them.
        """
        raise NotImplementedError
