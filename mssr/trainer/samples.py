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

    def close(self) -> None:
        """Wait for the report under way, and write the images that are left."""
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
        records = []
        for i, why in choose_train(collected.prompt_ids, collected.scores, batch.advantages).items():
            record = self._record("train", dataset, collected.rollouts[i], collected.scores[i], why)
            # Of tokens with advantages of their own there is none for the response.
            record["advantage"] = float(batch.advantages[i]) if batch.token_advantages is None else None
            record["baseline"] = None if expected is None else float(expected[i])
            records.append(record)
        write_samples(samples_file(self._run_dir, step), records, "train")

    def validation(
        self, step: int, split: str, dataset: PromptDataset, rollouts: Sequence[Rollout], scores: np.ndarray
    ) -> None:
        """Record all responses of a validation set; the report shows those of some prompts.

        Args:
            scores: (B,), NaN for a response without one.
        """
        ids = [rollout.prompt_id.removeprefix(f"{split}/") for rollout in rollouts]
        chosen = choose_validation(ids, scores, earlier_scores(self._run_dir, split, step))
        records = [
            self._record(split, dataset, rollout, score, chosen.get(i))
            for i, (rollout, score) in enumerate(zip(rollouts, scores, strict=True))
        ]
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
        # Whatever it is: no picture of a run is worth the run.
        if self._writing is not None and (error := self._writing.exception()):
            self._failed(f"{type(error).__name__}: {first_line(error)}")
        self._writing = None

    def _record(
        self, split: str, dataset: PromptDataset, rollout: Rollout, score: float, why: str | None
    ) -> dict[str, Any]:
        """A line of the samples file; with images, which are to be written, if the report is to show it."""
        row = dataset.row(rollout.prompt_id)
        record = {
            "split": split,
            "id": rollout.prompt_id.removeprefix("" if split == "train" else f"{split}/"),
            "question": row.question,
            "response": rollout.text,
            "answer": row.answer,
            "score": None if np.isnan(score) else float(score),
            "finish_reason": rollout.finish_reason,
            "response_tokens": len(rollout.response_token_ids),
        }
        if why is None:
            return record
        digits = sha256(rollout.prompt_id.encode()).hexdigest()[:16]
        images = {f"images/{digits}-{k}.jpg": source for k, source in enumerate(row.images)}
        self._images |= images
        return record | {"chosen": why, "images": list(images)}
