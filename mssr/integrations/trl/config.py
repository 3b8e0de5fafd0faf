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
    kl_probe_fraction: float = _option(
        0.25, "Share of the rollouts scored again for eta, after the last update."
    )

    def __post_init__(self) -> None:
        if self.num_generations != 1:
            raise ValueError(
                f"num_generations={self.num_generations}: a method here compares a prompt's one response with"
                " its history; for groups of responses take TRL's GRPOTrainer"
            )
        self.num_generations = 2  # for TRL's checks only, which let no 1 pass
        try:
            super().__post_init__()
        except ValueError as error:
            if (self.generation_batch_size or 0) % 2:
                rollouts = f"a generation of {self.generation_batch_size} rollouts"
                raise ValueError(f"{rollouts}: TRL's checks demand an even number") from error
            raise
        finally:
            self.num_generations = 1
        method = self.make_method()
        self.shaping = method.shapes_entropy if self.shaping is None else self.shaping
        check_number("shaping_coef", self.shaping_coef, ">= 0")
        check_number("shaping_divisor", self.shaping_divisor)
        self._refuse(method)

    def make_method(self) -> Algorithm:
        """The method, without a history; ValueError if it does not take the options."""
        assert not isinstance(self.method_options, str)  # TRL has parsed it
        return base.create(self.method, self.method_options or {})

    @property
    def updates_per_generation(self) -> int:
        """Optimizer steps from one generation to the next."""
        return int(self.steps_per_generation * self.num_iterations // self.gradient_accumulation_steps)

    def _refuse(self, method: Algorithm) -> None:
        passes = self.steps_per_generation * self.num_iterations
        sequence = self.importance_sampling_level == "sequence"
        for refused, reason in (
            (
                method.kl_source != "update",
                f"kl_source={method.kl_source!r}: here eta follows the KL of the update; give method_options"
                " kl_source='update' (spo: and eta_rule='monotone')",
            ),
            (
                passes % self.gradient_accumulation_steps,
                f"gradient_accumulation_steps={self.gradient_accumulation_steps} must divide the {passes}"
                " passes of a generation (steps_per_generation * num_iterations): its last update ends it",
            ),
            (
                not 0 < self.kl_probe_fraction <= 1,
                f"kl_probe_fraction={self.kl_probe_fraction} must be in (0, 1]",
            ),
            (
                self.scale_rewards != "group",
                "scale_rewards is for groups of responses and has no effect here: leave it out",
            ),
            (
                self.multi_objective_aggregation != "sum_then_normalize",
                "multi_objective_aggregation='normalize_then_sum' is of groups of responses: weigh"
                " the rewards with reward_weights",
            ),
            (
                self.shaping and sequence,
                "importance_sampling_level='sequence' gives the tokens of a response one weight, in which"
                " shaping is lost: set shaping=False, or importance_sampling_level='token'",
            ),
            (
                self.remove_unused_columns,
                f"remove_unused_columns=True would remove {self.id_column!r}, which names the prompts",
            ),
        ):
            if refused:
                raise ValueError(reason)
