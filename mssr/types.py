"""The records that travel between the rooms: prompt rows, rollouts, training batches.

Batches are ragged: one flat array of tokens and the offsets of the sequences in it. Nothing is
padded. P is a prompt's length in tokens (vision placeholders included), T a response's, B the
number of rollouts in a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How responses are sampled; the same for every request of a call."""

    temperature: float
    """Divides the logits, > 0. Ignored when ``greedy``."""
    max_tokens: int
    """Longest response in tokens, the end token included."""
    greedy: bool = False
    """Take the most likely token at every position (used by validation)."""


@dataclass(frozen=True)  # with slots, pickling would run Python for every one of thousands
class RolloutRequest:
    """One response to be generated. Example: ``RolloutRequest("a1b2", sample_index=0, seed=77)``"""

    prompt_id: str
    """Which row of the data set."""
    sample_index: int
    """0 .. n-1, for the n responses of a prompt."""
    seed: int
    """Seed of this response alone, see `mssr.rollout.seeds.request_seed`."""


@dataclass(frozen=True)  # likewise
class Rollout:
    """One generated response.

    Example: ``Rollout("a1b2", 0, prompt_token_ids=[5, 9], response_token_ids=[4, 2],
    log_probs=[-0.1, -1.3], finish_reason="stop", policy_version=3, text="8")``
    """

    prompt_id: str
    sample_index: int
    prompt_token_ids: npt.NDArray[np.int32]
    """(P,) as the engine saw the prompt, one placeholder token for every merged vision patch."""
    response_token_ids: npt.NDArray[np.int32]
    """(T,) the sampled tokens, the end token included when there is one."""
    log_probs: npt.NDArray[np.float32]
    """(T,) the engine's log-probs (nats) after temperature and token bans."""
    finish_reason: str
    """"stop" (end token) or "length" (cut at max_tokens)."""
    policy_version: int
    """Number of weight updates the engine had received."""
    text: str
    """The response without special tokens."""


