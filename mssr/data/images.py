"""Image cells: every form in which data has them -> encoded bytes -> an upright RGB image.

Forms of a cell: encoded bytes; a dict of ``bytes`` and ``path``, or with an image under ``image``,
``image_url`` or ``url``; a string, which is a path (also ``file://``) where such a file exists and base64
(with or without ``data:image/...;base64,``) otherwise; a list of these, nested or not.

What is checked without decoding: the header of every format; that a JPEG has its end marker behind the
start of its scan (whatever follows it is allowed: padding, a second picture), that a PNG has all chunks
with right checksums, a GIF its trailer, a WebP the length it states. A file that fails, or is of another
format (TIFF, BMP, JPEG 2000 ...), is decoded at load time, which decides. So what can still fail in a worker
is a JPEG, GIF or WebP with damage in the middle of its data (most decoders draw garbage there without an
error), or a PNG that was written with too few pixels; the message then names the row.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import functools
import io
import json
import struct
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from mssr.errors import first_line

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO", "HEIF")
"""What is opened; not EPS and the like, which run other programs. HEIF with the package pillow-heif only."""

LONGEST_PATH = 1024
"""A longer string is base64 without looking for a file."""

MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*", b"\0\0\0")
"""How encoded images begin: tells short base64 from the name of a file that is not there."""

OTHER_FILES = (
    (b"<svg", "an SVG drawing; save it as a PNG"),
    (b"<?xml", "XML, perhaps an SVG drawing; save it as a PNG"),
    (b"%PDF", "a PDF; save its page as a PNG"),
    (b"version https://git-lfs", "a pointer of Git LFS; fetch the file with git lfs pull"),
    (b"<!doctype", "a web page, not an image"),
    (b"<html", "a web page, not an image"),
    (b"\xff\x0a", "JPEG XL; save it as a PNG or JPEG"),
    (b"\0\0\0\x0cJXL", "JPEG XL; save it as a PNG or JPEG"),
)
"""How files begin that stand where an image should, and what they are."""

HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")

IMAGE_KEYS = ("bytes", "path", "image", "image_url", "url")
"""Keys of a dict that is an image or holds one; the first with something counts."""

IMAGE_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp"),
    *(".tif", ".tiff", ".avif", ".heic", ".heif", ".jp2"),
)


class MissingFile(ValueError):
    """An image's file is not at ``path``."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"file {path} does not exist")
        self.path = str(path)


@dataclass(frozen=True, slots=True)
class ImageSource:
    """Encoded bytes of an image or the path of a file that holds them; decoded on demand."""

    data: bytes | None
    path: str | None

    def read(self) -> bytes:
        if self.data is not None:
            return self.data
        assert self.path is not None
        try:
            return Path(self.path).read_bytes()
        except FileNotFoundError:
            raise MissingFile(Path(self.path)) from None

    def size(self) -> tuple[int, int]:
        """(width, height) of the upright image, from the header; a ValueError with the reason for one that
        cannot be used, see the module for what is checked."""
        data = self.read()
        try:
            with _open(data) as image:
                width, height = image.size[::-1] if _is_turned(image, data) else image.size
                return (width, height) if _is_complete(image, data) else self.decode().size
        except Exception as error:  # PIL raises many types for a broken file
            raise ValueError(reason(error)) from error

    def decode(self) -> Image.Image:
        """The upright image in RGB: transparency on white, 16 bits scaled to 8, of an animation frame 0."""
        data = self.read()
        with _open(data) as image:
            image.load()
            image.getexif()
            for key in ("exif", "Raw profile type exif"):
                image.info.pop(key, None)  # of damaged EXIF, exif_transpose could not write the rest again
            ImageOps.exif_transpose(image, in_place=True)
            return _rgb(image, data if image.format == "PNG" else b"")


def image_sources(cell: Any, image_dir: str | None = None) -> tuple[ImageSource, ...]:
    """The images of a cell, none for null, an empty string or an empty list; a ValueError for one that is
    missing or of no known form. Nothing is opened. Relative paths start in ``image_dir``, None being the
    working directory."""
    return tuple(_image_source(part, image_dir) for part in image_cells(cell))


