"""The rows of the paper's tables, by the recipes of configs/paper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mssr.errors import UserError, did_you_mean


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the table."""

    name: str
    published: str | None = None
    """Whose published numbers stand beside it, see `mssr.evaluation.tables.PAPER`."""
    recipe: str = ""
    """Of configs/paper; "" for the one of its name."""
    overrides: tuple[str, ...] = ()
    default: bool = True
    """Whether it is done where --rows names none."""

    @property
    def trained(self) -> bool:
        return self.name != "base"


# What the authors' code has for the baselines; configs/paper gives all methods what it has for MSSR.
_NORM = "actor.max_grad_norm=1.0"
_BASELINE = ("actor.updates_per_step=2", _NORM)
ROWS = {
    row.name: row
    for row in (
        Row("base", "base", "mssr"),
        Row("grpo", "GRPO"),
        Row("rloo", "RLOO"),
        Row("reinforce_pp", "REINFORCE++"),
        Row("mssr", "MSSR"),
        Row("mvsr"),
        Row("mvsr_entropy_loss"),
        Row("mvsr_text_anchor"),
        Row("published_code", "MSSR", default=False),
        Row("grpo_as_published", "GRPO", "grpo", _BASELINE, default=False),
        Row("rloo_as_published", "RLOO", "rloo", _BASELINE, default=False),
        Row("reinforce_pp_as_published", "REINFORCE++", "reinforce_pp", (_NORM,), default=False),
    )
}


def chosen(names: Sequence[str] | None) -> list[Row]:
    """The rows of --rows, in the table's order.

    Raises:
        UserError: a name is none.
    """
    if not names:
        return [row for row in ROWS.values() if row.default]
    asked = [name for text in names for name in text.split(",") if name]
    for name in asked:
        if name not in ROWS and name != "all":
            known = f"{did_you_mean(name, ROWS)}; rows: {', '.join(ROWS)}, all"
            raise UserError(f"--rows: {name} is no row{known}")
    return [row for row in ROWS.values() if row.name in asked or "all" in asked]
