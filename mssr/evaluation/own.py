"""Any data in the project's own form: columns images, problem and answer (or as the config names them).

Three ways of scoring:

- by default leniently: the final answer as in the benchmarks (`scoring.final_text`), right if it is equal to
  the answer (`exact_match`) or, failing that, the same mathematics (`math`);
- ``rule="choice"`` or another name of `mssr.rewards.rules.RULES`: that rule on the same final answer;
- ``reward=RewardConfig(...)``: exactly as training scores, in the processes that `verdicts` starts; right is
  an ``accuracy`` of 1 (a score of 1 for a function without that part).
"""

from __future__ import annotations

from pathlib import Path

from mssr.config.data import DataConfig, RewardConfig
from mssr.data.columns import resolve_columns
from mssr.data.dataset import PromptDataset
from mssr.data.rows import cell, column_id, content_id, is_structured, read_row, truth
from mssr.data.sources import Table, open_table, split_name
from mssr.errors import UserError
from mssr.evaluation import scoring
from mssr.evaluation.base import Benchmark
from mssr.evaluation.cells import question_text
from mssr.evaluation.items import Item, Status, Verdict
from mssr.evaluation.local_data import stored_images
from mssr.rewards.base import RewardInput
from mssr.rewards.extraction import unwrap
from mssr.rewards.rules import RULES


class Own(Benchmark):
    """A source of data as a benchmark. Not in the registry: `registry.get("my.parquet")` makes one.

    Ids are those of training: the id column, else a hash of the content. A row whose content an earlier row
    has too is an item of its own (``-2`` behind the id), where training would leave it out.

    Args:
        source: see `mssr.data.sources`; a path may be relative to ``--data-dir``.
        rule, reward: see the module; at most one of them.
        config: names of the columns and the folder of images.
    """

    image_columns = ()  # the config names it

    def __init__(
        self,
        source: str,
        rule: str | None = None,
        reward: RewardConfig | None = None,
        config: DataConfig | None = None,
    ) -> None:
        if rule is not None and rule not in RULES:
            raise UserError(f"{source}: unknown rule {rule!r}: one of {', '.join(sorted(RULES))}")
        if rule is not None and reward is not None:
            raise UserError(f"{source}: a rule and a reward cannot both score it")
        self.source, self._rule, self.config = source, rule, config or DataConfig()
        self.numbers_repeats = self.config.id_column is None
        self.rewarded = reward is not None
        self._compares_text = reward is None or bool(reward.rule)
        self._takes_cells = reward is not None and reward.takes_cells
        self._opened = source
        path, split = split_name(source)
        self.name = f"{path.stem}@{split}" if split else path.stem

    def load(self, data_dir: Path | None = None, limit: int | None = None) -> list[Item]:
        path, split = split_name(self.source)
        if data_dir is not None and not path.exists() and (data_dir / path).exists():
            self._opened = f"{data_dir / path}@{split}" if split else str(data_dir / path)
        return self.read(open_table(self._opened), limit)

    def read(self, table: Table, limit: int | None) -> list[Item]:
        """The items of a table in the own form, unless they would be asked without seeing their images."""
        columns = resolve_columns(table, self.config, self.source)
        self._columns = columns.config
        items = super().read(table, limit)
        if not any(item.images for item in items):
            columns.refuse_blindness(self.source, f"no image in column {self.config.images_column!r}")
        return items

    def rows(self) -> PromptDataset:
        """What was loaded, for rewards that ask for the row; ids have the benchmark's name before them."""
        return PromptDataset(self._opened, self.config, f"{self.name}/")

    def rule(self, item: Item) -> str:
        return "reward" if self.rewarded else self._rule or "math"

    def is_right(self, item: Item, answer: str) -> bool:
        if self._rule is not None:
            return float(RULES[self._rule](answer, unwrap(item.answer))) >= 1
        return scoring.math(answer, unwrap(item.answer))

    def rewarded_verdict(self, response: str, accuracy: float, truncated: bool) -> Verdict:
        """The verdict of a response that training's reward has scored; an accuracy of NaN is no score."""
        answer = scoring.final_text(response, truncated=truncated)
        status: Status = "right" if accuracy >= 1 else "wrong" if answer else "extraction_failed"
        if truncated and status != "right":
            status = "truncated"
        if accuracy != accuracy:
            status = "judge_failed"
        return Verdict(status == "right", answer, status, "reward")

    def reward_input(self, item: Item, response: str, tokens: int, prefix: str) -> RewardInput:
        """What training's reward gets: functions of a user the answer as the data has it."""
        answer = item.metadata["truth"] if self._takes_cells else item.answer
        return RewardInput(response, answer, tokens, f"{self.name}/{item.id}", prefix)

    def undecided(self, item: Item, verdict: Verdict) -> bool:
        return not self.rewarded and super().undecided(item, verdict)

    def item_of_row(self, table: Table, number: int) -> Item:
        config = self._columns
        cells, where, column = table.cells(number), table.where(number), config.id_column
        row_id = column_id(cell(cells, column), column) if column else content_id(cells, config)
        found = truth(cells, config)
        if self._compares_text and is_structured(found):
            raise ValueError(f"column {config.answer_column} is a list or dict, not text")
        row = read_row(cells, row_id, where, config)
        images = row.images
        if config.image_dir is None and config.images_column in cells:
            images = stored_images(table, number, cells, (config.images_column,))
        return Item(
            benchmark=self.name,
            id=row.id,
            question=row.problem if row.history else question_text(row.problem, images, row.mark),
            images=images,
            answer=row.answer,
            metadata={"truth": row.answer if isinstance(found, str) else found},
            where=where,
            history=row.history,
            mark=row.mark,
        )
