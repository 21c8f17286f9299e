"""A picture in any of the forms people have it in, as one PIL image; nothing is ever fetched.

A form is a file's path, ``file://`` or not; a data URL, or the bytes of a file; an image of PIL; an array of
numpy, torch or MLX, (h, w), (h, w, 1, 3 or 4) or (1, 3 or 4, h, w), 0 to 255 as bytes or 0 to 1 as floats.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes, urlparse
from urllib.request import url2pathname

import numpy as np

from ..errors import ConfigError, MissingDependencyError
from .installed import command_for
from .options import short

# an alias: PIL is there only where pictures are
Image = Any
FORMS = "give a file, a data URL, an image of PIL or an array"
_SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+:")


def open_picture(source: Any, name: str = "the picture", folder: Path | None = None) -> Image:
    """A picture as a PIL image in RGB, turned as its EXIF data say.

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
    if isinstance(source, (bytes, bytearray)):
        return _decoded(io.BytesIO(bytes(source)), name)
    if isinstance(source, (str, os.PathLike)):
        return _named(os.fspath(source), name, folder)
    if hasattr(source, "shape") and hasattr(source, "dtype"):
        return pil.fromarray(_bytes_of(source, name)).convert("RGB")
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
    scheme = _SCHEME.match(text)
    if scheme and text[:5].lower() == "file:":
        parts = urlparse(text)
        if parts.netloc not in ("", "localhost"):
            raise ConfigError(f"{name} is {short(text)}, on another machine; give a file of this one")
        text = url2pathname(parts.path)
    elif scheme and len(scheme[0]) > 2:
        raise ConfigError(
            f"{name} is {short(text)}, and nothing is fetched; download it, and give the file or a data URL"
        )
    path = Path(text).expanduser()
    path = path if folder is None else folder / path
    try:
        with path.open("rb") as file:
            return _decoded(file, f"{name} ({path})")
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{name}: cannot read {short(str(path))}: {reason}; {FORMS}") from error


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
            if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
                raise ConfigError(
                    f"{name} is an animation of {image.n_frames} frames; give the frames as pictures"
                )
            image.load()
            return _upright(image, name)
    except ConfigError:
        raise
    except Exception as error:  # decoders of many makes, on files from anywhere
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ConfigError(f"{name} is no picture that can be read: {reason[:200]}; {FORMS}") from error


def _upright(image: Image, name: str) -> Image:
    from PIL import ImageOps

    if 0 in image.size:
        raise ConfigError(f"{name} has {image.size[0]} x {image.size[1]} pixels; give one that has some")
    try:
        return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # images of PIL read their file late
        raise ConfigError(f"{name} is no picture that can be read: {error}; {FORMS}") from error


def _bytes_of(source: Any, name: str) -> np.ndarray[Any, Any]:
    """An array's pixels as (h, w, 3 or 4) or (h, w), uint8."""
    try:
        pixels = np.asarray(source)
    except Exception as error:  # on another device, or needing a gradient
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
    if np.issubdtype(pixels.dtype, np.floating) and low >= 0 and high <= 1:
        return np.rint(pixels * 255).astype(np.uint8)
    raise ConfigError(
        f"{name} is {pixels.dtype} from {low} to {high}; expected bytes of 0 to 255, or floats of 0 to 1"
    )