def image_cells(cell: Any) -> list[Any]:
    """A cell as a flat list; the text of a list, as CSV files have it, is read."""
    if isinstance(cell, str) and cell.strip()[:1] == "[" and cell.strip()[-1:] == "]":
        for read in (json.loads, ast.literal_eval):
            with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
                return image_cells(read(cell.strip()))
    if isinstance(cell, (list, tuple)):
        return [
            p for part in cell for p in (image_cells(part) if isinstance(part, (list, tuple)) else [part])
        ]
    return [] if cell is None or (isinstance(cell, str) and not cell.strip()) else [cell]


def inner_image(cell: Any) -> Any:
    """The image of a dict, or of a dict in a dict, such as a part of a message; None if it holds none."""
    while isinstance(cell, dict):
        cell = next((cell[key] for key in IMAGE_KEYS if cell.get(key)), None)
    return cell


def image_key(cell: Any) -> bytes:
    """What an image is known by in the id of its row: its bytes, or its base64 text or path."""
    cell = inner_image(cell)
    return cell if isinstance(cell, bytes) else str(cell).encode("utf-8", "surrogatepass")


def looks_like_image(cell: Any) -> bool:
    """Whether a cell holds images, by the header of its bytes or the name of its path."""
    image = next(map(inner_image, image_cells(cell)), None)
    if isinstance(image, str):
        head = image.strip()[:LONGEST_PATH]
        if head.lower().endswith(IMAGE_SUFFIXES) or head.startswith("data:image"):
            return True
        with contextlib.suppress(ValueError):
            return _base64(head[: len(head) // 4 * 4]).startswith(MAGIC[:4])  # cut off, it cannot be opened
    if not isinstance(image, bytes):
        return False
    try:
        return bool(_open(image).size)
    except ValueError as error:
        return "HEIC" in str(error)


def reason(error: Exception) -> str:
    """One line that says what is wrong."""
    # A path may hold half of a surrogate pair.
    return first_line(error).encode(errors="backslashreplace").decode()


def _image_source(cell: Any, image_dir: str | None) -> ImageSource:
    image = inner_image(cell)
    if isinstance(image, (bytes, bytearray)) and image:
        return ImageSource(bytes(image), None)
    text = image.strip() if isinstance(image, str) else ""
    if not text:
        missing = not image and not isinstance(image, int)
        raise ValueError(f"an image is {'missing' if missing else type(image).__name__ + ', no image'}")
    if text.startswith("data:"):
        return ImageSource(_base64(text.partition(",")[2]), None)
    if text.startswith(("http://", "https://")):
        raise ValueError(f"an image is the address {text[:80]}; download it first")
    if text.startswith("file://"):
        return ImageSource(None, _existing(local_path(text), image_dir))
    if len(text) > LONGEST_PATH:
        return ImageSource(_base64(text), None)
    try:
        return ImageSource(None, _existing(text, image_dir))
    except MissingFile:
        with contextlib.suppress(ValueError):
            if (data := _base64(text)).startswith(MAGIC):
                return ImageSource(data, None)
        raise


def local_path(address: str) -> str:
    """The path of a ``file://`` address."""
    return urllib.parse.unquote(urllib.parse.urlsplit(address).path)


def _existing(path: str, image_dir: str | None) -> str:
    full = Path(image_dir or ".", path).absolute()
    try:
        found = full.is_file()
    except (OSError, ValueError):  # too long, or with a null character
        found = False
    if not found:
        raise MissingFile(full)
    return str(full)


def _base64(text: str) -> bytes:
    compact = "".join(text.split()).replace("-", "+").replace("_", "/")
    try:
        return base64.b64decode(compact + "=" * (-len(compact) % 4), validate=True)
    except ValueError:
        raise ValueError("an image is text that is neither a path nor base64") from None


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    return tuple(f for f in FORMATS if f in Image.OPEN)


def _open(data: bytes) -> Image.Image:
    """The header, with PIL's limit on the number of pixels as an error."""
    if not data:
        raise ValueError("it is empty")
    try:
        image = Image.open(io.BytesIO(data), formats=_formats())
    except UnidentifiedImageError:
        raise ValueError(_unidentified(data)) from None
    width, height = image.size
    if min(width, height) < 1:
        raise ValueError(f"its size is {width}x{height}")
    limit = Image.MAX_IMAGE_PIXELS
    if limit and width * height > limit:
        raise ValueError(f"{width}x{height} pixels, more than the {limit} that are safe to decode")
    return image


def _unidentified(data: bytes) -> str:
    if data.startswith(b"\x89PNG") and 0 in (size := struct.unpack(">II", data[16:24].ljust(8, b"\1"))):
        return f"its size is {size[0]}x{size[1]}"
    if data[4:8] == b"ftyp" and data[8:12] in HEIC_BRANDS:
        if "HEIF" in _formats():
            return "its HEIC data are damaged"
        return "it is HEIC, which needs the package pillow-heif: pip install pillow-heif"
    head = data[:64].lstrip().lower()
    for start, what in OTHER_FILES:
        if head.startswith(start.lower()):
            return f"it is {what}"
    return "its header is damaged" if data.startswith(MAGIC) else "no image in a known format"


def _is_turned(image: Image.Image, data: bytes) -> bool:
    """Whether EXIF swaps width and height. PIL would decode a PNG to look for it behind the pixels."""
    plain = image.format == "PNG" and "exif" not in image.info and b"eXIf" not in data
    exif = Image.Image.getexif(image) if plain else image.getexif()
    return exif.get(ExifTags.Base.Orientation) in (5, 6, 7, 8)


def _is_complete(image: Image.Image, data: bytes) -> bool:
    """Whether the cheap checks of the module's docstring pass."""
    if image.format in ("JPEG", "MPO"):
        scan = _jpeg_scan(data)
        return scan > 0 and data.rfind(b"\xff\xd9", scan) > 0
    if image.format == "GIF":
        return data.rstrip(b"\0").endswith(b";")
    if image.format == "WEBP":
        return len(data) >= 8 + int.from_bytes(data[4:8], "little")
    if image.format == "PNG":
        with contextlib.suppress(Exception):  # PIL raises many types for a broken file
            image.verify()  # the checksums of all chunks
            return True
    return False


def _jpeg_scan(data: bytes) -> int:
    """Position of the first start-of-scan marker; thumbnails lie in segments before it. 0 without."""
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xDA:
            return position
        if marker == 0xFF:  # padding
            position += 1
        elif marker == 0x01 or 0xD0 <= marker <= 0xD8:  # without length
            position += 2
        else:
            position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return 0


def _rgb(image: Image.Image, png: bytes) -> Image.Image:
    """Args: png: the file, if it is one, which says more of depths than PIL does."""
    if image.mode.startswith(("I", "F")):
        start = png.find(b"sBIT", 33, png.find(b"IDAT"))  # a chunk before the pixels
        image = _eight_bits(image, png[start + 4] if start > 0 else None)
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        layer = image.convert("RGBA")
        ground = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(ground, layer).convert("RGB")
    if png[24:25] == b"\x10" and image.mode == "RGB" and np.asarray(image).max() < 16:
        return image.point(lambda value: value * 17)  # PIL gives the upper 8 of 16 bits, of which 12 are used
    # A copy in any case: the file is closed behind it.
    return image.copy() if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(image: Image.Image, bits: int | None) -> Image.Image:
    """16 bits, 32 bits and floats to 0-255; PIL would cut off all that is above 255.

    From black to the largest value of the smallest depth that holds all values: 8, 12 (scanners write it
    into 16-bit PNGs) or 16 bits, and 0 to 1 for floats. A file that states its significant ``bits`` has these
    or, as the PNG standard wants it, samples scaled to 16. Others, such as negative ones, by their own range.
    """
    values = np.asarray(image).astype(np.float64)
    low, high = (float(np.nanmin(values)), float(np.nanmax(values))) if np.isfinite(values).any() else (0, 0)
    depths = [bits, 16] if bits else [8, 12, 16]
    tops = [1.0] * (image.mode == "F") + [2.0**depth - 1 for depth in depths]
    if low >= 0 and high <= tops[-1]:
        low, high = 0.0, next(top for top in tops if high <= top)
    scaled = (np.nan_to_num(values) - low) / max(high - low, 1e-12) * 255
    return Image.fromarray(scaled.clip(0, 255).round().astype(np.uint8))
