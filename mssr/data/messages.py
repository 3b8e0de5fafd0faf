"""Message lists, as chat data have them -> turns of text with <image> marks, and the images inside.

Forms: ``{"role": "user", "content": ...}`` (OpenAI, verl, swift, TRL) and ``{"from": "human", "value": ...}``
(ShareGPT, LLaVA, VLM-R1). A content is text or a list of parts of text and images; the list may be JSON text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mssr.data.images import inner_image

IMAGE_MARK = "<image>"
"""What stands for an image in a text."""
PART_MARK = "\ufdd0"
"""The same where <image> is text like any other (``data.image_marks=literal``); no text has this character,
which Unicode keeps from being one."""

ROLES = {
    **{"system": "system", "developer": "system", "user": "user", "human": "user"},
    **{"assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant"},
}
"""Names of roles -> the one that chat templates know."""

Turn = tuple[str, str]
"""Role and text, with a mark for every image."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """A prompt. Example: ``Conversation("<image>How many?", (("system", "Be brief."),), reply="4")``"""

    question: str
    """The last turn of the user."""
    history: tuple[Turn, ...] = ()
    """The turns before it."""
    reply: str | None = None
    """The assistant's turn behind it: no part of the prompt."""
    images: tuple[Any, ...] = ()
    """Image cells of those parts that have one inside, in order."""
    mark: str = IMAGE_MARK
    """What stands for an image in question and history."""

    @property
    def turns(self) -> tuple[Turn, ...]:
        return (*self.history, ("user", self.question))


def is_messages(cell: Any) -> bool:
    """Whether a cell is a list of messages, or the JSON text of one."""
    messages = _list(cell)
    return bool(messages) and all(
        isinstance(m, dict) and ("content" in m if "role" in m else "from" in m and "value" in m)
        for m in messages
    )


def read_messages(cell: Any, column: str, mark: str = IMAGE_MARK) -> Conversation:
    """The prompt that a list of messages is, with a mark for every part that is an image; a ValueError names
    the column and what is wrong, for example a role or kind of part that is not known."""
    turns: list[Turn] = []
    images: list[Any] = []
    for message in _list(cell):
        keys = ("role", "content") if "role" in message else ("from", "value")
        name, content = (message[key] for key in keys)
        role = ROLES.get(str(name).lower())
        if role is None:
            raise ValueError(f"column {column} has a turn of the role {name!r}: one of {', '.join(ROLES)}")
        text, inside = _content(content, column, mark)
        turns.append((role, text))
        images += inside
    last = max((k for k, (role, _) in enumerate(turns) if role == "user"), default=-1)
    if last < 0:
        raise ValueError(f"column {column} has no turn of the user")
    behind = turns[last + 1 :]
    if len(behind) > 1 or any(role != "assistant" for role, _ in behind):
        raise ValueError(
            f"column {column} has behind the user's last turn not one of the assistant, but "
            + ", ".join(role for role, _ in behind)
        )
    reply = behind[0][1] if behind else None
    return Conversation(turns[last][1], tuple(turns[:last]), reply, tuple(images), mark)


def count_marks(turns: Iterable[Turn], mark: str = IMAGE_MARK) -> int:
    """How many images the turns show."""
    return sum(text.count(mark) for _, text in turns)


def parts_of(text: str, mark: str = IMAGE_MARK) -> list[dict[str, Any]]:
    """A turn as chat templates take it."""
    parts: list[dict[str, Any]] = []
    for k, part in enumerate(text.split(mark)):
        if k:
            parts.append({"type": "image"})
        if part:
            parts.append(text_part(part))
    return parts


def text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _list(cell: Any) -> list[Any]:
    if isinstance(cell, str) and cell[:50].lstrip()[:1] == "[" and '"' in cell:
        try:
            cell = json.loads(cell)
        except ValueError:
            return []
    return list(cell) if isinstance(cell, (list, tuple)) else []


def _content(content: Any, column: str, mark: str) -> tuple[str, list[Any]]:
    """The text of a turn, and its images as far as they are inside."""
    if content is None or isinstance(content, str):
        return content or "", []
    texts: list[str] = []
    images: list[Any] = []
    for part in content if isinstance(content, (list, tuple)) else [content]:
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        image = inner_image(part) if isinstance(part, dict) else None
        if kind in ("text", "input_text") or (kind is None and isinstance(part.get("text"), str)):
            texts.append(part.get("text") or "")
        elif kind in ("image", "image_url", "input_image") or (kind is None and image):
            texts.append(mark)
            images += [image] if image else []
        else:
            raise ValueError(f"column {column} has a part of the type {kind!r}; text and image are read")
    return "".join(texts), images
