"""What happens to an update that is not finite: skipped, counted, dumped; repeated, it ends the run.

A dump is two files in ``<run_dir>/nonfinite``, named by step (as in metrics.jsonl), update of the step (from
1) and rank:

    step-000012-update-1-rank-0.json          which sequences, what was not finite in each, and parameters
    step-000012-update-1-rank-0.safetensors   their arrays, flat, laid end to end in the order of the JSON

The flags are made on the device while the passes run, and looked at together with the gradient norm, for
which the rank waits in any case.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch

from mssr.algorithms.objective import TokenBatch
from mssr.errors import TrainingError
from mssr.types import TrainBatch

MAX_SEQUENCES = 64
"""Sequences in a dump; the JSON says how many more there were."""
MAX_DUMPS = 8
"""Dumps of a rank in a run directory; later ones are only logged."""
ARRAYS = (
    ("log_prob", "log_probs"),
    ("entropy", "entropy"),
    ("loss", "loss"),
    ("advantage", "advantages"),
    ("old_log_prob", "old_log_probs"),
    ("engine_log_prob", "engine_log_probs"),
    ("reference_log_prob", "reference_log_probs"),
)
"""What is looked at in every response token: its name as a reason, and the name of its array."""
GRADIENT = "gradient"
"""The reason where no sequence of any rank shows anything and still the gradient is not finite."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Pass:
    """One pass, all on the device."""

    sequences: tuple[int, ...]
    values: tuple[torch.Tensor | None, ...]
    """(N,) of its response tokens, in the order of `ARRAYS`; None where there is none."""
    flags: torch.Tensor
    """(S, len(ARRAYS)) int32 tokens of each sequence that are not finite."""


@dataclass(frozen=True, slots=True)
class Skipped:
    """An update that was not made. Example: ``Skipped(step=12, update=1, norm=nan, flagged=True)``"""

    step: int
    """As in metrics.jsonl."""
    update: int
    """Of the step, from 1."""
    norm: float
    """Of the gradient."""
    flagged: bool
    """Whether a sequence of some rank shows something that is not finite."""


