"""What stands before a model: tokenizer, chat template and, where it sees images, image processor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mssr.models.families import Family


class Processor:
    """The processor of transformers as the encoder needs it, the same for models that take text only.

    Attributes:
        loaded: the processor of transformers, or of a model that takes text only its tokenizer.
        chat_template: the model's own; empty if it has none.
        image_processor: None if the model takes text only, as are the following.
        image_token: the text of the token that stands for an image; its id is ``image_token_id``.
        patch_size: pixels per side of a patch.
        merge_size: patches per side of what becomes one token.
    """

    def __init__(self, loaded: Any, family: Family) -> None:
        self.loaded = loaded
        self.family = family
        self.tokenizer = getattr(loaded, "tokenizer", loaded)
        self.chat_template: str = getattr(loaded, "chat_template", None) or ""
        self.image_processor = getattr(loaded, "image_processor", None) if family.tower_name else None
        self.image_token: str | None = None
        self.image_token_id: int | None = None
        self.patch_size, self.merge_size = 0, 0
        if self.image_processor is not None:
            self.image_token, self.image_token_id = loaded.image_token, loaded.image_token_id
            self.patch_size = self.image_processor.patch_size
            self.merge_size = self.image_processor.merge_size

    @property
    def sees_images(self) -> bool:
        return self.image_processor is not None

    @property
    def vision_tokens(self) -> tuple[str, ...]:
        """Texts of all tokens that stand for pixels, or around them."""
        if not self.sees_images:
            return ()
        return self.loaded.image_token, self.loaded.video_token, "<|vision_start|>", "<|vision_end|>"

    def render(
        self,
        messages: Sequence[Any],
        generation: bool = True,
        template: str | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of a conversation, its contents being lists of parts, see `mssr.data.messages`.

        Args:
            generation: end with the beginning of the assistant's turn.
            template: in place of the model's own.
            variables: others that the template reads.
        """
        turns = messages if self.sees_images else [_as_text(message) for message in messages]
        options = {"add_generation_prompt": generation, "tokenize": False, "chat_template": template}
        return str(self.loaded.apply_chat_template(turns, **dict(variables or {}) | options))

    def save(self, directory: Any) -> None:
        self.loaded.save_pretrained(directory)


def _as_text(message: dict[str, Any]) -> dict[str, Any]:
    """A message for templates that know no parts."""
    return message | {"content": "".join(part["text"] for part in message["content"])}
