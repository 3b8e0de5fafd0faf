"""Compute with verl 0.9.1 and TRL 1.16 what tests/unit/test_oracles.py compares mssr with.

    python scripts/oracles/make_fixtures.py            # in the environment of README.md, from anywhere

Every number under ``out/`` comes from a function of verl or a method of TRL's GRPOTrainer; nothing of mssr is
imported. The same versions give the same files.

Layout of both files: all batches laid end to end. ``in/sequences`` holds the number of responses of every
batch, ``in/lengths`` the tokens of every response; every other array has one entry for each batch, each
response or each token.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import from_trl
import from_verl
import numpy as np
import torch
from batches import BATCHES, EDGE_BATCHES

SEED = 20251218


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path(__file__).resolve().parents[2] / "tests" / "fixtures"
    parser.add_argument("--out", type=Path, default=default, help="directory for the two files")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for oracle, count in ((from_verl, BATCHES + EDGE_BATCHES), (from_trl, BATCHES)):
        rng = np.random.default_rng(SEED)
        batches = [oracle.batch(rng, number) for number in range(count)]
        arrays = {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
        for key, array in arrays.items():
            assert np.isfinite(array).all(), f"{oracle.VERSION}: {key} is not finite"
            if array.dtype == np.int64:
                arrays[key] = array.astype(np.int32)
        version = f"{oracle.VERSION}, torch {torch.__version__}"
        path = out / f"oracles_{oracle.__name__.removeprefix('from_')}.npz"
        np.savez_compressed(path, version=np.array(version), **arrays)
        size = path.stat().st_size / 1024
        print(f"{path.name}: {version}, {count} batches, {len(arrays)} arrays, {size:.0f} KiB")


if __name__ == "__main__":
    main()
