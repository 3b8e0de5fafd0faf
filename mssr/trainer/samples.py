"""The recorder: responses of a step with what the method made of them, and the report that shows them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from mssr.data.dataset import PromptDataset
from mssr.data.images import ImageSource
from mssr.errors import first_line
from mssr.models.files import replace_bytes
from mssr.runs.html import thumbnail
from mssr.runs.jsonl import write_samples
from mssr.runs.plot import write_report
from mssr.runs.samples import IMAGE_SIDE, choose_train, choose_validation, earlier_scores, samples_file
from mssr.trainer.collect import Collected
from mssr.types import Rollout, TrainBatch


class SampleRecorder:
    """Writes samples at once, and images and report in a thread of its own, so that no step waits for them.

    A report that cannot be written costs a line, not the run.

    Args:
        failed: told why.
    """

    def __init__(self, run_dir: Path, failed: Callable[[str], None]) -> None:
        self._run_dir, self._failed = run_dir, failed
        self._thread = ThreadPoolExecutor(1, "report")
        self._writing: Future[None] | None = None
        self._images: dict[str, ImageSource] = {}
        """File below the run directory -> the image that is to be written to it."""

    def __enter__(self) -> SampleRecorder:
        return self

    def __exit__(self, *_: object) -> None:
        self._finish()
        self._thread.shutdown()
        self._write_images(self._images)

    def train(
        self,
        step: int,
        dataset: PromptDataset,
        collected: Collected,
        batch: TrainBatch,
        expected: np.ndarray | None,
    ) -> None:
        """Record the extremes of a step, and prompts that are followed.

        Args:
            batch: of the collected rollouts.
            expected: (B,) baseline of each rollout's prompt before the step; None for a method without.
        """
        # Of tokens with advantages of their own there is none for a response.
        known = batch.token_advantages is None
        chosen = choose_train(collected.prompt_ids, collected.scores, batch.advantages)
        facts = [
            {"advantage": float(batch.advantages[i]) if known else None}
            | ({} if expected is None else {"baseline": float(expected[i])})
            for i in chosen
        ]
        indices = list(chosen)
        rollouts = [collected.rollouts[i] for i in indices]
        records = self._records("train", dataset, rollouts, collected.scores[indices])
        shown = zip(records, facts, chosen.items(), strict=True)
        lines = [r | f | self._shown(dataset, collected.rollouts[i], why) for r, f, (i, why) in shown]
        write_samples(samples_file(self._run_dir, step), lines, "train")

    def validation(
        self, step: int, split: str, dataset: PromptDataset, rollouts: Sequence[Rollout], scores: np.ndarray
    ) -> None:
        """Record all responses of a validation set; the report shows those of some prompts.

        Args:
            scores: (B,), NaN for a response without one.
        """
        records = self._records(split, dataset, rollouts, scores)
        ids = [record["id"] for record in records]
        chosen = choose_validation(ids, scores, earlier_scores(self._run_dir, split, step))
        for index, why in chosen.items():
            records[index] |= self._shown(dataset, rollouts[index], why)
        write_samples(samples_file(self._run_dir, step), records, split)

    def begin_report(self) -> None:
        """Have images and report written; where the last report is not done, the next one shows both."""
        if self._writing is None or self._writing.done():
            self._finish()
            images, self._images = self._images, {}
            self._writing = self._thread.submit(self._write, images)

    def _write(self, images: Mapping[str, ImageSource]) -> None:
        self._write_images(images)
        write_report(self._run_dir, under_way=True)

    def _write_images(self, images: Mapping[str, ImageSource]) -> None:
        for name, source in images.items():
            path = self._run_dir / name
            if not path.is_file():
                with contextlib.suppress(OSError, ValueError):  # its file is gone: shown without
                    path.parent.mkdir(exist_ok=True)
                    replace_bytes(path, thumbnail(source.decode(), IMAGE_SIDE))

    def _finish(self) -> None:
        if self._writing is not None:
            # Whatever it is: no picture of a run is worth the run.
            if error := self._writing.exception():
                self._failed(f"{type(error).__name__}: {first_line(error)}")
            self._writing = None

    def _shown(self, dataset: PromptDataset, rollout: Rollout, why: str) -> dict[str, Any]:
        """What a record has beside the rest if the report is to show it."""
        names = []
        for k, source in enumerate(dataset.row(rollout.prompt_id).images):
            digits = sha256(f"{rollout.prompt_id}/{k}".encode()).hexdigest()[:16]
            names.append(f"images/{digits}.jpg")
            self._images[names[-1]] = source
        return {"chosen": why, "images": names}

    def _records(
        self, split: str, dataset: PromptDataset, rollouts: Sequence[Rollout], scores: np.ndarray
    ) -> list[dict[str, Any]]:
        rows = (dataset.row(r.prompt_id) for r in rollouts)
        return [
            {
                "split": split,
                "id": rollout.prompt_id.removeprefix("" if split == "train" else f"{split}/"),
                "question": row.question,
                "response": rollout.text,
                "answer": row.answer,
                "score": None if np.isnan(score) else float(score),
                "finish_reason": rollout.finish_reason,
                "response_tokens": len(rollout.response_token_ids),
            }
            for rollout, row, score in zip(rollouts, rows, scores, strict=True)
        ]