class NonFiniteGuard:
    """Watches the passes of an update; on every rank, with the same calls.

    Args:
        directory: where dumps go; made when there is one to write.
        max_in_a_row: skipped updates in a row that end the run.
    """

    def __init__(self, directory: Path, rank: int, max_in_a_row: int, device: torch.device) -> None:
        self._directory = directory.absolute()
        self._rank = rank
        self._max_in_a_row = max_in_a_row
        self._device = device
        self._passes: list[_Pass] = []
        self.in_a_row = 0

    def begin(self) -> None:
        """A new update starts."""
        self._passes = []

    @torch.no_grad()
    def observe(
        self,
        sequences: tuple[int, ...],
        tokens: TokenBatch,
        log_probs: torch.Tensor,
        entropy: torch.Tensor,
        loss: torch.Tensor,
    ) -> None:
        """Remember a pass that counts. Waits for nothing.

        Args:
            sequences: S indices into the step's batch.
            tokens: of them, N in all.
            log_probs, entropy, loss: (N,) as the pass gave them, the loss before aggregation.
        """
        values = (
            log_probs.detach(),
            entropy.detach(),
            loss.detach(),
            tokens.advantages,
            tokens.old_log_probs,
            tokens.engine_log_probs,
            tokens.reference_log_probs,
        )
        none = torch.zeros_like(loss, dtype=torch.bool)
        bad = torch.stack([none if v is None else ~torch.isfinite(v) for v in values], dim=1)
        # With the size given, repeat_interleave need not ask the device for it.
        owner = torch.arange(len(sequences), device=loss.device)
        owner = owner.repeat_interleave(tokens.lengths, output_size=len(loss))
        flags = torch.zeros(len(sequences), len(values), dtype=torch.int32, device=loss.device)
        self._passes.append(_Pass(sequences, values, flags.index_add_(0, owner, bad.int())))

    def flag(self) -> torch.Tensor:
        """() float32 on the device: 1 if something in a sequence of this rank is not finite, else 0."""
        if not self._passes:
            return torch.zeros((), device=self._device)
        return torch.cat([p.flags for p in self._passes]).any().float()

    def passed(self) -> None:
        """The update was finite."""
        self.in_a_row = 0

    def skipped(
        self, update: Skipped, batch: TrainBatch, parameters: Iterable[tuple[str, torch.nn.Parameter]]
    ) -> None:
        """Count, log and dump an update that is skipped.

        Args:
            parameters: by name, with the gradients as they were before clipping.

        Raises:
            TrainingError: it is the last that ``max_in_a_row`` allows.
        """
        self.in_a_row += 1
        reasons = self._reasons(update.flagged)
        ids = list(dict.fromkeys(batch.prompt_ids[s] for s in reasons))
        if not update.flagged:
            cause = "no sequence shows anything non-finite"
        elif ids:
            cause = f"{len(ids)} prompts with something non-finite: {', '.join(ids[:20])}"
        else:
            cause = "the prompts are on another rank"
        text = f"gradient norm {update.norm}; {cause}"
        where = self._dump(update, batch, reasons, _nonfinite_gradients(parameters)) if reasons else "no dump"
        _log.warning(
            "step %d, update %d, rank %d: not finite, update skipped (%s); %s",
            *(update.step, update.update, self._rank, text, where),
        )
        if self.in_a_row >= self._max_in_a_row:
            raise TrainingError(
                f"{self.in_a_row} updates in a row were not finite, the last one in step {update.step} "
                f"({text}); see {self._directory}; actor.max_nonfinite_updates is how many are borne"
            )

    def _reasons(self, flagged: bool) -> dict[int, list[str]]:
        """Offending sequences of this rank -> what is not finite in them."""
        names = [name for name, _ in ARRAYS]
        reasons: dict[int, list[str]] = {}
        for p in self._passes:
            for sequence, row in zip(p.sequences, p.flags.tolist(), strict=True):
                found = [name for name, count in zip(names, row, strict=True) if count]
                if found or not flagged:
                    reasons[sequence] = found or [GRADIENT]
        return reasons

    def _dump(
        self, update: Skipped, batch: TrainBatch, reasons: dict[int, list[str]], parameters: list[str]
    ) -> str:
        """Write both files, if the disk takes them: no reason to end a run. Returns a note for the log."""
        name = f"step-{update.step:06d}-update-{update.update}-rank-{self._rank}"
        kept = list(reasons)[:MAX_SEQUENCES]
        report = {
            "step": update.step,
            "update": update.update,
            "rank": self._rank,
            "gradient_norm": str(update.norm),  # JSON knows no NaN
            "sequences": [
                {"index": s, "prompt_id": batch.prompt_ids[s], "nonfinite": reasons[s]} for s in kept
            ],
            "left_out": len(reasons) - len(kept),
            "parameters": parameters,
        }
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            earlier = {p.stem for p in self._directory.glob(f"step-*-rank-{self._rank}.json")} - {name}
            if len(earlier) >= MAX_DUMPS:
                return f"no dump, {self._directory} holds {len(earlier)} of this rank"
            arrays = safetensors.numpy.save(self._arrays(batch, kept))
            _write(self._directory / f"{name}.safetensors", arrays)
            _write(self._directory / f"{name}.json", (json.dumps(report, indent=1) + "\n").encode())
        except OSError as error:
            return f"no dump, {self._directory} cannot be written ({error.strerror or error})"
        return f"dumped as {self._directory / name}.json"

    def _arrays(self, batch: TrainBatch, sequences: Sequence[int]) -> dict[str, np.ndarray]:
        """The sequences' tokens and, over their response tokens, all of `ARRAYS`."""
        parts = {s: part for p in self._passes for s, part in _by_sequence(p, batch).items()}
        index = np.asarray(sequences, np.int64)
        spans = [slice(batch.offsets[s], batch.offsets[s + 1]) for s in sequences]
        arrays = {
            "sequences": index,
            "tokens": np.concatenate([batch.tokens[span] for span in spans]),
            "prompt_lengths": batch.prompt_lengths[index].astype(np.int64),
            "response_lengths": batch.response_lengths[index].astype(np.int64),
        }
        for k, (_, name) in enumerate(ARRAYS):
            found = [parts[s][k] for s in sequences]
            present = [x for x in found if x is not None]
            if present:
                arrays[name] = np.concatenate(present).astype(np.float32)
        return arrays


def _by_sequence(p: _Pass, batch: TrainBatch) -> dict[int, list[np.ndarray | None]]:
    """Sequence -> (T,) arrays in the order of `ARRAYS`, on the host."""
    ends = np.cumsum(batch.response_lengths[list(p.sequences)])[:-1]
    columns = [
        [None] * len(p.sequences) if v is None else np.split(v.float().cpu().numpy(), ends) for v in p.values
    ]
    return {s: [column[k] for column in columns] for k, s in enumerate(p.sequences)}


def _nonfinite_gradients(parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> list[str]:
    """Names of parameters whose gradient, the part that this rank holds, is not finite."""
    named = [(n, _local(p.grad)) for n, p in parameters if p.grad is not None]
    if not named:
        return []
    finite = torch.stack([torch.isfinite(gradient).all() for _, gradient in named]).tolist()
    return [name for (name, _), ok in zip(named, finite, strict=True) if not ok]


def _local(gradient: Any) -> torch.Tensor:
    return gradient.to_local() if hasattr(gradient, "to_local") else gradient


def _write(path: Path, data: bytes) -> None:
    """All of it or nothing."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
