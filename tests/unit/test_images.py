"""Pixels come out upright and in RGB, and the size from the header is the size after decoding."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from mssr.data.images import ImageSource, image_cells, image_sources
from tests.unit.data_forms import encoded, picture, png_header

pytestmark = pytest.mark.unit
FIXTURES = Path(__file__).parents[1] / "fixtures" / "inputs"


def source(data: bytes) -> ImageSource:
    return ImageSource(data, None)


@pytest.fixture
def no_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object) -> None:
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr(ImageSource, "decode", load)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF"])
def test_the_header_is_enough(form: str, no_decoding: None) -> None:
    assert source(encoded(form)).size() == (64, 48)


@pytest.mark.parametrize("form", ["BMP", "TIFF", "PPM"])
def test_formats_without_an_end_are_decoded(form: str) -> None:
    data = encoded(form)
    assert source(data).size() == (64, 48)
    with pytest.raises(ValueError):
        source(data[:-100]).size()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_rotation(form: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(form, exif=exif)
    decoded = source(data).decode()
    assert source(data).size() == decoded.size == ((48, 64) if orientation >= 5 else (64, 48))
    with Image.open(io.BytesIO(data)) as image:
        expected = ImageOps.exif_transpose(image)
    assert np.array_equal(np.asarray(decoded), np.asarray(expected))


def test_exif_that_cannot_be_written_again(monkeypatch: pytest.MonkeyPatch) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(exif=exif)
    monkeypatch.delattr(Image.Exif, "tobytes")
    assert source(data).size() == source(data).decode().size == (48, 64)


def test_exif_behind_the_pixels_of_a_png() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded("PNG", exif=exif)
    start = data.index(b"eXIf") - 4
    chunk = data[start : start + 12 + int.from_bytes(data[start : start + 4], "big")]
    moved = data.replace(chunk, b"")[:-12] + chunk + data[-12:]
    assert source(moved).size() == source(moved).decode().size == (48, 64)


def test_transparency_is_white() -> None:
    for mode in ("RGBA", "LA"):
        image = Image.new(mode, (4, 4))
        assert source(encoded("PNG", image)).decode().getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([9, 9, 9, 200, 0, 0])
    palette.putpixel((1, 1), 1)
    decoded = source(encoded("PNG", palette, transparency=0)).decode()
    assert decoded.getpixel((0, 0)) == (255, 255, 255) and decoded.getpixel((1, 1)) == (200, 0, 0)


def test_modes() -> None:
    cmyk = source(encoded("JPEG", picture().convert("CMYK"))).decode()
    assert cmyk.mode == "RGB" and np.abs(np.asarray(cmyk, int) - np.asarray(picture(), int)).mean() < 60
    ramp = np.linspace(0, 65535, 64 * 48).reshape(48, 64)
    deep = np.asarray(source(encoded("PNG", Image.fromarray(ramp.astype(np.uint16)))).decode())
    assert np.abs(deep[..., 0] - ramp / 257).max() <= 1  # and not cut off at 255
    floats = np.asarray(source(encoded("TIFF", Image.fromarray((ramp / 65535).astype(np.float32)))).decode())
    assert np.abs(floats[..., 0] - ramp / 257).max() <= 1
    assert source(encoded("PNG", picture().convert("1"))).decode().mode == "RGB"


def depth_png(values: np.ndarray, bits: int | None = None) -> bytes:
    """A 16-bit PNG, with a chunk sBIT where bits are given."""
    data = encoded("PNG", Image.fromarray(values.astype(np.uint16)))
    if bits is None:
        return data
    chunk = b"sBIT" + bytes([bits])
    place = data.index(b"IDAT") - 4
    return data[:place] + struct.pack(">I", 1) + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[place:]


@pytest.mark.parametrize(
    ("top", "bits", "white"),
    [
        (4095, None, 255),  # 12 bits, as scanners write them
        (255, None, 255),
        (65535, None, 255),
        (30000, None, 30000 / 257),
        (1023, 10, 255),
        (16383, 14, 255),
        (65535, 12, 255),  # as the standard wants it: scaled to 16 bits
        (3000, 16, 3000 / 257),
    ],
)
def test_depths_of_16_bit_pngs(top: int, bits: int | None, white: float) -> None:
    ramp = np.linspace(0, top, 64 * 48).reshape(48, 64)
    seen = np.asarray(source(depth_png(ramp, bits)).decode())[..., 0]
    assert np.abs(seen - ramp * white / top).max() <= 1


def test_12_bits_of_three_colours() -> None:
    """Of which PIL gives the upper 8 of 16."""
    rows = (np.linspace(0, 4095, 64 * 48 * 3).reshape(48, 64 * 3)).astype(">u2")
    raw = b"".join(b"\0" + row.tobytes() for row in rows)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 64, 48, 16, 2, 0, 0, 0)
    png = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(raw))
        + chunk(b"IEND", b"")
    )
    seen = np.asarray(source(png).decode()).reshape(48, -1)
    assert np.abs(seen - rows.astype(float) / 16.06).max() <= 17


def test_the_scan_of_12_bits() -> None:
    seen = np.asarray(source((FIXTURES / "g12in16.png").read_bytes()).decode())
    assert seen.max() == 255 and seen.mean() > 60


def test_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
    for form in ("GIF", "WEBP", "PNG"):
        options = {"save_all": True, "append_images": frames[1:]}
        if form == "WEBP":
            options["lossless"] = True
        data = encoded(form, frames[0], **options)
        assert source(data).size() == (8, 8) and source(data).decode().getpixel((0, 0)) == (255, 0, 0)


def test_a_cut_file_is_found_without_its_pixels() -> None:
    thumbnail = encoded("JPEG", picture(16, 16))
    exif = b"\xff\xe1" + (len(thumbnail) + 8).to_bytes(2, "big") + b"Exif\0\0" + thumbnail
    for options in ({}, {"progressive": True}):
        data = encoded("JPEG", **options)
        with_thumbnail = data[:2] + exif + data[2:]
        assert source(with_thumbnail).size() == (64, 48)
        for whole in (data, with_thumbnail):
            for cut in (2, 20, len(data) // 2):
                with pytest.raises(ValueError, match="truncated"):
                    source(whole[:-cut]).size()
    for form in ("PNG", "GIF", "WEBP"):
        data = encoded(form)
        for cut in (200, len(data) // 2, len(data) - 4):
            with pytest.raises(ValueError):
                source(data[:-cut]).size()
    data = bytearray(encoded("PNG"))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(ValueError):
        source(bytes(data)).size()


def test_harmless_ends(no_decoding: None) -> None:
    for tail in (b"\0" * 100, b"a second picture", encoded("JPEG")):
        assert source(encoded("JPEG") + tail).size() == (64, 48)


def test_a_missing_end_marker_alone_is_decided_by_decoding() -> None:
    gif = encoded("GIF")
    assert source(gif[:-1]).size() == (64, 48)
    png = encoded("PNG")
    assert source(png[:-2]).size() == (64, 48)


def test_refusals() -> None:
    for data, words in {
        b"": "empty",
        b"hello, this is text": "no image in a known format",
        b"\0\0\0\x18ftypheic" + bytes(64): "it is HEIC.*pip install pillow-heif",
        b" <svg xmlns='x'/>": "SVG",
        b"<!DOCTYPE html><html>": "a web page",
        b"%PDF-1.7": "a PDF",
        b"version https://git-lfs.github.com/spec/v1": "git lfs pull",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n": "no image in a known format",
        png_header(0, 0): "0x0",
        png_header(30000, 4000): "30000x4000 pixels, more than",
        png_header(60000, 60000): "3600000000 pixels",
    }.items():
        with pytest.raises(ValueError, match=words):
            source(data).size()


def test_text_cells(tmp_path) -> None:
    assert image_cells('["a", "b"]') == ["a", "b"] and image_cells("[a") == ["[a"] and image_cells(" ") == []
    name = "abcd1234"  # valid base64 too
    (tmp_path / name).write_bytes(encoded())
    assert image_sources(name, str(tmp_path))[0].path == str(tmp_path / name)
    for cell, words in {
        "abcd1235": "file .*abcd1235 does not exist",
        "A" * 2000 + "!": "neither a path nor base64",
        "https://x.org/a.png": "download it first",
        7: "an image is int",
    }.items():
        with pytest.raises(ValueError, match=words):
            image_sources(cell, str(tmp_path))
    for cell in ([None], [{"bytes": None, "path": None}], [""], {"bytes": b"", "path": ""}):
        with pytest.raises(ValueError, match="missing"):
            image_sources(cell)
