"""Files that nobody vouches for: their bytes, and the JSON in them.

JSON is read strictly, for what Python's reader lets pass is refused or blows up later, far from the file:
two values under one name, NaN and infinity, numbers of hundreds of digits, halves of a character, and nesting
beyond any use.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

DEEPEST = 64
LARGEST = 2**63 - 1
SURROGATE = re.compile("[\ud800-\udfff]")


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """The content of a regular file.

    Raises:
        CheckpointError: it is missing, cannot be read, or is a device or a pipe, which may never end.
    """
    path = Path(path)
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise CheckpointError(f"cannot read {path}: it is no regular file")
            return file.read()
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist; check the path, or copy the files again") from error
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


def _without_waiting(path: str, flags: int) -> int:
    # a pipe without a writer would be waited for
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def parse_json(text: str | bytes, infinity: bool = False) -> Any:
    """A JSON value.

    Args:
        text: UTF-8 if bytes.
        infinity: NaN and infinity may stand in it, as they do in published models' ``config.json``.

    Raises:
        ValueError: it is no JSON, or holds what is refused; says what and, where known, where.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8-sig")
    strict: dict[str, Any] = {"parse_float": _finite, "parse_constant": _no_constant}
    try:
        value = json.loads(
            text, parse_int=_whole, object_pairs_hook=_without_twins, **({} if infinity else strict)
        )
    except RecursionError as error:
        raise ValueError(f"it is nested more than {DEEPEST} levels deep") from error
    if text.count("[") + text.count("{") > DEEPEST or "\\u" in text:
        _check(value)
    return value


def read_json_value(path: str | os.PathLike[str], infinity: bool = False) -> Any:
    """The JSON value in a file.

    Raises:
        CheckpointError: it cannot be read, or is no such JSON.
    """
    content = read_bytes(path)
    try:
        return parse_json(content, infinity)
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); copy or make it again") from error


def exactly(found: object, expected: object) -> bool:
    """Whether two JSON values are the same, 1, 1.0 and true being different things."""
    return json.dumps(found, sort_keys=True, default=repr) == json.dumps(expected, sort_keys=True)


def _whole(digits: str) -> int:
    if len(digits) > 20 or abs(int(digits)) > LARGEST:
        raise ValueError(f"the number {digits[:20]} of {len(digits)} digits is beyond the range of 64 bits")
    return int(digits)


def _finite(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{digits[:20]} is beyond the range of numbers")
    return value


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twin = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the name {twin!r} stands more than once in one object")
    return found


def _check(value: Any) -> None:
    """Depth and lone surrogates, level by level: recursion is what is to be guarded against."""
    level = [value]
    for _ in range(DEEPEST):
        for text in level:
            if isinstance(text, str) and SURROGATE.search(text):
                raise ValueError(f"the text {text[:40]!r} holds half a character (a lone surrogate)")
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return
    raise ValueError(f"it is nested more than {DEEPEST} levels deep")


def _inside(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value
        yield from value.values()
    elif isinstance(value, list):
        yield from value