@dataclass(frozen=True)
class PackedRollouts:
    """K rollouts as few arrays, for the way to the driver and for checkpoints; see `Rollout`.

    To restore an array costs about as much as the rest of a rollout, and a step has thousands. So the P
    tokens of every prompt, and the T tokens and log-probs of every response, are laid end to end.
    """

    prompt_ids: list[str]
    texts: list[str]
    finish_reasons: list[str]
    sample_indices: list[int]
    policy_versions: list[int]
    prompt_lengths: npt.NDArray[np.int64]
    """(K,) P of each."""
    prompt_tokens: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int64]
    """(K,) T of each."""
    tokens: npt.NDArray[np.int32]
    log_probs: npt.NDArray[np.float32]

    @classmethod
    def of(cls, rollouts: Sequence[Rollout]) -> PackedRollouts:
        """At least one rollout."""
        return cls(
            prompt_ids=[r.prompt_id for r in rollouts],
            texts=[r.text for r in rollouts],
            finish_reasons=[r.finish_reason for r in rollouts],
            sample_indices=[r.sample_index for r in rollouts],
            policy_versions=[r.policy_version for r in rollouts],
            prompt_lengths=np.array([len(r.prompt_token_ids) for r in rollouts], np.int64),
            prompt_tokens=np.concatenate([r.prompt_token_ids for r in rollouts]),
            lengths=np.array([len(r.response_token_ids) for r in rollouts], np.int64),
            tokens=np.concatenate([r.response_token_ids for r in rollouts]),
            log_probs=np.concatenate([r.log_probs for r in rollouts]),
        )

    def unpack(self) -> list[Rollout]:
        """The rollouts, whose arrays are parts of the packed ones: who keeps one keeps all of them."""
        ends = np.cumsum(self.lengths)[:-1]
        columns = (
            self.prompt_ids,
            self.sample_indices,
            np.split(self.prompt_tokens, np.cumsum(self.prompt_lengths)[:-1]),
            np.split(self.tokens, ends),
            np.split(self.log_probs, ends),
            self.finish_reasons,
            self.policy_versions,
            self.texts,
        )
        return [Rollout(*values) for values in zip(*columns, strict=True)]


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """The rollouts of one step with their learning signal, ragged.

    Example, two rollouts of prompt lengths 2 and 1 and response lengths 1 and 2:
    ``tokens=[5, 9, 2, 5, 4, 2], offsets=[0, 3, 6], prompt_lengths=[2, 1]``.
    """

    prompt_ids: tuple[str, ...]
    """(B,) row ids; workers read the pixels themselves."""
    tokens: npt.NDArray[np.int32]
    """(sum of P + T,) prompt and response of each rollout, one after the other."""
    offsets: npt.NDArray[np.int64]
    """(B + 1,) where each rollout starts in ``tokens``."""
    prompt_lengths: npt.NDArray[np.int64]
    """(B,) tokens of the prompt."""
    advantages: npt.NDArray[np.float32]
    """(B,) sequence-level advantage, normalised, before shaping."""
    engine_log_probs: npt.NDArray[np.float32]
    """(sum of T,) the engine's log-probs: the mismatch metric, and rollout correction."""
    token_advantages: npt.NDArray[np.float32] | None = None
    """(sum of T,) in place of ``advantages`` where those of a response's tokens differ (KL in the reward)."""
    old_log_probs: npt.NDArray[np.float32] | None = None
    """(sum of T,) under the policy before the step, if they are known already."""
    reference_log_probs: npt.NDArray[np.float32] | None = None
    """(sum of T,) under the frozen base model, if they are known already."""
    kl_coef: float = 0.0
    """Weight of the KL to the reference in this step's loss."""
    entropy_alpha: float = 0.0
    """Weight of confident tokens in this step's control of entropy, in [-1, 1]."""

    @classmethod
    def of(cls, rollouts: Sequence[Rollout]) -> TrainBatch:
        """At least one rollout, laid end to end; their advantages are 0 as long as nobody knows them."""
        tokens = [part for r in rollouts for part in (r.prompt_token_ids, r.response_token_ids)]
        prompt_lengths = np.array([len(r.prompt_token_ids) for r in rollouts], np.int64)
        lengths = prompt_lengths + [len(r.response_token_ids) for r in rollouts]
        return cls(
            prompt_ids=tuple(r.prompt_id for r in rollouts),
            tokens=np.concatenate(tokens),
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            prompt_lengths=prompt_lengths,
            advantages=np.zeros(len(rollouts), np.float32),
            engine_log_probs=np.concatenate([r.log_probs for r in rollouts]),
        )

    def __len__(self) -> int:
        return len(self.prompt_ids)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """(B,) tokens of prompt and response."""
        return np.diff(self.offsets)

    @property
    def response_lengths(self) -> npt.NDArray[np.int64]:
        """(B,) tokens of the response."""
        return self.lengths - self.prompt_lengths

    @property
    def response_offsets(self) -> npt.NDArray[np.int64]:
        """(B + 1,) where each response starts in an array over response tokens only."""
        return np.concatenate([[0], np.cumsum(self.response_lengths)])


@dataclass(frozen=True, slots=True)
class TokenLogProbs:
    """Log-probs (nats) of response tokens under the actor's models: of a whole batch, or of one response."""

    policy: npt.NDArray[np.float32]
    """(sum of T,) of the policy as it is."""
    reference: npt.NDArray[np.float32] | None
    """(sum of T,) of the frozen base model, where asked for."""

    def split(self, rollouts: Sequence[Rollout]) -> list[TokenLogProbs]:
        """Those of a batch by its rollouts."""
        ends = np.cumsum([len(r.response_token_ids) for r in rollouts])[:-1]
        policy = np.split(self.policy, ends)
        if self.reference is None:
            return [TokenLogProbs(p, None) for p in policy]
        return [TokenLogProbs(p, r) for p, r in zip(policy, np.split(self.reference, ends), strict=True)]

    @classmethod
    def join(cls, parts: Sequence[TokenLogProbs]) -> TokenLogProbs:
        """Those of a batch from those of its rollouts, at least one; the inverse of `split`."""
        references = [part.reference for part in parts if part.reference is not None]
        return cls(
            np.concatenate([part.policy for part in parts]),
            np.concatenate(references) if references else None,
        )


@dataclass(frozen=True, slots=True)
class RankLogProbs(TokenLogProbs):
    """What one rank has computed of a batch's log-probs."""

    sequences: npt.NDArray[np.int64]
    """(K,) the rollouts, by their index in the batch, in the order of the values."""
