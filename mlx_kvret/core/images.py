"""A picture in any of the forms people have it in, as one PIL image; nothing is ever fetched.

A form is a file's path, ``file://`` or not; a data URL, the bytes of a file, or one that is open; an image
of PIL; an array of numpy, torch or MLX, (h, w), (h, w, 1, 3 or 4) or (1, 3 or 4, h, w), 0 to 255 as bytes or
0 to 1 as floats. What is transparent is seen on white, and 16 bits are rounded to 8.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
import re
import sys
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes
from urllib.request import url2pathname

import numpy as np

from ..errors import ConfigError, MissingDependencyError
from .installed import command_for
from .options import short

# an alias: PIL is there only where pictures are
Image = Any
FORMS = "give a file, an open file, a data URL, an image of PIL or an array"
_SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+:")
# floats of pictures that were made larger or smaller come out of 0 to 1 by rounding
_ROUNDING = 1 / 512


def open_picture(source: Any, name: str = "the picture", folder: Path | None = None) -> Image:
    """A picture as a PIL image in RGB, turned as its EXIF data say, on white where it is transparent.

    Args:
        source: in any of the forms above.
        name: what messages call it: ``"images[2]"``.
        folder: what relative paths are relative to; the working directory unless given.

    Raises:
        ConfigError: it is none of them, is not there, is no picture, or would have to be fetched.
        MissingDependencyError: Pillow is not installed.
    """
    pil = _pillow()
    if isinstance(source, pil.Image):
        return _upright(source, name)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _decoded(io.BytesIO(bytes(source)), name)
    if isinstance(source, (str, os.PathLike)):
        return _named(os.fspath(source), name, folder)
    if callable(getattr(source, "read", None)):
        return _decoded(io.BytesIO(_content(source, name)), name)
    if hasattr(source, "shape") and hasattr(source, "dtype"):
        return _on_white(pil.fromarray(_bytes_of(source, name)))
    raise ConfigError(f"{name} is {short(source)}; {FORMS}")


def _pillow() -> Any:
    try:
        import PIL.Image
    except ImportError as error:
        raise MissingDependencyError(
            f"pictures need Pillow, which is not installed; run `{command_for('pictures')}`"
        ) from error
    return PIL.Image


def _named(text: str | bytes, name: str, folder: Path | None) -> Image:
    if isinstance(text, bytes):
        text = os.fsdecode(text)
    if text[:5].lower() == "data:":
        return _decoded(io.BytesIO(of_data_url(text, name)), name)
    if not text.strip():
        raise ConfigError(f"{name} is an empty text; {FORMS}")
    path = path_of(text, name, folder)
    try:
        with path.open("rb") as file:
            return _decoded(file, f"{name} ({path})")
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        if len(text) > 500:
            reason += "; base64 begins with data:image/png;base64,"
        raise ConfigError(f"{name}: cannot read {short(str(path))}: {reason}; {FORMS}") from error


def path_of(text: str, name: str, folder: Path | None) -> Path:
    """The file that a path or a ``file:`` URL means.

    Raises:
        ConfigError: it would have to be fetched.
    """
    scheme = _SCHEME.match(text)
    if scheme and text[:5].lower() == "file:":
        text = _of_file_url(text, name)
    elif scheme and len(scheme[0]) > 2:
        raise ConfigError(
            f"{name} is {short(text)}, and nothing is fetched; download it, and give the file or a data URL"
        )
    path = Path(text).expanduser()
    return path if folder is None else folder / path


def _of_file_url(url: str, name: str) -> str:
    """The path of a ``file:`` URL. People write ``#``, ``?`` and ``~`` into them as into paths."""
    rest = url[5:]
    if rest.startswith("//"):
        host, slash, below = rest[2:].partition("/")
        if host[:1] != "~" and host.lower() not in ("", "localhost"):
            raise ConfigError(f"{name} is {short(url)}, on another machine; give a file of this one")
        rest = host + slash + below if host[:1] == "~" else slash + below
    return url2pathname(rest)


def _content(file: Any, name: str) -> bytes:
    """All bytes of an open file, which is left where it stood."""
    try:
        if not getattr(file, "seekable", bool)():
            found = file.read()
        else:
            at = file.tell()
            file.seek(0)
            try:
                found = file.read()
            finally:
                file.seek(at)
    except UnicodeError:
        found = ""
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name} is a file that cannot be read: {error}; {FORMS}") from error
    if not isinstance(found, (bytes, bytearray, memoryview)):
        raise ConfigError(
            f"{name} is an open file of {type(found).__name__}; open it for bytes, open(path, 'rb')"
        )
    return bytes(found)


def within(folder: Path | None, name: str) -> str:
    """A file's name that is relative to ``folder`` as one that is not; other texts as they are."""
    if folder is None or name.startswith("~") or _SCHEME.match(name) or not name.strip():
        return name
    return str(folder / name)


