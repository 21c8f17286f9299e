"""Text of unknown origin, made fit for a terminal: no escape sequence in it does anything."""

from __future__ import annotations

import unicodedata

MOST = 4000
# other than line break and tab: controls, marks that turn the direction of what follows, lone surrogates
_REFUSED = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}


def plain(text: str, most: int = MOST) -> str:
    """The text with control and formatting characters spelt out, its middle left out where it is too long."""
    if len(text) > most:
        half = most // 2
        text = f"{text[:half]} … {text[-half:]}"
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c in "\n\t" or unicodedata.category(c) not in _REFUSED else _spelt(c) for c in text)


def spoken(text: str) -> str:
    """A model's own words: controls are spelt out, what formats text (joiners, direction) is left alone."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in {"Cc", "Cs"} else _spelt(c) for c in text
    )


def _spelt(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")
