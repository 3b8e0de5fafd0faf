"""What runs inside every process of a vLLM engine, beside its worker."""

from __future__ import annotations

import contextlib
import ctypes
import signal
from typing import Any

import torch

from mssr.models.families import family_of
from mssr.rollout.checksums import Arriving, Loaded
from mssr.rollout.weights import WeightSource


class EngineProcess:
    """vLLM makes its worker a subclass of this; `LLM.collective_rpc` calls the methods in every process."""

    device: Any
    rank: int
    model_config: Any
    get_model: Any
    reload_weights: Any

    def load_from(self, source: WeightSource, check: bool = False) -> Loaded:
        """Take over weights. vLLM packs them anew and drops its caches of what the old ones computed; the
        model's own ``load_weights`` does neither."""
        kept = self.__dict__.setdefault("_kept_for_transfers", {})
        arriving = Arriving(source.tensors(self.device, self.rank, kept), check)
        family, model = family_of(self.model_config.hf_config), self.get_model()
        family.before_load(model)
        with contextlib.closing(arriving):
            weights = ((name, family.engine_weight(name, weight)) for name, weight in arriving)
            self.reload_weights(weights_iterator=weights)
        return arriving.loaded(model, self.model_config.quantization is not None)

    def end_with_parent(self) -> None:
        """Have the system kill this process with the one that started it, also where it waits for a device
        that hangs: the engine that takes its place needs the memory."""
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    def peak_gpu_bytes(self) -> int:
        """The most that torch held on the device since the last call."""
        peak = torch.cuda.max_memory_reserved(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return peak
