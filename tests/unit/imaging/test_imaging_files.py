from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from splitward.errors import DataError
from splitward.imaging.files import MAX_PIXELS, read_image

GREY = np.arange(48, dtype=np.uint8).reshape(6, 8)
DEEP = GREY.astype(np.uint16) * 1000
COLOUR = np.stack([GREY, GREY + 50, GREY + 100], axis=2)


def encode(image: Image.Image, name: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, name)
    return buffer.getvalue()


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "pgm"])
def test_grey_survives_exactly(tmp_path, suffix):
    path = tmp_path / f"grey.{suffix}"
    Image.fromarray(GREY).save(path)
    assert np.array_equal(read_image(path), GREY)


@pytest.mark.parametrize("suffix", ["png", "tiff", "pgm"])
def test_sixteen_bits_survive_exactly(tmp_path, suffix):
    path = tmp_path / f"deep.{suffix}"
    Image.fromarray(DEEP).save(path)
    pixels = read_image(path)
    assert pixels.dtype == np.uint16
    assert np.array_equal(pixels, DEEP)


def tiff(data, width, height, bits, photometric, order="<", sample_format=1) -> bytes:
    """Grey TIFF of one strip; photometric 0 is WhiteIsZero, 1 BlackIsZero; sample format 1 unsigned, 2 signed."""
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: height}
    tags |= {279: len(data), 339: sample_format}
    entries = b"".join(struct.pack(f"{order}HHIHH", tag, 3, 1, value, 0) for tag, value in tags.items())
    mark = b"II" if order == "<" else b"MM"
    start = struct.pack(f"{order}2sHI", mark, 42, 8 + len(data)) + data
    return start + struct.pack(f"{order}H", len(tags)) + entries + bytes(4)


TWELVE = bytes([0x00, 0x08, 0x01, 0xFF, 0xFF, 0xFF])
"""0, 2049, 4095, 4095 in 12 bits each."""
TIFFS = {
    "16_bits": (tiff(np.array([[258, 65535]], "<u2").tobytes(), 2, 1, 16, 1), [258, 65535]),
    "16_bits_big_endian": (tiff(np.array([[258, 65535]], ">u2").tobytes(), 2, 1, 16, 1, ">"), [258, 65535]),
    "16_bits_white_is_zero": (tiff(np.array([[0, 65535]], "<u2").tobytes(), 2, 1, 16, 0), [65535, 0]),
    "12_bits": (tiff(TWELVE, 4, 1, 12, 1), [0, round(2049 / 4095 * 65535), 65535, 65535]),
    "8_bits": (tiff(bytes([0, 200]), 2, 1, 8, 1), [0, 200]),
    "8_bits_white_is_zero": (tiff(bytes([0, 200]), 2, 1, 8, 0), [255, 55]),
    "4_bits": (tiff(bytes([0x0F]), 2, 1, 4, 1), [0, 255]),
    "4_bits_white_is_zero": (tiff(bytes([0x0F]), 2, 1, 4, 0), [255, 0]),
    "1_bit": (tiff(bytes([0b01000000]), 2, 1, 1, 1), [0, 255]),
    "1_bit_white_is_zero": (tiff(bytes([0b01000000]), 2, 1, 1, 0), [255, 0]),
}


@pytest.mark.parametrize("name", TIFFS)
def test_black_and_white_of_a_tiff_are_its_own(tmp_path, name):
    data, expected = TIFFS[name]
    path = tmp_path / "a.tiff"
    path.write_bytes(data)
    pixels = read_image(path)
    assert pixels.dtype == (np.uint16 if name.startswith(("16", "12")) else np.uint8)
    assert pixels.dtype.isnative
    assert pixels.tolist() == [expected]


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate"])
def test_a_packed_tiff_of_16_bits_may_have_its_white_at_zero(tmp_path, compression):
    path = tmp_path / "a.tiff"
    Image.fromarray(DEEP).save(path, compression=compression, tiffinfo={262: 0})
    with Image.open(path) as image:
        assert image.tag_v2[262] == 0
    assert np.array_equal(read_image(path), 65535 - DEEP)


def test_a_pgm_is_scaled_by_its_own_white(tmp_path):
    path = tmp_path / "a.pgm"
    path.write_bytes(b"P5 3 1 4095\n" + np.array([0, 2049, 4095], ">u2").tobytes())
    pixels = read_image(path)
    assert pixels.dtype == np.uint16
    assert pixels.tolist() == [[0, round(2049 / 4095 * 65535), 65535]]


