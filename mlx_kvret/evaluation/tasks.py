"""All tasks by name.

``facts`` and the like    the demo model's own words, see :mod:`.demo_tasks`
``albums`` and the like   pictures and words of the demo with eyes, see :mod:`.album_tasks`
``needle-single`` ...     generated text for any model with a tokenizer, see :mod:`.text_tasks`
``text``                  text files (``data``), pieces of each length drawn from them in turn
``perplexity:FILE``       the first pieces of one text file
``longbench:FILE`` ...    files of public benchmarks, see :mod:`.readers`
``mmstar:FILE`` ...       the same with pictures, see :mod:`.picture_readers`
"""

from __future__ import annotations

import hashlib
import itertools
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..core.picture_prompts import tokenizer_of
from ..errors import ConfigError
from . import album_tasks, demo_tasks, picture_readers, readers, text_tasks
from .picture_writer import PictureWriter
from .samples import Sample
from .writer import Writer

TEXT = "text"
NAMES = (*demo_tasks.TASKS, *album_tasks.TASKS, *text_tasks.TASKS, TEXT)
FILES = ("perplexity", *readers.READERS, *picture_readers.READERS)


def check_task(name: str, data: Sequence[Path] = ()) -> None:
    """Refuse a name that no task has, and files that are not there, before anything is run.

    Raises:
        ConfigError: no such task or file.
    """
    if name == TEXT:
        if not data:
            raise ConfigError("task text reads text files; give some with --data FILE (in Python: data)")
        if missing := [str(path) for path in data if not path.expanduser().is_file()]:
            raise ConfigError(f"task text: {', '.join(missing)} is not a file")
        return
    kind, colon, path = name.partition(":")
    if kind in NAMES and not colon:
        return
    if kind not in FILES or not path:
        raise ConfigError(
            f"task {name!r} is not known; expected one of {', '.join(NAMES)}, or "
            f"{', '.join(f'{kind}:FILE' for kind in FILES)}"
        )
    if not Path(path).expanduser().is_file():
        raise ConfigError(f"task {name!r}: {path} is not a file")


def has_length(name: str) -> bool:
    """Whether samples come in a length of one's choice; those of benchmark files do not."""
    return name.partition(":")[0] not in (*readers.READERS, *picture_readers.READERS)


def metric(name: str) -> str:
    """``"accuracy"`` (higher is better) or ``"nll"`` (nats per token, lower is better)."""
    likelihoods = (TEXT, "perplexity", *picture_readers.LIKELIHOODS)
    return "nll" if name.partition(":")[0] in likelihoods else "accuracy"


def make_samples(
    name: str,
    length: int,
    count: int,
    seed: int,
    tokenizer: Any = None,
    chat: bool = False,
    data: Sequence[Path] = (),
) -> list[Sample]:
    """``count`` samples (or as many as a file has); the same arguments give the same samples.

    Raises:
        ConfigError: unknown task, a length that is too short, a file that cannot be read.
    """
    check_task(name, data)
    kind, _, path = name.partition(":")
    if kind in demo_tasks.TASKS or kind in album_tasks.TASKS:
        make = demo_tasks.make if kind in demo_tasks.TASKS else album_tasks.make
        return [make(kind, length, rng) for rng in _generators(name, length, count, seed)]
    if kind in picture_readers.READERS:
        return _some(
            path, picture_readers.READERS[kind](Path(path).expanduser(), PictureWriter(tokenizer)), count
        )
    writer = Writer(tokenizer_of(tokenizer), chat)
    if kind in text_tasks.TASKS:
        rngs = _generators(name, length, count, seed)
        return [text_tasks.TASKS[kind](length, rng, writer) for rng in rngs]
    if kind == TEXT:
        rng = np.random.default_rng([seed, length])
        files = [path.expanduser() for path in data]
        return list(itertools.islice(readers.texts(files, writer, length, rng), count))
    file = Path(path).expanduser()
    found = (
        readers.text(file, writer, length) if kind == "perplexity" else readers.READERS[kind](file, writer)
    )
    return _some(path, found, count)


def _some(path: str, found: Iterator[Sample], count: int) -> list[Sample]:
    samples = list(itertools.islice(found, count))
    if not samples:
        raise ConfigError(f"{path} has no records")
    return samples


def digests(data: Sequence[Path]) -> dict[str, str]:
    """What text files hold, by path, for settings that must not change."""
    return {str(p): hashlib.sha256(p.expanduser().read_bytes()).hexdigest()[:16] for p in data}


def _generators(name: str, length: int, count: int, seed: int) -> list[np.random.Generator]:
    # the n-th sample does not depend on how many there are
    return [np.random.default_rng([seed, zlib.crc32(name.encode()), length, i]) for i in range(count)]
