"""GRPOConfig with one response for each prompt and the options of a method."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from trl import GRPOConfig

from mssr.algorithms import Algorithm
from mssr.algorithms.checks import check_number
from mssr.integrations import base


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class MSSRConfig(GRPOConfig):
    """TRL's options with those below; ``per_device_train_batch_size`` and its kin count prompts as rollouts.

    Raises:
        ValueError: a setting makes no sense with one response for each prompt, or would be without effect.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*GRPOConfig._VALID_DICT_FIELDS, "method_options"]

    num_generations: int | None = _option(1, "Always 1: a response is compared with its prompt's history.")
    num_generations_eval: int | None = _option(1, "Responses for each prompt in an evaluation.")
    method: str = _option("mssr", f"One of {', '.join(base.METHODS)}.")
    method_options: dict | str | None = field(
        default=None, metadata={"help": "Of the method, such as kl_target or window; docs/plugins.md."}
    )
    id_column: str = _option("id", "Column of the data that names each prompt, in all epochs alike.")
    shaping: bool | None = _option(None, "Entropy-shaped advantages; None: for mssr and no other method.")
    shaping_coef: float = _option(0.4, "Multiplies the entropy, in nats.")
    shaping_divisor: float = _option(2.0, "Bounds the bonus by |A| / divisor.")
    kl_probe_fraction: float = _option(0.25, "Share of the rollouts scored again after the updates, for eta.")

    def __post_init__(self) -> None:
        _refuse(
            self.num_generations != 1,
            f"num_generations={self.num_generations}: a method here compares a prompt's one response with its"
            " history; for groups of responses take TRL's GRPOTrainer",
        )
        self.num_generations = 2  # for TRL's checks only, which let no 1 pass
        try:
            super().__post_init__()
        except ValueError:
            size = self.generation_batch_size
            _refuse((size or 0) % 2, f"a generation of {size} rollouts: TRL's checks demand an even number")
            raise
        finally:
            self.num_generations = 1
        method = self.make_method()
        self.shaping = method.shapes_entropy if self.shaping is None else self.shaping
        check_number("shaping_coef", self.shaping_coef, ">= 0")
        check_number("shaping_divisor", self.shaping_divisor)
        self._check(method)

    def make_method(self) -> Algorithm:
        """The method, without a history; ValueError if it does not take the options."""
        assert not isinstance(self.method_options, str)  # TRL has parsed it
        return base.create(self.method, self.method_options or {}, ("update", "last_visit"))

    @property
    def updates_per_generation(self) -> int:
        """Optimizer steps from one generation to the next."""
        return int(self.steps_per_generation * self.num_iterations // self.gradient_accumulation_steps)

    def check_end(self, name: str, steps: int) -> None:
        """ValueError unless so many updates are whole generations: within one, no checkpoint is exact."""
        each = self.updates_per_generation
        _refuse(steps % each, f"{name}={steps} must be a multiple of the {each} updates of a generation")

    def _check(self, method: Algorithm) -> None:
        passes = self.steps_per_generation * self.num_iterations
        accumulation = self.gradient_accumulation_steps
        _refuse(
            method.kl_source == "last_visit" and self.mask_truncated_completions,
            "mask_truncated_completions=True leaves no log-probs of a cut response, which the drift of its"
            f" prompt needs: leave it out with {self.method}",
        )
        _refuse(
            passes % accumulation,
            f"gradient_accumulation_steps={accumulation} must divide the {passes} passes of a generation"
            " (steps_per_generation * num_iterations), so that it ends with an update",
        )
        _refuse(
            self.shaping and self.importance_sampling_level == "sequence",
            "importance_sampling_level='sequence' gives a response's tokens one weight, in which shaping is"
            " lost: set shaping=False, or 'token'",
        )
        share, aggregation = self.kl_probe_fraction, self.multi_objective_aggregation
        _refuse(not 0 < share <= 1, f"kl_probe_fraction={share} must be in (0, 1]")
        _refuse(self.scale_rewards != "group", "scale_rewards is of groups and without effect: leave it out")
        _refuse(aggregation != "sum_then_normalize", f"{aggregation} is of groups: use reward_weights")
        _refuse(self.remove_unused_columns, f"remove_unused_columns=True would remove {self.id_column!r}")


def _refuse(refused: Any, reason: str) -> None:
    if refused:
        raise ValueError(reason)