def png(bits: int, colour_type: int, row: bytes, width: int, transparent: bytes = b"") -> bytes:
    """PNG of one row; colour type 0 is grey, 2 RGB, 4 grey with alpha."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, bits, colour_type, 0, 0, 0))
    colour = chunk(b"tRNS", transparent) if transparent else b""
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + colour
        + chunk(b"IDAT", zlib.compress(b"\0" + row))
        + chunk(b"IEND", b"")
    )


PNGS = {
    "grey_16": (png(16, 0, struct.pack(">3H", 0, 258, 65535), 3), np.uint16, [0, 258, 65535]),
    "grey_16_transparent": (
        png(16, 0, struct.pack(">3H", 7, 258, 65535), 3, struct.pack(">H", 65535)),
        *(np.uint16, [7, 258, 0]),
    ),
    "grey_8_transparent": (png(8, 0, bytes([7, 200]), 2, struct.pack(">H", 200)), np.uint8, [7, 0]),
    "grey_2": (png(2, 0, bytes([0b00011011]), 4), np.uint8, [0, 85, 170, 255]),
    "grey_alpha_16": (
        png(16, 4, struct.pack(">4H", 51400, 65535, 51400, 0), 2),
        *(np.uint8, [[200, 200, 200], [0, 0, 0]]),
    ),
    "rgb_16": (png(16, 2, struct.pack(">3H", 51400, 257, 65535), 1), np.uint8, [[200, 1, 255]]),
}


@pytest.mark.parametrize("name", PNGS)
def test_each_kind_of_png(tmp_path, name):
    data, dtype, expected = PNGS[name]
    path = tmp_path / "a.png"
    path.write_bytes(data)
    pixels = read_image(path)
    assert pixels.dtype == dtype
    assert pixels.tolist() == [expected]


def test_colour_survives_exactly(tmp_path):
    path = tmp_path / "colour.png"
    Image.fromarray(COLOUR).save(path)
    assert np.array_equal(read_image(path), COLOUR)


def test_jpeg_is_close(tmp_path):
    path = tmp_path / "grey.jpg"
    Image.fromarray(GREY).save(path, quality=95)
    assert np.abs(read_image(path).astype(int) - GREY).max() < 6


def test_palette_becomes_its_colours(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    image.save(tmp_path / "palette.png")
    assert read_image(tmp_path / "palette.png").tolist() == [[[10, 20, 30], [40, 50, 60]]]


def test_transparent_parts_lie_over_black(tmp_path):
    Image.fromarray(np.array([[[200, 100, 50, 255], [200, 100, 50, 0]]], np.uint8)).save(tmp_path / "rgba.png")
    assert read_image(tmp_path / "rgba.png").tolist() == [[[200, 100, 50], [0, 0, 0]]]
    Image.merge("LA", [Image.new("L", (1, 1), 90), Image.new("L", (1, 1), 0)]).save(tmp_path / "la.png")
    assert read_image(tmp_path / "la.png").tolist() == [[0]]


def test_one_bit_is_black_and_white(tmp_path):
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "bit.png")
    assert read_image(tmp_path / "bit.png").tolist() == [[255, 0]]


def png_header(width: int, height: int) -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunk = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    )


WHOLE_PNG = encode(Image.fromarray(GREY), "PNG")
HOSTILE = {
    "empty": (b"", "no whole image"),
    "text": (b"not an image\n" * 50, "no whole image"),
    "zip": (b"PK\x03\x04" + bytes(64), "no whole image"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no whole image"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no whole image"),
    "png_header_half": (WHOLE_PNG[:30], "no whole image"),
    "png_half": (WHOLE_PNG[:-30], "truncated or damaged"),
    "png_bit_flip": (WHOLE_PNG[:45] + bytes([WHOLE_PNG[45] ^ 0x55]) + WHOLE_PNG[46:], "truncated or damaged"),
    "jpeg_half": (encode(Image.fromarray(COLOUR), "JPEG")[:-40], "truncated or damaged"),
    "bmp_half": (encode(Image.fromarray(GREY), "BMP")[:-10], "truncated or damaged"),
    "tiff_half": (encode(Image.fromarray(GREY), "TIFF")[:40], "no whole image"),
    "pgm_short": (b"P5 4 4 255\n" + bytes(3), "truncated or damaged"),
    "pgm_letters": (b"P5 four 4 255\n" + bytes(16), "truncated or damaged"),
    "png_over_limit": (png_header(8193, 8192), "over the limit"),
    "png_bomb": (png_header(60000, 60000), "decompression bomb"),
    "pgm_bomb": (b"P5 99999 99999 255\n", "decompression bomb"),
    "tiff_float": (encode(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"), "holds floats"),
    "tiff_32_bit": (
        encode(Image.fromarray(np.full((2, 2), 7, np.int32)), "TIFF"),
        "32-bit numbers whose white",
    ),
    "tiff_signed": (
        tiff(np.array([[1, 2]], "<i2").tobytes(), 2, 1, 16, 1, sample_format=2),
        "16-bit numbers whose",
    ),
    "tiff_10_bit": (tiff(bytes(10), 4, 2, 10, 1), "no whole image"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_by_name_with_fault_and_remedy(tmp_path, name):
    data, fault = HOSTILE[name]
    path = tmp_path / f"{name}.png"
    path.write_bytes(data)
    with pytest.raises(DataError, match=fault) as caught:
        read_image(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert str(caught.value).endswith(".")


def test_the_limit_lets_a_mammogram_pass():
    assert MAX_PIXELS > 4728 * 5928


def test_missing_files_and_folders_are_refused(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_image(tmp_path / "none.png")
    with pytest.raises(DataError, match="damaged"):
        read_image(tmp_path)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["PNG", "JPEG", "BMP", "TIFF", "PPM"]), st.data())
def test_mutated_files_give_pixels_or_a_data_error(tmp_path, name, data):
    whole = bytearray(encode(Image.fromarray(COLOUR), name))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "mutated"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    try:
        pixels = read_image(path)
    except DataError:
        return
    assert pixels.dtype in (np.uint8, np.uint16)
