"""Geometry3K (arXiv 2105.04165) as EasyR1 prepared it, test: 601 problems, the answers are expressions.

The project's own form, judged as such: equal, or the same mathematics. Breakdown: none is official.
"""

from __future__ import annotations

from mssr.evaluation.base import Benchmark
from mssr.evaluation.local_data import Location
from mssr.evaluation.own import Own
from mssr.evaluation.registry import register


@register("geometry3k")
class Geometry3K(Own):
    """Columns: images, problem, answer."""

    location = Location("hiyouga/geometry3k", "test")

    load = Benchmark.load

    def __init__(self) -> None:
        super().__init__(self.location.hub_source)
        self.name = type(self).name
