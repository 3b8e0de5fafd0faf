"""The one encoder: the same function turns a row into tokens and pixels for engines and actor.

The actor takes over what an engine has encoded, or encodes for itself, and asserts that the engine saw the
same tokens. Images are resized once, by the rules of qwen-vl-utils; no later stage resizes them again.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from PIL import Image
from qwen_vl_utils import smart_resize

from mssr.config.data import DataConfig
from mssr.data.images import ImageSource, reason
from mssr.data.messages import IMAGE_MARK, count_marks, parts_of, text_part
from mssr.data.rows import Row
from mssr.errors import UserError
from mssr.models.encoded import EncodedImage, EncodedPrompt, ImageCache, PixelNormalizer, join_pixels
from mssr.models.processor import Processor

CHUNK_PIXELS = 2**17
"""Pixels of the images that are cut into patches in one go: enough that small ones cost little more than
their arithmetic, few enough that large ones do not take more memory than they must."""


class PromptEncoder:
    """Rows to model inputs, with one processor, one set of templates and one set of pixel bounds.

    Raises:
        UserError: a template cannot be read or rendered.
    """

    def __init__(self, processor: Processor, config: DataConfig) -> None:
        self.processor = processor
        self.config = config
        self._normalizer: PixelNormalizer | None = None
        if processor.image_processor is not None:
            processor.image_processor.size = config.pixel_bounds
            self._normalizer = PixelNormalizer.of(processor.image_processor)
        self._factor = processor.patch_size * processor.merge_size
        self._tokenizing = threading.Lock()  # tokenizers fail where two threads are the first to use one
        keys = ("system_prompt", "chat_template", "prompt_template")
        self.texts = {key: text_or_file(getattr(config, key), f"data.{key}") for key in keys}
        """What these keys of the config say, read from the file where they name one."""
        self._prompt_template = _prompt_template(self.texts["prompt_template"])
        self.response_prefix = self._try_chat_template()
        """What stands in the prompt and belongs to the response: ``<think>`` where the template ends with it,
        else nothing."""

    def chat_text(self, row: Row) -> str:
        """The prompt after the chat template, with one placeholder per image.

        Raises:
            ValueError: the model takes text only and the row has images; a turn holds a token that stands for
                pixels; or there are not as many <image> marks as images after ``data.prompt_template``, or
                not as many placeholders after the chat template.
        """
        if row.images and self.processor.image_token is None:
            what = f"{len(row.images)} image{'s' * (len(row.images) > 1)}, and the model takes text only"
            raise ValueError(f"{what} (data.images_column=null leaves a column of images out)")
        text = self._render(self._messages(row))
        placeholders = text.count(token) if (token := self.processor.image_token) else 0
        if placeholders != len(row.images):
            numbers = {"image": len(row.images), "placeholder": placeholders}
            counts = ", ".join(f"{number} {what}{'s' * (number != 1)}" for what, number in numbers.items())
            raise ValueError(f"{counts} after {self._template_name}")
        return text

    def _render(self, messages: list[dict[str, Any]], generation: bool = True) -> str:
        try:
            return self.processor.render(
                messages, generation, self.texts["chat_template"], self.config.chat_template_kwargs
            )
        except Exception as error:  # a template may raise anything
            raise ValueError(f"{self._template_name} cannot be rendered: {reason(error)}") from error

    @property
    def _template_name(self) -> str:
        return "data.chat_template" if self.texts["chat_template"] else "the model's chat template"

    def _try_chat_template(self) -> str:
        """Render a prompt; returns what of the generation prompt belongs to the response."""
        for name in self.config.chat_template_kwargs:
            template = str(self.texts["chat_template"] or self.processor.chat_template)  # it may be several
            if not re.search(rf"\b{re.escape(name)}\b", template):
                raise UserError(f"data.chat_template_kwargs.{name}: {self._template_name} does not read it")
        question = "2 + 3 = ?"
        messages = [{"role": "user", "content": [text_part(question)]}]
        try:
            text, bare = self._render(messages), self._render(messages, generation=False)
        except ValueError as error:
            raise UserError(f"{error} (a content is a list of parts of the type text or image)") from error
        if question not in text:
            raise UserError(f"{self._template_name} leaves the question out")
        if any(f"{q}text{q}: {q}{question}" in text for q in "'\""):
            raise UserError(
                f"{self._template_name} writes message.content, a list of parts, as it is and does not go "
                "through it: 1 image, 0 placeholders"
            )
        opening = text[len(bare) :] if text.startswith(bare) else ""
        found = re.search(r"<think>.*", opening, re.DOTALL) or re.search(r"<think>\s*$", text)
        return found[0] if found else ""

    def _messages(self, row: Row) -> list[dict[str, Any]]:
        """The turns of a row, the question as the prompt template or the instruction makes it. Images stand
        where marks are, and without marks before the user's first turn."""
        turns, mark = list(row.turns), row.mark
        for token in self.processor.vision_tokens:
            if any(token in text for _, text in turns):
                raise ValueError(f"the question holds {token}, which stands for pixels")
        if not count_marks(turns, mark):
            first = next(k for k, (role, _) in enumerate(turns) if role == "user")
            turns[first] = ("user", mark * len(row.images) + turns[first][1])
        if self._prompt_template is not None:
            try:
                turns[-1] = ("user", self._prompt_template.render(content=turns[-1][1]))
            except Exception as error:  # a template may raise anything
                raise ValueError(f"data.prompt_template cannot be rendered: {reason(error)}") from error
        if (marks := count_marks(turns, mark)) != len(row.images):
            raise ValueError(f"{marks} {IMAGE_MARK} marks but {len(row.images)} images")
        messages: list[dict[str, Any]] = []
        if self.texts["system_prompt"]:
            messages.append({"role": "system", "content": [text_part(self.texts["system_prompt"])]})
            turns = [turn for turn in turns if turn[0] != "system"]
        messages += [{"role": role, "content": parts_of(text, mark)} for role, text in turns]
        if self._prompt_template is None and self.config.instruction:
            messages[-1]["content"].append(text_part("\n" + self.config.instruction))
        return messages

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) after resizing, each at least one patch that the language model sees; a ValueError
        for an aspect ratio above 200."""
        h, w = smart_resize(height, width, self._factor, self.config.min_pixels, self.config.max_pixels)
        if min(h, w) < self._factor:  # smart_resize rounds the short side of a strip down to nothing
            longest = max(self.config.max_pixels // self._factor**2, 1) * self._factor
            h, w = (min(max(side, self._factor), longest) for side in (h, w))
        return w, h

    def images(self, row: Row) -> list[Image.Image]:
        """RGB images in their final size; a UserError that names the row for one that cannot be read."""
        images = []
        for k, source in enumerate(row.images):
            with _naming(row, k):
                images.append(self._decode(source))
        return images

    def _decode(self, source: ImageSource) -> Image.Image:
        image = source.decode()
        size = self.resized(*image.size)
        return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)

    def length(self, row: Row, sizes: Sequence[tuple[int, int]]) -> int:
        """P, computed from the (width, height) of the images alone."""
        text_tokens = len(self.processor.tokenizer(self.chat_text(row))["input_ids"])
        resized = [self.resized(*size) for size in sizes]
        return text_tokens - len(sizes) + sum((w // self._factor) * (h // self._factor) for w, h in resized)

    def encode(self, row: Row) -> EncodedPrompt:
        """The one of `encode_all`."""
        return self.encode_all([row])[0]

    def encode_all(self, rows: Sequence[Row], kept: ImageCache | None = None) -> list[EncodedPrompt]:
        """Tokens and pixels of prompts, each as if it were alone, in less time: an image is decoded and cut
        once in a go, in however many prompts it is.

        Args:
            kept: images that need not be cut again; those that are cut are added.

        Raises:
            UserError: an image cannot be read; names the row.
        """
        kept = ImageCache(0) if kept is None else kept
        result: list[EncodedPrompt] = []
        chunk: list[tuple[Row, list[bytes]]] = []
        found: dict[bytes, EncodedImage] = {}
        uncut: dict[bytes, Image.Image] = {}
        for row in rows:
            keys = []
            for k, source in enumerate(row.images):
                with _naming(row, k):
                    data = source.read()
                    key = hashlib.blake2b(data, digest_size=16).digest()
                    keys.append(key)
                    if key in found or key in uncut:
                        continue
                    if (image := kept.get(key)) is not None:
                        found[key] = image
                    else:
                        uncut[key] = self._decode(ImageSource(data, None))
            chunk.append((row, keys))
            if sum(image.width * image.height for image in uncut.values()) >= CHUNK_PIXELS:
                result += self._encode(chunk, found | self._cut(uncut, kept))
                chunk, found, uncut = [], {}, {}
        return result + self._encode(chunk, found | self._cut(uncut, kept))

    def _cut(self, images: Mapping[bytes, Image.Image], kept: ImageCache) -> dict[bytes, EncodedImage]:
        """The images as patches, which are kept, too."""
        if not images:
            return {}
        # What the processor does, without what it spends on finding out what is asked of it, and
        # without what can be done later.
        assert self.processor.image_processor is not None and self._normalizer is not None
        vision = self.processor.image_processor(
            images=list(images.values()),
            do_resize=False,
            do_rescale=False,
            do_normalize=False,
            return_tensors="pt",
        )
        grids = vision["image_grid_thw"].long()
        frames, channels = self._normalizer.frames, len(self._normalizer.mean)
        # The frame of an image is there as often as the tower wants to see it.
        one_frame = vision["pixel_values"].unflatten(1, (channels, frames, -1))[:, :, 0].flatten(1)
        cut = {}
        patches = torch.split(one_frame, grids.prod(-1).tolist())
        for key, pixels, grid in zip(images, patches, grids, strict=True):
            # Copies: an image that is kept must not hold the pixels of all of them in memory.
            cut[key] = EncodedImage(pixels.clone(), grid.clone())
            kept.put(key, cut[key], cut[key].nbytes)
        return cut

    def _encode(
        self, prompts: Sequence[tuple[Row, list[bytes]]], images: Mapping[bytes, EncodedImage]
    ) -> list[EncodedPrompt]:
        if not prompts:
            return []
        texts = [self.chat_text(row) for row, _ in prompts]
        with self._tokenizing:
            all_token_ids = self.processor.tokenizer(texts)["input_ids"]
        result = []
        for token_ids, (_, keys) in zip(map(torch.tensor, all_token_ids), prompts, strict=True):
            if not keys:
                no_types = torch.zeros_like(token_ids, dtype=torch.int32)
                result.append(EncodedPrompt(token_ids, no_types, None, None))
                continue
            own = [images[key] for key in keys]
            grids = torch.stack([image.grid_thw for image in own])
            counts = torch.ones_like(token_ids)
            is_image = token_ids == self.processor.image_token_id
            counts[is_image] = grids.prod(-1) // self.processor.merge_size**2
            token_ids = token_ids.repeat_interleave(counts)
            result.append(
                EncodedPrompt(
                    token_ids=token_ids,
                    token_types=(token_ids == self.processor.image_token_id).int(),
                    pixels=join_pixels(own),
                    image_grid_thw=grids,
                    image_keys=tuple(keys),
                    normalizer=self._normalizer,
                )
            )
        return result


@contextlib.contextmanager
def _naming(row: Row, number: int) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # PIL raises many types for a broken file
        raise UserError(f"{row.where}: image {number} cannot be read ({error})") from error


def text_or_file(value: str | None, key: str) -> str | None:
    """The text itself, or the content of the file that it names; a UserError where that cannot be read, or is
    not there and the text looks like a file name (one line that ends in .jinja, .j2, .txt or .md)."""
    if not value:
        return None
    try:
        if len(value) < 4096 and "\n" not in value and Path(value).is_file():
            return Path(value).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{key}: {value} cannot be read ({error})") from error
    if re.fullmatch(r"\S+\.(jinja2?|j2|txt|md)", value):
        raise UserError(f"{key}: there is no file {value}")
    return value


def _prompt_template(source: str | None) -> jinja2.Template | None:
    """``data.prompt_template``, tried once."""
    if source is None:
        return None
    environment = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined)
    try:
        template = environment.from_string(source)
        tried = template.render(content="2 + 3 = ?")
    except jinja2.TemplateError as error:
        raise UserError(f"data.prompt_template cannot be rendered: {error}") from error
    if "2 + 3 = ?" not in tried:
        raise UserError("data.prompt_template leaves the question out: it must use {{ content }}")
    return template
