"""Loading of data: seconds and memory of the first and the second run.

    python scripts/bench/data.py --out scripts/bench/results/data.md

The images are synthetic JPEGs, no two alike. Every run is a process of its own. Caches and data lie in
a temporary directory (about 2.5 GiB); just written, they are in the page cache of the system. What the driver
holds over many steps is measured by `driver_scale`.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from report import GIB, arguments, in_new_process, publish, resident, table

IMAGES = 200
SIZES = ((1152, 896), (1024, 1024), (896, 1152), (1280, 800))
"""About a megapixel."""


def make_data(path: Path, rows: int) -> None:
    """A parquet file of one image a row."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    rng = np.random.default_rng(0)
    images = []
    for width, height in SIZES * (IMAGES // len(SIZES)):
        small = rng.integers(0, 255, (height // 16, width // 16, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        picture = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
        picture.save(buffer, "JPEG", quality=90)
        images.append(buffer.getvalue())
    images_type = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    schema = pa.schema([("images", images_type), ("problem", pa.string()), ("answer", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, rows, 100):
            batch = []
            for i in range(start, min(start + 100, rows)):
                data = images[i % IMAGES]
                image = {"bytes": data[:2] + b"\xff\xfe\x00\x12" + rng.bytes(16) + data[2:], "path": None}
                problem = f"<image>In figure {i}, AB = {i % 97} and BC = {i % 89}. {'What is the area? ' * 8}"
                batch.append({"images": [image], "problem": problem, "answer": str(i)})
            writer.write_table(pa.Table.from_pylist(batch, schema=schema))


def load(data: Path) -> dict[str, float]:
    """One loading, as `mssr train` does it; its time without and with the start of Python."""
    from mssr.config import Config
    from mssr.data.encoder import PromptEncoder
    from mssr.data.loading import load_prompts
    from mssr.models.loading import load_processor

    config = Config()
    config.model.path, config.data.train = str(data.parent / "model"), str(data)
    config.data.max_prompt_length = 4096
    encoder = PromptEncoder(load_processor(config.model), config.data)
    before, started = resident(), time.monotonic()
    loaded = load_prompts(config.data.train, config.data, encoder, data.parent / "bad_rows.jsonl")
    return {
        "prompts": len(loaded.dataset),
        "seconds": time.monotonic() - started,
        "process": time.time() - psutil.Process().create_time(),
        "before": before / GIB,
        "after": resident() / GIB,
        "peak": resident("VmHWM") / GIB,
    }


def measure(folder: Path, rows: int) -> list[str]:
    from mssr.models.tiny import build_tiny

    build_tiny(folder / "model", "qwen2_5_vl", ["What is the area?", "In figure, AB and BC."] * 3, seed=0)
    data, found = folder / "megapixel.parquet", []
    make_data(data, rows)
    environment = {
        "MSSR_CACHE": str(folder / "cache"),
        "HF_HOME": str(folder / "hf"),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    for name in ("first", "second"):
        r = in_new_process("--load", str(data), **environment)
        assert r["prompts"] == rows
        memory = f"{r['before']:.2f} -> {r['after']:.2f}", f"{r['peak']:.2f}"
        found.append((name, f"{r['seconds']:.2f}", f"{r['process']:.1f}", *memory))
    columns = "run", "load_prompts, s", "process with imports, s", "RSS before -> after, GiB", "peak RSS, GiB"
    size = f"({data.stat().st_size / GIB:.2f} GiB of parquet)"
    return [f"{rows:,} rows with an image of about a megapixel {size}", "", *table(columns, found)]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        print(json.dumps(load(args.load)))
        return
    with tempfile.TemporaryDirectory(prefix="mssr-bench-") as folder:
        publish(args, lambda: measure(Path(folder), args.rows))


if __name__ == "__main__":
    main()
