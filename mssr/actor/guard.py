"""What happens to an update that is not finite: skipped, counted, dumped; repeated, it ends the run.

A dump is two files in ``<run_dir>/nonfinite``, named by step (as in metrics.jsonl), update of the step (from
1) and rank:

    step-000012-update-1-rank-0.json          which sequences, what was not finite in each, and parameters
    step-000012-update-1-rank-0.safetensors   their arrays, flat, laid end to end in the order of the JSON

Whether something is not finite is found out on the device, and looked at together with the gradient norm, for
which the rank waits in any case.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch

from mssr.actor.distributed import local_tensor
from mssr.algorithms.objective import TokenBatch
from mssr.errors import TrainingError
from mssr.models.files import replace_bytes, replace_text
from mssr.types import TrainBatch

MAX_SEQUENCES = 64
"""Sequences in a dump; the JSON says how many more there were."""
MAX_DUMPS = 8
"""Dumps of a rank in a run directory; later ones are only logged."""
ARRAYS = {
    "log_prob": "log_probs",
    "entropy": "entropy",
    "loss": "loss",
    "advantage": "advantages",
    "old_log_prob": "old_log_probs",
    "engine_log_prob": "engine_log_probs",
    "reference_log_prob": "reference_log_probs",
}
"""What is looked at in every response token: its name as a reason, and the name of its array."""

_log = logging.getLogger(__name__)


Observed = dict[int, dict[str, np.ndarray]]
"""Sequence -> (T,) values of its response tokens, by the names of `ARRAYS`."""


class NonFiniteGuard:
    """Watches the passes of an update; on every rank, with the same calls.

    Args:
        directory: where dumps go; made when there is one to write.
        max_in_a_row: skipped updates in a row that end the run.

    Attributes:
        in_a_row: updates skipped since the last one that was finite.
    """

    def __init__(self, directory: Path, rank: int, max_in_a_row: int, device: torch.device) -> None:
        self._directory = directory.absolute()
        self._rank = rank
        self._max_in_a_row = max_in_a_row
        self._device = device
        # Sequences, and the (N,) values of their response tokens, by the names of `ARRAYS`, on the device.
        self._passes: list[tuple[tuple[int, ...], dict[str, torch.Tensor]]] = []
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
            sequences: indices into the step's batch.
            tokens: the N of these.
            log_probs, entropy, loss: (N,) as the pass gave them, the loss before aggregation.
        """
        ours, old = (log_probs, entropy, loss), tokens.old_log_probs
        given = (*ours, tokens.advantages, old, tokens.engine_log_probs, tokens.reference_log_probs)
        values = {name: v.detach() for name, v in zip(ARRAYS, given, strict=True) if v is not None}
        self._passes.append((sequences, values))

    def flag(self) -> torch.Tensor:
        """() float32 on the device: 1 if something in a sequence of this rank is not finite, else 0."""
        finite = [torch.isfinite(v).all() for _, of in self._passes for v in of.values()]
        return 1 - torch.stack(finite).all().float() if finite else torch.zeros((), device=self._device)

    def skipped(
        self,
        batch: TrainBatch,
        step: int,
        update: int,
        norm: float,
        flagged: bool,
        parameters: Iterable[tuple[str, torch.nn.Parameter]],
    ) -> None:
        """Count, log and dump an update that is skipped.

        Args:
            step: as in metrics.jsonl.
            update: of the step, from 1.
            norm: of the gradient.
            flagged: whether a sequence of some rank shows something that is not finite.
            parameters: by name, with the gradients as they were before clipping.

        Raises:
            TrainingError: it is the last that ``max_in_a_row`` allows.
        """
        self.in_a_row += 1
        observed = self._observed(batch)
        bad = {s: [n for n, v in of.items() if not np.isfinite(v).all()] for s, of in observed.items()}
        # Where no sequence of any rank shows anything, it is the gradient of one of them.
        reasons = {s: found or ["gradient"] for s, found in bad.items() if found or not flagged}
        ids = list(dict.fromkeys(batch.prompt_ids[s] for s in reasons))
        if not flagged:
            cause = "no sequence shows anything non-finite"
        elif ids:
            cause = f"{len(ids)} prompts with something non-finite: {', '.join(ids[:20])}"
        else:
            cause = "the prompts are on another rank"
        text = f"gradient norm {norm}; {cause}"
        gradients = {name: local_tensor(p.grad) for name, p in parameters if p.grad is not None}
        report = {
            "step": step,
            "update": update,
            "rank": self._rank,
            "gradient_norm": str(norm),  # JSON knows no NaN
            "sequences": [
                {"index": s, "prompt_id": batch.prompt_ids[s], "nonfinite": found}
                for s, found in itertools.islice(reasons.items(), MAX_SEQUENCES)
            ],
            "left_out": max(0, len(reasons) - MAX_SEQUENCES),
            "parameters": [name for name, g in gradients.items() if not torch.isfinite(g).all()],
        }
        where = self._dump(report, batch, observed) if reasons else "no dump"
        _log.warning(
            "step %d, update %d, rank %d: not finite, update skipped (%s); %s",
            *(step, update, self._rank, text, where),
        )
        if self.in_a_row >= self._max_in_a_row:
            raise TrainingError(
                f"{self.in_a_row} updates in a row were not finite, the last one in step {step} "
                f"({text}); see {self._directory}; actor.max_nonfinite_updates is how many are borne"
            )

    def _observed(self, batch: TrainBatch) -> Observed:
        observed: Observed = {}
        for sequences, of_pass in self._passes:
            ends = np.cumsum(batch.response_lengths[list(sequences)])[:-1]
            for name, values in of_pass.items():
                parts = np.split(values.double().cpu().numpy(), ends)
                for s, part in zip(sequences, parts, strict=True):
                    observed.setdefault(s, {})[name] = part
        return observed

    def _dump(self, report: dict[str, Any], batch: TrainBatch, observed: Observed) -> str:
        """Write both files, if the disk takes them: no reason to end a run. Returns a note for the log."""
        name = f"step-{report['step']:06d}-update-{report['update']}-rank-{self._rank}"
        sequences = [sequence["index"] for sequence in report["sequences"]]
        arrays = {
            "sequences": np.array(sequences, np.int64),
            "tokens": np.concatenate([batch.tokens[slice(*batch.offsets[s : s + 2])] for s in sequences]),
            "prompt_lengths": batch.prompt_lengths[sequences].astype(np.int64),
            "response_lengths": batch.response_lengths[sequences].astype(np.int64),
        }
        for key in observed[sequences[0]]:
            values = np.concatenate([observed[s][key] for s in sequences])
            arrays[ARRAYS[key]] = values.astype(np.float32)
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            earlier = {p.stem for p in self._directory.glob(f"step-*-rank-{self._rank}.json")} - {name}
            if len(earlier) >= MAX_DUMPS:
                return f"no dump, {self._directory} holds {len(earlier)} of this rank"
            replace_bytes(self._directory / f"{name}.safetensors", safetensors.numpy.save(arrays))
            replace_text(self._directory / f"{name}.json", json.dumps(report, indent=1) + "\n")
        except OSError as error:
            return f"no dump, {self._directory} cannot be written ({error.strerror or error})"
        return f"dumped as {self._directory / name}.json"
