"""Loading of data: seconds for the first and the second run, and the memory of a driver over 100 steps.

    python scripts/bench/data.py --out scripts/bench/results/data.md

The images are synthetic JPEGs, a few hundred different ones with random bytes in a comment, so that no two
rows are equal. Every run is a process of its own. The caches and the data lie in a temporary directory
(about 2.5 GiB at a time), which is removed at the end. Files are written just before and so are in the
page cache of the system.
"""

from __future__ import annotations

import argparse
import datetime
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

IMAGES = 200
MEGAPIXEL_SIZES = ((1152, 896), (1024, 1024), (896, 1152), (1280, 800))
SMALL_SIZES = ((576, 448), (512, 512), (448, 576), (640, 400))
STEPS, PROMPTS_PER_STEP = 100, 64


def make_data(path: Path, rows: int, sizes: tuple[tuple[int, int], ...]) -> None:
    """A parquet file of one image a row."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    rng = np.random.default_rng(0)
    images = []
    for k in range(IMAGES):
        width, height = sizes[k % len(sizes)]
        small = rng.integers(0, 255, (height // 16, width // 16, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        picture = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
        picture.save(buffer, "JPEG", quality=90)
        images.append(buffer.getvalue())
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("images", pa.list_(image)), ("problem", pa.string()), ("answer", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, rows, 100):
            batch = []
            for i in range(start, min(start + 100, rows)):
                data = images[i % IMAGES]
                data = data[:2] + b"\xff\xfe\x00\x12" + rng.bytes(16) + data[2:]
                problem = (
                    f"<image>In figure {i}, AB = {i % 97} and BC = {i % 89}. " + "What is the area? " * 8
                )
                batch.append(
                    {"images": [{"bytes": data, "path": None}], "problem": problem, "answer": str(i)}
                )
            writer.write_table(pa.Table.from_pylist(batch, schema=schema))


def data_config(data: Path) -> Any:
    from mssr.config import Config

    config = Config()
    config.model.path = str(data.parent / "model")
    config.data.train = str(data)
    config.data.max_prompt_length = 4096
    return config


def rss_gib() -> float:
    return psutil.Process().memory_info().rss / 2**30


def load(data: Path) -> Any:
    """One loading, as `mssr train` does it; its time without and with the start of Python."""
    from mssr.data.encoder import PromptEncoder
    from mssr.data.loading import load_prompts
    from mssr.models.loading import load_processor

    config = data_config(data)
    encoder = PromptEncoder(load_processor(config.model), config.data)
    before, started = rss_gib(), time.monotonic()
    loaded = load_prompts(config.data.train, config.data, encoder, data.parent / "bad_rows.jsonl")
    seconds = time.monotonic() - started
    total = time.time() - psutil.Process().create_time()
    record = {"prompts": len(loaded.dataset), "seconds": seconds, "process": total, "before": before}
    return loaded, config, record | {"after": rss_gib(), "peak": peak_gib()}


def peak_gib() -> float:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def worker(data: Path) -> None:
    """A worker with a fake engine: ids on stdin, fetches every prompt, one line a step on stdout."""
    from mssr.data.prompt_source import PromptSource

    config = data_config(data)
    started = time.monotonic()
    source = PromptSource(config)
    opened = 0.0
    for line in sys.stdin:
        ids = json.loads(line)
        source.row(ids[0])
        opened = opened or time.monotonic() - started
        # Decoding is what costs time here, so not of every prompt.
        for prompt_id in ids[::8]:
            source.get([prompt_id])
        for prompt_id in ids:
            source.row(prompt_id)
        print(json.dumps({"rss": rss_gib(), "opened": opened}), flush=True)


def driver(data: Path) -> None:
    """A driver: loads, then samples, asks the worker, reads answers, and reports its memory."""
    from mssr.data.sampler import EpochSampler

    loaded, _, record = load(data)
    command = [sys.executable, __file__, "--role", "worker", "--data", str(data)]
    sampler = EpochSampler(loaded.dataset.ids, seed=0, shuffle=True)
    memory, worker_memory = [], []
    reply: dict[str, float] = {}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin and process.stdout
        for _ in range(STEPS):
            ids = sampler.next(PROMPTS_PER_STEP)
            process.stdin.write(json.dumps(ids) + "\n")
            process.stdin.flush()
            reply = json.loads(process.stdout.readline())
            answers = loaded.dataset.answers(ids)
            assert len(answers) == len(ids)
            for prompt_id in ids[:16]:  # what a samples file shows
                loaded.dataset.row(prompt_id)
            memory.append(rss_gib())
            worker_memory.append(reply["rss"])
        process.stdin.close()
    print(json.dumps(record | {"driver": memory, "worker": worker_memory, "opened": reply["opened"]}))


def run(role: str, data: Path, folder: Path) -> dict[str, Any]:
    environment = os.environ | {
        "MSSR_CACHE": str(folder / "cache"),
        "HF_HOME": str(folder / "hf"),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [sys.executable, __file__, "--role", role, "--data", str(data)]
    output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def measure(folder: Path, rows: int, memory_rows: int) -> str:
    from mssr.models.tiny import build_tiny_qwen2_5_vl

    build_tiny_qwen2_5_vl(folder / "model", ["What is the area?", "In figure, AB and BC."] * 3, seed=0)
    lines = []
    data = folder / "megapixel.parquet"
    make_data(data, rows, MEGAPIXEL_SIZES)
    lines += [
        f"{rows:,} rows with an image of about a megapixel "
        f"({data.stat().st_size / 2**30:.2f} GiB of parquet)",
        "",
        "| run | load_prompts, s | process with imports, s | RSS before -> after, GiB | peak RSS, GiB |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in ("first", "second"):
        r = run("load", data, folder)
        assert r["prompts"] == rows
        memory = f"{r['before']:.2f} -> {r['after']:.2f} | {r['peak']:.2f}"
        lines.append(f"| {name} | {r['seconds']:.2f} | {r['process']:.1f} | {memory} |")
    data.unlink()
    subprocess.run(["rm", "-r", str(folder / "hf")], check=True)
    data = folder / "many.parquet"
    make_data(data, memory_rows, SMALL_SIZES)
    lines += [
        "",
        f"{memory_rows:,} rows ({data.stat().st_size / 2**30:.2f} GiB of parquet), {STEPS} steps of "
        f"{PROMPTS_PER_STEP} prompts with a fake engine in a worker process, loading included; RSS in GiB",
        "",
        "| process | after loading | peak of loading | step 1 | step 10 | step 50 | step 100 |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    r = run("driver", data, folder)
    for name, loading in (("driver", f"{r['after']:.3f} | {r['peak']:.3f}"), ("worker", "- | -")):
        steps = " | ".join(f"{r[name][k - 1]:.3f}" for k in (1, 10, 50, 100))
        lines.append(f"| {name} | {loading} | {steps} |")
    lines += ["", f"The worker had its first row {r['opened']:.2f} s after its imports, processor included."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--memory-rows", type=int, default=20_000)
    parser.add_argument("--out", type=Path, help="also write the tables to this file")
    parser.add_argument("--role", choices=("load", "worker", "driver"), help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role == "load":
        print(json.dumps(load(args.data)[2]))
    elif args.role:
        {"worker": worker, "driver": driver}[args.role](args.data)
    else:
        with tempfile.TemporaryDirectory(prefix="mssr-bench-") as folder:
            tables = measure(Path(folder), args.rows, args.memory_rows)
        machine = f"{os.cpu_count()} CPU cores, {psutil.virtual_memory().total / 2**30:.0f} GiB, no GPU"
        command = " ".join(["python", "scripts/bench/data.py", *sys.argv[1:]])
        text = f"`{command}`, {datetime.date.today()}, {machine}\n\n{tables}\n"
        print(text)
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(text)


if __name__ == "__main__":
    main()