def of_data_url(text: str, name: str) -> bytes:
    """The bytes of a picture's file.

    Raises:
        ConfigError: it is of another type, or damaged.
    """
    head, comma, body = text[5:].partition(",")
    kind, *options = head.split(";")
    if not comma or not (
        kind.lower().startswith("image/") or kind.lower() in ("", "application/octet-stream")
    ):
        raise ConfigError(f"{name} is a data URL of type {short(kind)}; expected data:image/png;base64,...")
    if "base64" not in [option.strip().lower() for option in options]:
        return unquote_to_bytes(body)
    try:
        return base64.b64decode(re.sub(r"\s", "", body).encode(), altchars=None, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ConfigError(
            f"{name} is a data URL whose base64 is damaged ({error}); encode it again"
        ) from error


def _decoded(file: Any, name: str) -> Image:
    pil = _pillow()
    try:
        with pil.open(file) as image:
            return _upright(image, name)
    except ConfigError:
        raise
    except Exception as error:  # decoders of many makes, on files from anywhere
        raise _unreadable(error, name) from error


def _unreadable(error: Exception, name: str) -> ConfigError:
    unknown = isinstance(error, _pillow().UnidentifiedImageError)
    reason = "of no format that Pillow knows" if unknown else str(error).partition("\n")[0]
    reason = reason or type(error).__name__
    return ConfigError(f"{name} is no picture that can be read: {reason[:200]}; {FORMS}")


def _upright(image: Image, name: str) -> Image:
    from PIL import ImageOps

    if 0 in image.size:
        raise ConfigError(f"{name} has {image.size[0]} x {image.size[1]} pixels; give one that has some")
    try:
        # images of PIL read their file late; other frames of a camera's picture are previews of it
        if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
            raise ConfigError(
                f"{name} is an animation of {image.n_frames} frames; give the frames as pictures: "
                "[frame.copy() for frame in PIL.ImageSequence.Iterator(image)]"
            )
        upright = ImageOps.exif_transpose(image)
        if upright.mode[0] in "IF":
            upright = _pillow().fromarray(_in_bytes(upright, name))
        return _on_white(upright)
    except ConfigError:
        raise
    except Exception as error:
        raise _unreadable(error, name) from error


def _in_bytes(image: Image, name: str) -> np.ndarray[Any, Any]:
    """The pixels (h, w), uint8, of a grey picture that has more bits; Pillow itself cuts at 255."""
    pixels = np.asarray(image)
    low, high = pixels.min(), pixels.max()
    # older Pillow opens files of 16 bits as numbers of 32; what is above a byte tells
    if image.mode.startswith("I;16") or (image.mode == "I" and low >= 0 and 255 < high <= 65535):
        return np.rint(pixels / 257).astype(np.uint8)
    if image.mode == "F" and low >= 0 and 1 + _ROUNDING < high <= 255:
        # so Pillow makes them of bytes
        return np.rint(pixels).astype(np.uint8)
    return _bytes_of(pixels, name)


def _on_white(image: Image) -> Image:
    """In RGB; what is transparent as on a white page, which it is mostly made for."""
    if image.mode not in ("RGBA", "LA", "PA", "RGBa", "La") and "transparency" not in image.info:
        return image.convert("RGB")
    clear = image.convert("RGBA")
    return _pillow().alpha_composite(_pillow().new("RGBA", clear.size, "white"), clear).convert("RGB")


def _bytes_of(source: Any, name: str) -> np.ndarray[Any, Any]:
    """An array's pixels as (h, w, 3 or 4) or (h, w), uint8."""
    try:
        pixels = _on_host(source)
    except Exception as error:
        raise ConfigError(f"{name} cannot be read as an array ({error}); {FORMS}") from error
    if pixels.ndim == 3 and pixels.shape[-1] not in (1, 3, 4) and pixels.shape[0] in (1, 3, 4):
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim == 3 and pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    if pixels.size == 0 or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[-1] in (3, 4))):
        raise ConfigError(f"{name} has shape {np.shape(source)}; expected one picture, (h, w, 3) or (h, w)")
    if pixels.dtype == np.uint8:
        return np.ascontiguousarray(pixels)
    low, high = pixels.min(), pixels.max()
    if np.issubdtype(pixels.dtype, np.integer) and low >= 0 and high <= 255:
        return pixels.astype(np.uint8)
    if np.issubdtype(pixels.dtype, np.floating) and low >= -_ROUNDING and high <= 1 + _ROUNDING:
        return np.rint(pixels.clip(0, 1) * 255.0).astype(np.uint8)
    raise ConfigError(
        f"{name} is {pixels.dtype} from {low} to {high}; expected bytes of 0 to 255, or floats of 0 to 1"
    )


def _on_host(source: Any) -> np.ndarray[Any, Any]:
    try:
        if hasattr(source, "detach"):  # of torch, maybe on another device or with a gradient
            source = source.detach().cpu()
        if "bfloat16" in str(source.dtype):  # which numpy lacks
            single = getattr(sys.modules[type(source).__module__], "float32", np.float32)
            source = source.float() if hasattr(source, "float") else source.astype(single)
        return np.asarray(source)
    except Exception:  # of yet another make
        return np.array(source.tolist(), np.float32 if "float" in str(source.dtype) else None)
