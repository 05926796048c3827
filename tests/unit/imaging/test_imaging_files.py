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


def test_big_endian_tiff_is_read_in_its_own_order(tmp_path):
    path = tmp_path / "big.tiff"
    width, height, bits, plain, black_is_zero, offset, samples, rows, length = 2, 1, 16, 1, 1, 8, 1, 1, 4
    values = (width, height, bits, plain, black_is_zero, offset, samples, rows, length)
    tags = zip((256, 257, 258, 259, 262, 273, 277, 278, 279), values, strict=True)
    entries = b"".join(struct.pack(">HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
    header = struct.pack(">2sHIHHH", b"MM", 42, 12, 258, 65535, len(values))
    path.write_bytes(header + entries + bytes(4))
    pixels = read_image(path)
    assert pixels.dtype == np.uint16
    assert pixels.dtype.isnative
    assert pixels.tolist() == [[258, 65535]]


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
    "tiff_32_bit": (encode(Image.fromarray(np.full((2, 2), 70000, np.int32)), "TIFF"), "outside 0..65535"),
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
    assert MAX_PIXELS > 4096 * 6144


def test_missing_files_and_folders_are_refused(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_image(tmp_path / "none.png")
    with pytest.raises(DataError, match="damaged"):
        read_image(tmp_path)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
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
