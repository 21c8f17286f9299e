"""Out of memory while a prompt is read: which number of tokens at a time would fit."""

from __future__ import annotations

from collections.abc import Callable

from ..errors import OutOfMemoryError


def largest_chunk(tokens: int, fits: Callable[[int], bool]) -> int | None:
    """The largest of tokens/2, tokens/4, … that ``fits``, found by trying.

    None if not even one token does.
    """
    while tokens > 1:
        tokens //= 2
        if fits(tokens):
            return tokens
    return None


def does_not_fit(tokens: int, seen: int, reason: str, chunk: int | None, otherwise: str) -> OutOfMemoryError:
    """The error of a prompt that cannot be read ``tokens`` at a time after ``seen`` others.

    ``chunk`` tokens at a time can; if None can, ``otherwise`` says what to do.
    """
    advice = f"prefill_step_size={chunk} fits" if chunk else otherwise
    return OutOfMemoryError(
        f"out of memory after {seen:,} tokens ({reason}): reading {tokens:,} more at a time does not fit; "
        f"{advice}; the cache still holds what it held"
    )
