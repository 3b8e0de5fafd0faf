"""Evaluation of a model's responses on benchmarks, in the order of the data:

`items` holds the records; `local_data` and `cells` read a benchmark's rows; `scoring` turns a response into a
verdict; `base` says what a benchmark is, `own` makes one of any data, `benchmarks` has one module each and
`registry` finds them by name. `model` is what is evaluated; `prompts` writes what it is asked, `responses`
keeps what it answers, `local_judge` asks a language model where the rules do not decide, and
`verdicts` holds what came of each. `statistics`, `tables` and `page` make of it what `results` writes and
reads. `runner` is the command.
"""

from mssr.evaluation.items import STATUSES, Item, Kind, Status, Verdict

__all__ = ["STATUSES", "Item", "Kind", "Status", "Verdict"]
