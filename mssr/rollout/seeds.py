"""Counter-based seeds: what is sampled depends on where in the run it is sampled, and on nothing else."""

from __future__ import annotations

import hashlib


def request_seed(run_seed: int, step: int, prompt_id: str, sample_index: int) -> int:
    """Seed of one response, in [0, 2^31)."""
    key = f"{run_seed}/{step}/{sample_index}/{prompt_id}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 33
