"""What runs inside every process of a vLLM engine, beside its worker."""

from __future__ import annotations

from typing import Any

from mssr.rollout.weights import WeightSource


class EngineProcess:
    """vLLM makes its worker a subclass of this; `LLM.collective_rpc` calls the methods in every process."""

    device: Any
    rank: int
    reload_weights: Any

    def load_from(self, source: WeightSource) -> None:
        """Take over weights."""
        self.reload_weights(weights_iterator=source.tensors(self.device, self.rank))
