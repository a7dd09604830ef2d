"""Images from outside: whatever the bytes are, they become pixels or a RequestError, in bounded time and memory."""

from __future__ import annotations

import base64
import contextlib
import io
import struct
import zlib
from typing import Any

import pytest

pytest.importorskip("PIL", reason="needs Pillow: pip install 'hanlin[vision]'")

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from hanlin import images
from hanlin.errors import RequestError
from hanlin.types import Message
from visualglm_directory import picture

KINDS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, data: bytes, *more: bytes) -> bytes:
    """A PNG that says it is so large, whatever it holds."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + b"".join(more) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", KINDS)
def test_known_formats(kind: str) -> None:
    found = images.pixels(picture(3, kind), 28)
    assert found.shape == (3, 28, 28) and found.dtype == np.float32 and np.isfinite(found).all()


def test_pixels_are_the_released_codes() -> None:
    data = picture(1)
    small = Image.open(io.BytesIO(data)).convert("RGB").resize((224, 224), Image.Resampling.BICUBIC)
    mean, deviation = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    want = (np.asarray(small, np.float64) / 255 - mean) / deviation
    assert np.abs(images.pixels(data, 224) - want.transpose(2, 0, 1)).max() < 1e-5


def test_extremes() -> None:
    one = io.BytesIO()
    Image.new("RGB", (1, 1), (10, 20, 30)).save(one, "PNG")
    assert images.pixels(one.getvalue(), 14).shape == (3, 14, 14)
    for mode in ("1", "L", "LA", "P", "RGBA", "I;16"):
        out = io.BytesIO()
        Image.new(mode, (3, 5)).save(out, "PNG")
        assert images.pixels(out.getvalue(), 14).shape == (3, 14, 14)
    turned = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 4)).save(turned, "JPEG", exif=exif)
    assert images.pixels(turned.getvalue(), 14).shape == (3, 14, 14)
    with pytest.raises(RequestError, match="too large"):
        images.pixels(png(19_999, 19_999, zlib.compress(b"")), 14)
    with pytest.raises(RequestError, match="too large"):
        images.pixels(png(2**31 - 1, 2**31 - 1, zlib.compress(b"")), 14)
    with pytest.raises(RequestError, match="too large"):
        images.pixels(png(20_001, 1, zlib.compress(b"")), 14)
    bomb = chunk(b"zTXt", b"a\0\0" + zlib.compress(b"a" * (100 << 20)))
    with contextlib.suppress(RequestError):  # 100 MB are not unpacked; whether the rest is read is Pillow's to say
        images.pixels(png(1, 1, zlib.compress(b"\0\1\2\3"), bomb), 14)
    frames = io.BytesIO()
    Image.new("RGB", (4, 4)).save(frames, "GIF", save_all=True, append_images=[Image.new("RGB", (4, 4), "red")])
    with pytest.raises(RequestError, match="animated"):
        images.pixels(frames.getvalue(), 14)
    for data in (b"%PDF-1.4", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"II*\0" + bytes(100), b"%!PS-Adobe"):
        with pytest.raises(RequestError, match="not an image"):
            images.pixels(data, 14)
    with pytest.raises(RequestError, match="at most 20 MiB"):
        images.of(bytes(images.LARGEST + 1))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), kind=st.sampled_from(KINDS))
def test_broken_files(data: Any, kind: str) -> None:
    whole = bytearray(picture(5, kind, (17, 9)))
    for _ in range(data.draw(st.integers(1, 6))):
        place = data.draw(st.integers(0, len(whole) - 1))
        whole[place] = data.draw(st.integers(0, 255))
    cut = bytes(whole[: data.draw(st.integers(0, len(whole)))]) + data.draw(st.binary(max_size=8))
    try:
        found = images.pixels(cut, 14)
    except RequestError:
        return
    assert found.shape == (3, 14, 14) and np.isfinite(found).all()


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    with contextlib.suppress(RequestError):
        assert images.pixels(data, 14).shape == (3, 14, 14)


@settings(max_examples=200, deadline=None)
@given(value=st.one_of(st.text(max_size=60), st.none(), st.integers(), st.binary(max_size=9), st.lists(st.text())))
def test_parts_of_messages(value: Any) -> None:
    for part in ({"type": "image", "image": value}, {"type": "image_url", "image_url": value}):
        for given_part in (part, {"type": "image_url", "image_url": {"url": value}}):
            try:
                found = Message.parse({"role": "user", "content": [given_part]}).images
            except RequestError:
                continue
            assert found and all(isinstance(each, bytes) for each in found)


def test_uris() -> None:
    data = base64.b64encode(b"abc").decode()
    assert images.from_uri(f"data:image/png;base64,{data}") == b"abc"
    wrong = ("http://a/b", "file:///etc/passwd", "/etc/passwd", "data:image/png,abc", "data:;base64,?", "data:", "", 5)
    for uri in wrong:
        with pytest.raises(RequestError):
            images.from_uri(uri)
