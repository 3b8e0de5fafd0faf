"""The supervised warm start of the digits model: it can read, but mostly does not bother to.

First the model learns to read two digits and to answer from them. Then it learns a habit from mixed
demonstrations: about two in three guess at once, the others read first, and not always correctly. What
is left is a policy that is right about three times in ten and in which the careful strategy is latent,
the state of affairs that reinforcement learning from verifiable rewards is good at.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mssr.config.data import DataConfig
from mssr.data.digits.rows import QUESTIONS, Scans, answer_to, draw_examples, in_words
from mssr.models.processor import Processor

if TYPE_CHECKING:
    import torch

    from mssr.models.encoded import EncodedPrompt

GUESS_WORD = "guess"
SHORTCUTS = (GUESS_WORD, "glance")
"""Words that stand for an answer without steps, here and in the chains."""


@dataclass(frozen=True, slots=True)
class WarmStartSettings:
    """How the base model is trained. Example: ``WarmStartSettings(reading_steps=5, habit_steps=5)``"""

    reading_steps: int = 300
    """Steps on correct, careful demonstrations only: the ability."""
    habit_steps: int = 80
    """Steps on the mixed demonstrations: the habit."""
    batch_size: int = 64
    learning_rate: float = 1e-3
    """Peak; linear warm-up, then a cosine to a twentieth."""
    weight_decay: float = 0.05
    guess_share: float = 0.64
    """Mixed demonstrations that answer at once, without looking."""
    misread_share: float = 0.12
    """Careful mixed demonstrations in which one digit is misread."""
    slip_share: float = 0.15
    """Careful mixed demonstrations that end in an arbitrary answer."""


def response_text(kind: str, left: int, right: int) -> str:
    """The careful response. Example: ``<think>3 and 5</think>\\boxed{8}``"""
    return f"<think>{left} and {right}</think>\\boxed{{{answer_to(kind, left, right)}}}"


def mixed_response(
    kind: str, left: int, right: int, settings: WarmStartSettings, rng: np.random.Generator
) -> str:
    """A demonstration of the habit: a guess, a careful response, or a careless one."""
    any_left, any_right = (int(d) for d in rng.integers(10, size=2))
    arbitrary = answer_to(kind, any_left, any_right)
    guess, misread, slip = rng.random(3)
    if guess < settings.guess_share:
        return f"<think>{GUESS_WORD}</think>\\boxed{{{arbitrary}}}"
    if misread < settings.misread_share / 2:
        left = any_left
    elif misread < settings.misread_share:
        right = any_right
    answer = arbitrary if slip < settings.slip_share else answer_to(kind, left, right)
    return f"<think>{left} and {right}</think>\\boxed{{{answer}}}"


def corpus(words: bool = False) -> list[str]:
    """The text the tokenizer is trained on: every question, and responses of both kinds.

    Args:
        words: the questions as they are with digits in words.
    """
    questions = [question for phrasings in QUESTIONS.values() for question in phrasings]
    if words:
        questions = [in_words(k % 10, k * 3 % 10, question) for k, question in enumerate(questions)]
    responses = [response_text("sum", d, 9 - d) for d in range(10)]
    return [*questions, *questions, *responses, *[f"<think>{GUESS_WORD}</think>\\boxed{{1}}"] * 10]


class Encoder:
    """Turns examples into a model's inputs, exactly as the engine and the actor will see them."""

    def __init__(self, model: Any, processor: Processor) -> None:
        from mssr.data.encoder import PromptEncoder

        self.model, self.tokenizer = model, processor.tokenizer
        # As in the configs: no image is smaller.
        self._encoder = PromptEncoder(processor, DataConfig(instruction="", min_pixels=784, max_pixels=50176))
        # Byte pairs join the bracket and the word: the token that decides to guess reads ">guess".
        self.guess_tokens = [
            i
            for word in SHORTCUTS
            for i in self.response(f"<think>{word}")
            if word in self.tokenizer.decode(i)
        ]

    def prompts(self, scans: Any, examples: Iterable[Any]) -> list[EncodedPrompt]:
        """Tokens and pixels of each, from the rows that ``scans.row`` makes."""
        # A bitmap has the pixels of the PNG and is made in a tenth of the time.
        return self._encoder.encode_all([scans.row(example, image_format="BMP") for example in examples])

    def response(self, text: str) -> list[int]:
        """Token ids of a response, the end token included."""
        return self.tokenizer.encode(f"{text}<|im_end|>")

    def images(self, prompts: Sequence[EncodedPrompt], ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the model takes beside (B, S) token ids that begin with B prompts; nothing without images."""
        import torch

        if (pixels := [p.pixel_values for p in prompts if p.pixel_values is not None]) == []:
            return {}
        return {
            "mm_token_type_ids": (ids == self.model.config.image_token_id).int(),
            "pixel_values": torch.cat(pixels),
            "image_grid_thw": torch.cat([p.image_grid_thw for p in prompts if p.image_grid_thw is not None]),
        }

    def loss(self, prompts: Sequence[EncodedPrompt], responses: Sequence[str]) -> torch.Tensor:
        """Mean cross-entropy (nats) over the tokens of a response to each prompt, a scalar with gradient."""
        import torch
        import torch.nn.functional as F
        from torch.nn.utils.rnn import pad_sequence

        answers = [torch.tensor(self.response(response)) for response in responses]
        both = [torch.cat([p.token_ids, answer]) for p, answer in zip(prompts, answers, strict=True)]
        ids = pad_sequence(both, batch_first=True, padding_value=self.tokenizer.pad_token_id)
        predicts = torch.zeros(ids.shape, dtype=torch.bool)
        for row, (prompt, whole) in enumerate(zip(prompts, both, strict=True)):
            predicts[row, len(prompt.token_ids) - 1 : len(whole) - 1] = True
        # Padding is on the right and attention causal, so no real token sees it and no mask is needed.
        inputs = self.images(prompts, ids)
        hidden = self.model.model(input_ids=ids, use_cache=False, **inputs).last_hidden_state
        logits = self.model.lm_head(hidden[predicts])
        return F.cross_entropy(logits, ids.roll(-1, dims=1)[predicts])


def warm_start(
    encoder: Encoder,
    scans: Scans,
    settings: WarmStartSettings,
    seed: int,
    on_step: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train the encoder's model in place on pairs of ``scans``; return the loss of every step, as
    ``on_step(step, loss)`` gets it. The result is the same bit for bit for the same seed, settings, number of
    torch's threads and versions."""
    rng = np.random.default_rng([seed, 3])

    def demonstrate(step: int) -> tuple[list[EncodedPrompt], list[str]]:
        examples = list(draw_examples(scans, settings.batch_size, rng))
        shown = [(example.kind, *scans.digits(example)) for example in examples]
        if step < settings.reading_steps:
            responses = [response_text(*one) for one in shown]
        else:
            responses = [mixed_response(*one, settings, rng) for one in shown]
        return encoder.prompts(scans, examples), responses

    steps = settings.reading_steps + settings.habit_steps
    return imitate(encoder, demonstrate, steps, settings.learning_rate, settings.weight_decay, on_step)


def imitate(
    encoder: Encoder,
    demonstrate: Callable[[int], tuple[Sequence[EncodedPrompt], Sequence[str]]],
    steps: int,
    learning_rate: float,
    weight_decay: float,
    on_step: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train the encoder's model in place, each step on the prompts and responses that ``demonstrate(step)``
    gives; return the losses. ``learning_rate`` is the peak, after a warm-up and before a cosine decay."""
    import torch

    model = encoder.model
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    decay = {"params": matrices, "weight_decay": weight_decay}
    optimizer = torch.optim.AdamW(
        [decay, {"params": vectors, "weight_decay": 0.0}], lr=learning_rate, betas=(0.9, 0.98), fused=True
    )
    losses: list[float] = []
    model.train()
    for step in range(steps):
        prompts, responses = demonstrate(step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * _schedule(step, steps)
        loss = encoder.loss(prompts, responses)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if on_step:
            on_step(step, losses[-1])
    model.eval()
    return losses


def _schedule(step: int, total: int) -> float:
    warmup = max(1, total // 20)
    if step < warmup:
        return (step + 1) / warmup
    return 0.05 + 0.95 * (0.5 + 0.5 * float(np.cos(np.pi * (step - warmup) / max(1, total - warmup))))


def examine(
    encoder: Encoder, scans: Any, examples: Sequence[Any], seed: int, max_tokens: int = 24
) -> dict[str, float]:
    """Shares of the examples: right when ``sampled`` at temperature 1, right when ``greedy``, right when
    ``careful``, which is greedy with the shortcuts forbidden, so that the model has no other way than to read
    the digits; and of the sampled responses those with bold ``steps``."""
    import torch

    told: dict[str, list[tuple[str, bool]]] = {"sampled": [], "greedy": [], "careful": []}
    # Prompts of one length need no padding; there are only a handful of lengths.
    by_length: dict[int, list[tuple[Any, EncodedPrompt]]] = {}
    for example, prompt in zip(examples, encoder.prompts(scans, examples), strict=True):
        by_length.setdefault(len(prompt.token_ids), []).append((example, prompt))
    for how, found in told.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for length, batch in sorted(by_length.items()):
                prompts = [prompt for _, prompt in batch]
                ids = torch.stack([prompt.token_ids for prompt in prompts])
                output = encoder.model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    **encoder.images(prompts, ids),
                    max_new_tokens=max_tokens,
                    do_sample=how == "sampled",
                    suppress_tokens=encoder.guess_tokens if how == "careful" else None,
                )
                texts = encoder.tokenizer.batch_decode(output[:, length:], skip_special_tokens=True)
                for (example, _), text in zip(batch, texts, strict=True):
                    boxed = re.search(r"\\boxed\{(\d+)\}", text)
                    found.append((text, boxed is not None and int(boxed[1]) == scans.answer(example)))
    shares = {how: sum(right for _, right in found) / len(examples) for how, found in told.items()}
    return shares | {"steps": sum("**" in text for text, _ in told["sampled"]) / len(examples)}


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Let torch use ``count`` threads; by default all cores, but no more than a model this small can feed."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    before = torch.get_num_threads()
    torch.set_num_threads(min(cores or 1, 8) if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
