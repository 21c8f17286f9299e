"""What a generated text answers, the letter of a choice or a number, by rules: what they miss is wrong."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:[eE][-+]?\d+)?(?:/\d+)?")
_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
_SAID = re.compile(r"\b(?:answer|choice|option)\b[^\w(]*(?:is|:)?[\s:*(]*(?:option\s+)?", re.IGNORECASE)


def letter(text: str, choices: Sequence[str] = (), letters: str = "ABCDE") -> str | None:
    """The letter of the chosen option, or None.

    What is boxed or follows "the answer is" counts, the last of them; else a letter with which the text
    begins; else the last letter in brackets or before a colon; else an option of ``choices`` that the text
    repeats, if just one.
    """
    mark = f"[{letters}{letters.lower()}]"
    alone = re.compile(rf"\s*[(\[*]*({mark})[)\]*]*\s*(?=[.:,;)\n]|$)")
    for boxed in reversed(_BOXED.findall(text)):
        if found := alone.match(boxed):
            return found[1].upper()
    for said in reversed(list(_SAID.finditer(text))):
        if found := re.match(rf"[(\[*]*([{letters}])\b", text[said.end() :]):
            return found[1]
    if found := alone.match(text):
        return found[1].upper()
    if loose := re.findall(rf"\(([{letters}])\)|(?<!\w)([{letters}])(?=[:.)])", text):
        return next(filter(None, loose[-1]))
    said_in = [i for i, choice in enumerate(choices) if choice.strip() and _repeats(text, choice)]
    return letters[said_in[0]] if len(said_in) == 1 and said_in[0] < len(letters) else None


def number(text: str) -> float | None:
    """What is boxed, else the first number after the last "answer", else the last of all."""
    for boxed in reversed(_BOXED.findall(text)):
        if found := _numbers(boxed):
            return found[-1]
    said = list(_SAID.finditer(text))
    if said and (found := _numbers(text[said[-1].end() :])):
        return found[0]
    found = _numbers(text)
    return found[-1] if found else None


def same_number(text: str, wanted: str, digits: int) -> bool:
    """Whether a text answers with a number, rounded to ``digits`` decimals."""
    said = number(text)
    return said is not None and math.isfinite(said) and f"{said:.{digits}f}" == f"{float(wanted):.{digits}f}"


def _numbers(text: str) -> list[float]:
    found = []
    for piece in _NUMBER.findall(text):
        top, slash, bottom = piece.replace(",", "").partition("/")
        if re.search(r"\d", top):
            value = float(top)
            found.append(value / float(bottom) if slash and float(bottom) else value)
    return found


def _repeats(text: str, choice: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(choice.strip())}(?!\w)", text, re.IGNORECASE) is not None
