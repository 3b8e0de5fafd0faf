"""TRL's GRPOTrainer on the same rows, one step a turn; run by the python of TRL's environment. See `turns`.

A step is one generation of ``rollouts`` responses and all updates made from it, with the settings that turned
out best on a CPU.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import datasets
import rewards
import torch
import transformers
from trl import GRPOConfig, GRPOTrainer
from turns import Gate


class Turns(transformers.TrainerCallback):
    """Tells of a step after the last of its updates and stands still until the next."""

    def __init__(self, updates: int, record: dict[str, Any]) -> None:
        self._gate, self._updates, self._record = Gate(), updates, record

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._gate.wait()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self._updates == 0:
            self._gate.done(self._record)
            if state.global_step < args.max_steps:
                self._gate.wait()


def rows(path: str) -> datasets.Dataset:
    """Conversations with one image before the question, as our encoder makes them."""

    def conversation(row: dict[str, Any]) -> dict[str, Any]:
        question = row["problem"].removeprefix("<image>")
        content = [{"type": "image"}, {"type": "text", "text": question}]
        return {"prompt": [{"role": "user", "content": content}]}

    data = datasets.Dataset.from_parquet(path)
    data = data.cast_column("images", datasets.List(datasets.Image()))
    return data.map(conversation, remove_columns=["problem", "id", "kind"])


def main() -> None:
    s = json.loads(sys.argv[1])  # see peer_trl.py
    torch.set_num_threads(s["threads"])
    record: dict[str, Any] = {}
    function = getattr(rewards, s["reward"])

    def score(completions: Any, completion_ids: Any, answer: Any, **kwargs: Any) -> list[float]:
        texts = [c[0]["content"] if isinstance(c, list) else c for c in completions]
        scores = [function(text, truth) for text, truth in zip(texts, answer, strict=True)]
        record.update(tokens=sum(map(len, completion_ids)), reward=sum(scores) / len(scores))
        return scores

    per_update = s["rollouts"] // s["updates"]
    accumulation = -(-per_update // s["batch"])
    config = GRPOConfig(
        output_dir=s["out"],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=per_update // accumulation,
        gradient_accumulation_steps=accumulation,
        steps_per_generation=accumulation * s["updates"],
        max_steps=s["steps"] * s["updates"],
        num_generations=s["n"],
        max_completion_length=s["limit"],
        temperature=1.0,
        generation_kwargs={"suppress_tokens": s["banned"]} if s["banned"] else None,
        beta=0.01,
        use_bias_correction_kl=False,
        loss_type="dapo",  # the mean over all tokens of an update, as here
        epsilon=0.2,
        epsilon_high=0.3,
        learning_rate=s["lr"],
        lr_scheduler_type="constant",
        warmup_steps=0,
        weight_decay=0.0,
        max_grad_norm=1.0,
        seed=s["seed"],
        save_strategy="no",
        report_to=[],
        logging_steps=s["updates"],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        dataloader_num_workers=0,
        model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa"},
    )
    trainer = GRPOTrainer(
        model=s["model"],
        reward_funcs=score,
        args=config,
        train_dataset=rows(s["data"]),
        callbacks=[Turns(s["updates"], record)],
    )
    trainer.train()


if __name__ == "__main__":
    main()
