"""Prompts that engines have encoded, on their way to the ranks.

An engine puts them into Ray's object store when it returns rollouts, the driver keeps references only, and a
rank gets what its passes need from there: on the same machine through shared memory. What is lost on the way,
with an engine that died, the rank encodes itself.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mssr.errors import first_line
from mssr.models.bounded_cache import BoundedCache
from mssr.models.cost import home
from mssr.rollout import heartbeat

if TYPE_CHECKING:
    from mssr.models.encoded import EncodedPrompt, PromptArrays

FETCH_TIMEOUT_S = 30.0
"""Longest that a rank waits for prompts that come from another machine."""

NEIGHBOURS = 8
"""Ranks, one after the other, that are likely to be on one machine."""
TOGETHER = 64
"""Prompts that are shared as one object."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SharedPrompts:
    """Some prompts in the object store."""

    reference: Any
    """To their `PromptArrays` by id."""
    sizes: dict[str, int]
    """Bytes of each."""


def share(prompts: Mapping[str, EncodedPrompt]) -> SharedPrompts:
    """Put prompts into the object store."""
    import ray

    reference = ray.put({prompt_id: prompt.arrays() for prompt_id, prompt in prompts.items()})
    return SharedPrompts(reference, {prompt_id: prompt.nbytes for prompt_id, prompt in prompts.items()})


class PromptOutbox:
    """The prompts that an engine is going to share. Those that one machine is likely to want go together, so
    that others need not fetch them; and many go together, because the driver has work with each object.

    Args:
        ranks: of the actor; with none nothing is shared.
    """

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._waiting: dict[int, dict[str, EncodedPrompt]] = {}

    def share(self, prompts: Mapping[str, EncodedPrompt], everything: bool) -> list[SharedPrompts]:
        """Add prompts, and share what has come together; with ``everything`` all of it."""
        if self._ranks:
            for prompt_id, prompt in prompts.items():
                machine = home(prompt_id) % self._ranks // NEIGHBOURS
                self._waiting.setdefault(machine, {})[prompt_id] = prompt
        ready = [k for k, waiting in self._waiting.items() if everything or len(waiting) >= TOGETHER]
        return [share(self._waiting.pop(k)) for k in ready]


class PromptShelf:
    """What the driver knows of shared prompts, from their generation to their update.

    Args:
        max_bytes: of prompts that are held in the object store.
    """

    def __init__(self, max_bytes: int) -> None:
        self._references: BoundedCache[str, Any] = BoundedCache(max_bytes)

    def add(self, prompts: SharedPrompts) -> None:
        for prompt_id, nbytes in prompts.sizes.items():
            self._references.put(prompt_id, prompts.reference, nbytes)

    def fetcher(self, prompt_ids: Iterable[str]) -> PromptFetcher:
        """Gets those of some prompts that are shared."""
        found = ((i, self._references.get(i)) for i in prompt_ids)
        return PromptFetcher({i: reference for i, reference in found if reference is not None})

    def drop(self, prompt_ids: Iterable[str]) -> None:
        for prompt_id in prompt_ids:
            self._references.pop(prompt_id)


class PromptFetcher:
    """Gets shared prompts for a rank, see `mssr.actor.prompts.Prepared`. Travels there with a batch.

    Args:
        references: by prompt, to the `PromptArrays` of it and others.
    """

    def __init__(self, references: Mapping[str, Any]) -> None:
        self._references = references
        self._fetched: dict[Any, dict[str, PromptArrays]] = {}

    def __call__(self, prompt_ids: Sequence[str]) -> dict[str, EncodedPrompt]:
        from mssr.models.encoded import EncodedPrompt

        wanted = {i: self._references[i] for i in prompt_ids if i in self._references}
        for reference in dict.fromkeys(wanted.values()):
            if reference not in self._fetched:
                self._fetched[reference] = _fetch(reference)
        return {
            i: EncodedPrompt.from_arrays(self._fetched[reference][i])
            for i, reference in wanted.items()
            if i in self._fetched[reference]
        }


def _fetch(reference: Any) -> dict[str, PromptArrays]:
    """What a reference leads to; nothing where it is lost."""
    import ray

    heartbeat.beat()
    try:
        return dict(ray.get(reference, timeout=FETCH_TIMEOUT_S))
    except ray.exceptions.RayError as error:
        # Its engine died, or the network is slow: the prompts are encoded here.
        logger.warning("prompts of an engine are encoded again: %s", first_line(error))
        return {}
