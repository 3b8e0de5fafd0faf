"""Small data sets in the forms in which public ones come, and damaged images of every kind."""

from __future__ import annotations

import base64
import csv
import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def picture(width: int = 64, height: int = 48, seed: int = 0) -> Image.Image:
    """Noise, so that every byte of the encoded file matters."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))


def encoded(form: str = "JPEG", image: Image.Image | None = None, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (image or picture()).save(buffer, form, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has hardly any data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0"))
        + chunk(b"IEND", b"")
    )


def write_parquet(path: Path, rows: list[dict[str, Any]], images: str = "images") -> Path:
    fields = []
    for name, value in rows[0].items():
        if name == images:
            fields.append((name, pa.list_(IMAGE) if isinstance(value, list) else IMAGE))
        else:
            fields.append((name, pa.array([r[name] for r in rows]).type))
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema(fields)), path)
    return path


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def vision_r1_rl(folder: Path) -> Path:
    """One parquet file; answers in tags, the mark in the question."""
    rows = [
        {
            "images": [{"bytes": encoded(image=picture(56 + 28 * i, 56, i)), "path": None}],
            "problem": f"<image>Find the angle {i}.",
            "answer": f"<answer> {10 * i} </answer>",
        }
        for i in range(4)
    ]
    return write_parquet(folder / "vision_r1_rl.parquet", rows)


def geometry3k(folder: Path) -> Path:
    """A folder in the layout of the hub, three splits, images as the `datasets` library writes them."""
    import datasets

    features = datasets.Features(
        images=datasets.List(datasets.Image()),
        problem=datasets.Value("string"),
        answer=datasets.Value("string"),
    )
    root = folder / "geometry3k"
    (root / "data").mkdir(parents=True)
    for split, count in (("train", 4), ("validation", 2), ("test", 3)):
        rows = [
            {
                "images": [picture(84, 56, 10 * count + i)],
                "problem": f"<image>Find x in {split} {i}.",
                "answer": rf"\sqrt{{{i}}}",
            }
            for i in range(count)
        ]
        file = root / "data" / f"{split}-00000-of-00001.parquet"
        datasets.Dataset.from_list(rows, features=features).to_parquet(str(file))
    return root


def mmrl30k(folder: Path) -> Path:
    """Several images, one or none in a prompt; marks or not."""
    image = {"bytes": encoded("PNG"), "path": "a.png"}
    rows = [
        {"problem": "Two <image> and <image>: which?", "images": [image, image], "answer": "B"},
        {"problem": "No marks, two images.", "images": [image, image], "answer": "A"},
        {"problem": "<image>One.", "images": [image], "answer": "3.5"},
        {"problem": "No image at all.", "images": [], "answer": "7"},
    ]
    return write_parquet(folder / "mmrl30k.parquet", rows)


def mathvista(folder: Path) -> Path:
    """Other column names, one image a row outside of a list, columns that nobody needs."""
    rows = [
        {
            "pid": str(i),
            "query": f"Question: how many, {i}?",
            "choices": ["1", "2"] if i % 2 else None,
            "answer": str(i),
            "decoded_image": {"bytes": encoded(image=picture(70, 70, i)), "path": None},
            "metadata": {"split": "testmini", "height": 70},
        }
        for i in range(3)
    ]
    root = folder / "mathvista"
    write_parquet(root / "data" / "testmini-00000-of-00001.parquet", rows, images="decoded_image")
    return root


def text_only(folder: Path) -> Path:
    """JSON lines without a column of images; answers are numbers."""
    return write_jsonl(folder / "text.jsonl", [{"problem": f"{i} + {i}?", "answer": 2 * i} for i in range(5)])


def onevision_tsv(folder: Path) -> Path:
    """Base64 images in a TSV file, line breaks and tabs in quotes, answers that look like other types."""
    path = folder / "onevision.tsv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["index", "question", "answer", "image"])
        for i, answer in enumerate(("007", "NA", "1.50", "true")):
            image = base64.b64encode(encoded(image=picture(60, 60, i))).decode()
            writer.writerow([i, f'Line one\nline "two"\tof {i}', answer, image])
    return path
