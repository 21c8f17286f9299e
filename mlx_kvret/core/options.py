"""Options checked where they come in: names, whole numbers, numbers and switches, with errors that help."""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from ..errors import ConfigError

# seeds that every random generator in use takes as they are
MAX_SEED = 2**63 - 1


def check_known(
    given: Iterable[str], known: Collection[str], where: str, elsewhere: Mapping[str, str] | None = None
) -> None:
    """Refuse options that are not known, naming the nearest that is.

    Args:
        where: what the options are of, for the message: ``"make_cache"``.
        elsewhere: options known for another purpose, and why they do nothing here.
    """
    for name in given:
        if name in known:
            continue
        if elsewhere and name in elsewhere:
            raise ConfigError(f"{where} has no option {name} here: {elsewhere[name]}")
        raise ConfigError(f"{where} has no option {name!r}; {nearest(name, known, elsewhere or ())}")


def nearest(name: str, known: Collection[str], others: Iterable[str] = ()) -> str:
    """Advice on a misspelt name: the nearest known one or one of ``others``, or all that are known."""
    lower = {word.lower(): word for word in (*others, *known)}
    said = str(name).lower()
    close = difflib.get_close_matches(said, lower, n=1) or [
        word for word in lower if min(len(said), len(word)) > 3 and (said in word or word in said)
    ]
    if close:
        return f"did you mean {lower[close[0]]}?"
    return f"there are {', '.join(sorted(set(known)))}"


def whole(name: str, value: object, least: int, most: int | None = None) -> None:
    """Refuse what is no whole number, or one outside of ``[least, most]``; true and false are no numbers."""
    good = isinstance(value, int) and not isinstance(value, bool)
    if not good or value < least or (most is not None and value > most):  # type: ignore[operator]
        limit = "" if most is None else f" and at most {most}"
        raise ConfigError(f"{name} is {short(value)}; expected a whole number of at least {least}{limit}")


def number(name: str, value: object, wanted: str, low: float = -math.inf, high: float = math.inf) -> None:
    """Refuse what is no finite number in ``[low, high]``; ``wanted`` says in words what is expected."""
    # comparing also refuses NaN; a whole number may be too large for a float
    if not is_number(value) or not max(low, -sys.float_info.max) <= value <= min(high, sys.float_info.max):  # type: ignore[operator]
        raise ConfigError(f"{name} is {short(value)}; expected {wanted}")


def is_number(value: object) -> bool:
    """An int or a float, and neither true nor false."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def of_type(name: str, value: object, kinds: type | tuple[type, ...], wanted: str) -> None:
    """Refuse a value of another type."""
    if not isinstance(value, kinds):
        raise ConfigError(f"{name} is {short(value)}; expected {wanted}")


def all_callable(name: str, values: Any) -> None:
    """Refuse what is no list of functions; None is none of them."""
    if values is not None and not (
        isinstance(values, (list, tuple)) and all(callable(value) for value in values)
    ):
        raise ConfigError(f"{name} is {short(values)}; expected a list of functions")


def short(value: object) -> str:
    """A value for a message, however long it is."""
    if isinstance(value, int) and value.bit_length() > 200:
        # Python refuses to write out numbers of thousands of digits
        return f"a whole number of about {value.bit_length() * 3 // 10} digits"
    try:
        text = repr(value)
    except Exception:  # a list of such numbers, say
        return f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:60]}... ({type(value).__name__})"
