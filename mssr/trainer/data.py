"""The data of a run, checked: the part that `mssr train` and `mssr data` share."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mssr import rewards
from mssr.config import Config
from mssr.data.encoder import PromptEncoder
from mssr.data.loading import OVERLONG_FILE, LoadedPrompts, load_prompts
from mssr.errors import UserError
from mssr.models.loading import check_sight, load_processor
from mssr.rewards import RowAccess
from mssr.trainer.validation import ValidationPrompts, load_validation


@dataclass(frozen=True, slots=True)
class RunData:
    """What a run trains and validates on."""

    config: Config
    """With ``trainer.steps`` as a number, see `resolve_steps`."""
    encoder: PromptEncoder
    train: LoadedPrompts
    val: list[ValidationPrompts]
    access: RowAccess
    """Where rewards find the rows behind the responses that they score."""
    notes: list[str]
    """What the user should hear once of how rows are read."""

    @property
    def item_notes(self) -> list[str]:
        """Items of benchmarks that cannot be asked as they are."""
        return [note for one in self.val if one.rows is None for note in one.notes]


def load_data(config: Config) -> RunData:
    """Open and check all data of a config; writes the lists of rows that are left out to the run directory.

    Raises:
        UserError: everything that keeps the data from being trained on, columns that the reward asks for and
            that are not there included.
    """
    encoder = PromptEncoder(load_processor(config.model), config.data)
    check_sight(config, encoder.processor.sees_images)
    bad_rows_file = config.run_dir / "bad_rows.jsonl"
    for stale in (bad_rows_file, config.run_dir / OVERLONG_FILE):
        stale.unlink(missing_ok=True)
    train = load_prompts(config.data.train, config.data, encoder, bad_rows_file, by_rule=config.reward.rule)
    config = resolve_steps(config, train)
    val = load_validation(config, encoder, bad_rows_file)
    rows = [train, *(one.rows for one in val if one.rows is not None)]
    access = RowAccess.of([loaded.dataset for loaded in rows], config.model)
    rewards.check(config.reward, access)
    notes = dict.fromkeys(note for loaded in rows for note in loaded.notes)
    return RunData(config, encoder, train, val, access, list(notes))


def resolve_steps(config: Config, train: LoadedPrompts) -> Config:
    """The config with ``trainer.steps`` as a number, where it says epochs.

    Raises:
        UserError: there are not enough prompts for a step.
    """
    epochs = config.trainer.epochs
    if epochs is None:
        return config
    prompts, a_step = len(train.dataset), config.prompts_per_step
    if prompts < a_step:
        raise UserError(
            f"trainer.epochs={epochs}: {prompts} usable prompts are fewer than the {a_step} of a step; set "
            "trainer.steps, or a smaller rollout.rollouts_per_step"
        )
    return replace(config, trainer=replace(config.trainer, steps=epochs * (prompts // a_step)))
