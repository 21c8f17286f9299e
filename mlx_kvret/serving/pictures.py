"""Pictures of a chat: from data URLs to what the model's processor makes of them, within limits."""

from __future__ import annotations

import io
import threading
import warnings
import weakref
from collections.abc import Sequence
from typing import Any

from ..core.images import of_data_url, open_picture
from ..core.options import short
from ..errors import ConfigError
from .failures import Refusal

# others, such as EPS, are read by programs of their own
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
# bytes of what processors made that wait to be read, of all requests
HELD = 2 << 30


class Sights:
    """What a processor made of the pictures of a prompt, until the prompt is read.

    Raises:
        Refusal: 429 if as much waits as may.
    """

    _lock, _held = threading.Lock(), 0

    def __init__(self, made: dict[str, Any]) -> None:
        nbytes = sum(int(getattr(value, "nbytes", 0)) for value in made.values())
        with Sights._lock:
            if Sights._held and Sights._held + nbytes > HELD:
                raise Refusal(
                    429, "as many pictures wait as may; try again in 5 s", code="queue_full", wait=5
                )
            Sights._held += nbytes
        self._made: dict[str, Any] | None = made
        self._release = weakref.finalize(self, Sights._give_back, nbytes)

    def take(self) -> dict[str, Any]:
        """Once; whoever takes it keeps it no longer than needed."""
        made, self._made = self._made, None
        assert made is not None
        self._release()
        return made

    @staticmethod
    def _give_back(nbytes: int) -> None:
        with Sights._lock:
            Sights._held -= nbytes


def opened(urls: Sequence[str]) -> list[Any]:
    """Pictures as images of PIL.

    Raises:
        Refusal: one is no data URL, is broken, or of another format; or all together are too large.
    """
    from PIL import Image

    most, pixels, found = Image.MAX_IMAGE_PIXELS or 89_478_485, 0, []
    for number, url in enumerate(urls, 1):
        name = f"picture {number} of the messages"
        if url[:5].lower() != "data:":
            raise Refusal(
                400,
                f"{name} is {short(url)}; this server fetches no URL and opens no file: give a data URL, "
                "data:image/png;base64,...",
                param="messages",
            )
        try:
            data = of_data_url(url, name)
            width, height = _size(data, name)
            pixels += width * height
            if pixels > most:
                raise ConfigError(
                    f"the pictures of the messages have {pixels:,} pixels up to number {number}; this server "
                    f"reads at most {most:,}: make them smaller"
                )
            found.append(open_picture(data, name))
        except ConfigError as error:
            raise Refusal(400, str(error), param="messages") from None
    return found


def _size(data: bytes, name: str) -> tuple[int, int]:
    """Width and height as the file's head tells them, before any pixel is decoded."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                width, height = image.size
    except Image.DecompressionBombError as error:
        raise ConfigError(f"{name} is too large: {error}; make it smaller") from error
    except Exception as error:  # decoders of many makes, on bytes from anywhere
        raise ConfigError(
            f"{name} is no picture that can be read; this server reads {', '.join(FORMATS)}"
        ) from error
    return width, height
