"""Images as bytes: from a data URI, a file or Pillow, checked before anything is decoded, to a model's pixels.

Pillow is asked for only when an image is really to be decoded.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
import stat
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hanlin.errors import RequestError, need

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["LARGEST", "from_base64", "from_uri", "of", "of_part", "pixels", "read"]

LARGEST = 20 << 20  # bytes of an image file
_PIXELS = 40_000_000
_SIDE = 20_000
# Raster formats whose decoders are widely fuzzed; PDF, EPS, TIFF and the rest stay closed.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
# What the released code subtracts from the colours, and divides them by: CLIP's mean and deviation.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_DEVIATION = (0.26862954, 0.26130258, 0.27577711)


def from_base64(text: str) -> bytes:
    """Raises:
    RequestError: no base64, nothing, or too much.
    """
    if len(text) > LARGEST * 4 // 3 + 4:
        raise RequestError(f"an image must be of at most {LARGEST >> 20} MiB")
    try:
        data = base64.b64decode(text.encode("ascii"), validate=True)
    except (UnicodeEncodeError, binascii.Error, ValueError) as error:
        raise RequestError(f"an image must be given as base64: {error}") from error
    return _sized(data)


def from_uri(uri: object) -> bytes:
    """The image of a `data:` URI. No other is followed: this program fetches nothing for a request.

    Raises:
        RequestError: another URI, or what `from_base64` refuses.
    """
    if not isinstance(uri, str) or uri[:5].lower() != "data:":
        shown = uri[:40] if isinstance(uri, str) else type(uri).__name__
        raise RequestError(
            f"an image must be given as a data URI (data:image/png;base64,...), not {shown!r}; nothing is fetched"
        )
    head, comma, body = uri.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise RequestError("a data URI of an image must be like data:image/png;base64,...")
    return from_base64(body)


def read(path: str | os.PathLike[str]) -> bytes:
    """A file of this machine, for callers that may name files: never for a request from elsewhere.

    Raises:
        RequestError: no such file, no regular file, or one that is too large.
    """
    try:
        with open(path, "rb") as file:  # noqa: PTH123 - a path may be anything that the system takes
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise RequestError(f"{path}: not a regular file")
            return _sized(file.read(LARGEST + 1), f"{os.fspath(path)}: ")
    except (OSError, ValueError) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(f"{path}: the image cannot be read: {error}") from error


def of(value: Any) -> bytes:
    """An image file's bytes, of bytes, a path, or an image of Pillow's; see `read`.

    Raises:
        RequestError: anything else.
    """
    if isinstance(value, (bytes, bytearray, memoryview)):
        return _sized(bytes(value))
    if isinstance(value, str) and value[:5].lower() == "data:":
        return from_uri(value)
    if isinstance(value, (str, os.PathLike)):
        return read(value)
    if hasattr(value, "save") and hasattr(value, "mode"):
        out = io.BytesIO()
        value.convert("RGB").save(out, "PNG", compress_level=1)
        return _sized(out.getvalue())
    raise RequestError(f"an image must be bytes, a path or a Pillow image, not {type(value).__name__}")


def of_part(part: Mapping[str, Any]) -> bytes | None:
    """The image of a part of a message, or None where it is no image's: {"type": "image", "image": bytes}, OpenAI's
    `image_url` and `input_image`. What names a file is refused here.

    Raises:
        RequestError: an image that cannot be read.
    """
    kind = part.get("type")
    if kind == "image":
        value = part.get("image")
        return _sized(value) if isinstance(value, bytes) else from_uri(value)
    if kind not in ("image_url", "input_image"):
        return None
    value = part.get("image_url")
    return from_uri(value.get("url") if isinstance(value, Mapping) else value)


def _sized(data: bytes, name: str = "") -> bytes:
    if not data:
        raise RequestError(f"{name}the image is empty")
    if len(data) > LARGEST:
        raise RequestError(f"{name}an image must be of at most {LARGEST >> 20} MiB")
    return data


def pixels(data: bytes, size: int) -> NDArray[np.float32]:
    """An image file as (3, size, size) float32, resized and normalised as the released code does.

    Its size is checked before it is decoded. It is turned as its EXIF orientation says, which the released code does
    not look at; what is transparent in it shows whatever colour is stored there, as with the released code.

    Raises:
        RequestError: no image, of a format that is not read, animated, too large, or broken.
        MissingExtraError: Pillow is not installed.
    """
    need("PIL", extra="vision", feature="an image in a message")
    import numpy as np
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            width, height = image.size
            if not (0 < width <= _SIDE and 0 < height <= _SIDE and width * height <= _PIXELS):
                raise RequestError(
                    f"an image of {width} x {height} pixels is too large: at most {_SIDE} a side and {_PIXELS} in all"
                )
            if getattr(image, "is_animated", False):
                raise RequestError("an animated image cannot be read: give one picture of it")
            image.load()
            try:
                upright = ImageOps.exif_transpose(image)
            except Exception:  # metadata may be anything; the picture is fine without
                upright = image
            small = upright.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    except RequestError:
        raise
    except UnidentifiedImageError as error:
        raise RequestError(f"this is not an image in {', '.join(_FORMATS)}") from error
    except Exception as error:  # Pillow's decoders raise nearly anything for broken files
        reason = str(error) or type(error).__name__
        raise RequestError(f"the image is broken or too large: {reason[:200]}") from error
    colours = np.asarray(small, np.float32) / np.float32(255)
    normal = (colours - np.asarray(_MEAN, np.float32)) / np.asarray(_DEVIATION, np.float32)
    return np.ascontiguousarray(normal.transpose(2, 0, 1))
