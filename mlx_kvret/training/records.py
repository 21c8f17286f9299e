"""Training data as numbered records: text files, JSON lines, and data sets of the ``datasets`` package.

Every record is checked when a source is opened, so that a bad one is named before training starts.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from ..core.reading import parse_json
from ..errors import ConfigError, DataError, MissingDependencyError
from .pictures import check_files, placed

MOST_BYTES = 32 << 20


@dataclass(frozen=True)
class Record:
    """A text, or a chat as a list of messages, with the tools it may call. ``where`` names file and line.

    ``images`` fill the image parts of its messages in order; relative paths begin in ``folder``.
    """

    where: str
    text: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    images: tuple[Any, ...] = ()
    folder: Path | None = None


class Source(Protocol):
    """A file or a data set whose good records are numbered from 0; ``sees``: some of them have pictures."""

    name: str
    digest: str
    sees: bool

    def __len__(self) -> int: ...

    def read(self, index: int) -> Record: ...


# what to do with a bad record: raise the error, or note it
Complain = Callable[[DataError], None]


# fields of a record that say where it comes from, and nothing of what is in it
ABOUT = frozenset((
    "id", "uuid", "index", "idx", "key", "hash", "prompt_id", "conversation_id", "source", "origin",
    "dataset", "url", "license", "meta", "metadata", "title", "author", "date", "timestamp", "language",
    "lang", "split", "category", "num_turns", "turns", "token_count", "num_tokens", "model", "score",
    "quality",
))  # fmt: skip
# fields of a message that chat templates know
SAID = frozenset((
    "role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "reasoning", "thinking",
))  # fmt: skip


def check(data: object, where: str, folder: Path | None = None) -> Record:
    """A record from a JSON value; DataError says what is wrong with it.

    Every field is used, or says where a record comes from; what is neither is refused.
    """
    if not isinstance(data, dict):
        raise DataError(f"{where} holds a {type(data).__name__}; expected an object with text or messages")
    # columns that a row of a data set leaves out are None
    data = {name: value for name, value in data.items() if value is not None}
    text, messages = data.get("text"), data.get("messages")
    if (text is None) == (messages is None):
        found = (
            "both text and messages" if text is not None else f"only {', '.join(map(str, data)) or 'nothing'}"
        )
        raise DataError(f"{where} has {found}; expected either text or messages")
    known = {"text"} if text is not None else {"messages", "tools", "images"}
    if unknown := sorted(data.keys() - known - ABOUT):
        raise DataError(
            f"{where} has {', '.join(unknown)}, of which nothing would be learnt; remove it, or put what "
            "only describes the record under meta"
        )
    if text is not None:
        if not isinstance(text, str):
            raise DataError(f"{where}: text is a {type(text).__name__}; expected a string")
        if not text.strip():
            raise DataError(f"{where} is empty; remove the record")
        return Record(where, text=text)
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: messages is {messages!r:.40}; expected a list of messages")
    for number, message in enumerate(messages):
        _check_message(message, f"{where}: message {number}")
    messages, images = placed(messages, data.get("images"), where)
    check_files(images, folder or Path(), where)
    return Record(where, None, messages, _tools(data.get("tools"), where), images, folder)


def _check_message(message: object, where: str) -> None:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise DataError(f"{where} is {message!r:.40}; expected an object with a role")
    given = {name for name, value in message.items() if value is not None}
    if unknown := sorted(given - SAID - ABOUT):
        raise DataError(f"{where} has {', '.join(unknown)}, which no chat template knows; remove it")
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "image" and (kind != "text" or not isinstance(part.get("text"), str)):
            raise DataError(
                f"{where} has a part that is neither text nor image ({kind!r:.40}); gates learn from these"
            )
    if not isinstance(content, (str, list, type(None))):
        raise DataError(f"{where}: content is a {type(content).__name__}; expected a text")


def _tools(tools: object, where: str) -> list[dict[str, Any]] | None:
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"{where}: tools is {tools!r:.40}; expected a list of objects, one for each function")
    return tools


class TextFile:
    """One file, one record."""

    sees = False

    def __init__(self, path: Path, complain: Complain):
        self.name, self._path = str(path), path
        self._count, data = 1, b""
        try:
            if path.stat().st_size > MOST_BYTES:
                raise DataError(_huge(self.name, path.stat().st_size))
            data = path.read_bytes()
            check({"text": _decode(data, self.name)}, self.name)
        except DataError as error:
            complain(error)
            self._count = 0
        self.digest = hashlib.blake2b(data, digest_size=16).hexdigest()

    def __len__(self) -> int:
        return self._count

    def read(self, index: int) -> Record:
        return Record(self.name, text=_decode(self._path.read_bytes(), self.name))


class JsonLines:
    """One record per line, each an object with ``text`` or ``messages``. Blank lines separate nothing."""

    def __init__(self, path: Path, complain: Complain):
        self.name, self._path, self.sees = str(path), path, False
        self._places: list[tuple[int, int]] = []
        digest, offset = hashlib.blake2b(digest_size=16), 0
        with path.open("rb") as file:
            for number, (line, size) in enumerate(_lines(file), 1):
                digest.update(line)
                try:
                    if size > MOST_BYTES:
                        raise DataError(_huge(f"{self.name}:{number}", size))
                    if line.strip():
                        record = self._parse(line, number)
                        self.sees |= bool(record.images)
                        for size_of in _sizes(record):
                            digest.update(size_of)
                        self._places.append((offset, number))
                except DataError as error:
                    complain(error)
                offset += size
        self.digest = digest.hexdigest()

    def _parse(self, line: bytes, number: int) -> Record:
        where = f"{self.name}:{number}"
        try:
            return check(parse_json(_decode(line, where)), where, self._path.parent)
        except ValueError as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{where} is not valid JSON ({error}); mend or remove the line") from error

    def __len__(self) -> int:
        return len(self._places)

    def read(self, index: int) -> Record:
        offset, number = self._places[index]
        with self._path.open("rb") as file:
            file.seek(offset)
            return self._parse(file.readline(), number)


class DataSet:
    """A data set on the hub, in a folder of data files, or saved by ``datasets``; with text or messages."""

    def __init__(self, name: str, split: str, complain: Complain):
        self.name = f"{name}[{split}]"
        try:
            import datasets
        except ImportError as error:
            raise MissingDependencyError(
                f"reading the data set {name} needs datasets; run `pip install 'mlx-kvret[data]'`"
            ) from error
        try:
            if (Path(name) / "dataset_info.json").exists() or (Path(name) / "dataset_dict.json").exists():
                loaded = datasets.load_from_disk(name)
                self._rows = loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
            else:
                self._rows = datasets.load_dataset(name, split=split)
        except Exception as error:  # its loaders raise whatever they meet
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise DataError(
                f"cannot open the data set {name} with split {split!r}: {reason}; give a hub id, a folder, "
                "or another split"
            ) from error
        self.digest = str(self._rows._fingerprint)
        self._good: list[int] = []
        self.sees = False
        for index in range(len(self._rows)):
            try:
                self.sees |= bool(self._record(index).images)
                self._good.append(index)
            except DataError as error:
                complain(error)

    def _record(self, index: int) -> Record:
        return check(self._rows[index], f"{self.name}:{index}")

    def __len__(self) -> int:
        return len(self._good)

    def read(self, index: int) -> Record:
        return self._record(self._good[index])


class Records:
    """All records of some sources, one after the other.

    Bad records are left out if ``skip_bad`` says so; otherwise the first one raises.
    """

    def __init__(
        self,
        files: Sequence[str | Path] = (),
        datasets: Sequence[str] = (),
        split: str = "train",
        skip_bad: bool = False,
    ):
        self.skip_bad, self._skipped = skip_bad, dict[str, None]()
        if not files and not datasets:
            raise ConfigError("there is no training data; give a text file, a .jsonl file or a data set")
        self._sources: list[Source] = [_open(Path(file).expanduser(), self.complain) for file in files]
        self._sources += [DataSet(name, split, self.complain) for name in datasets]
        self._ends = list(accumulate(len(source) for source in self._sources))
        if not len(self):
            raise DataError(f"no usable record in {', '.join(s.name for s in self._sources)}; check the data")

    def complain(self, error: DataError) -> None:
        """Raise the error, or note it if bad records are to be skipped."""
        if not self.skip_bad:
            raise DataError(f"{error} (or skip bad records with --skip-bad)") from error
        self._skipped[str(error)] = None

    @property
    def skipped(self) -> list[str]:
        """What was wrong with each record that was left out."""
        return list(self._skipped)

    @property
    def identity(self) -> list[dict[str, Any]]:
        """Names without folders, sizes and digests: what a resumed run must find again."""
        return [
            {"name": Path(source.name).name, "records": len(source), "digest": source.digest}
            for source in self._sources
        ]

    @property
    def see(self) -> bool:
        """Whether some records have pictures."""
        return any(source.sees for source in self._sources)

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, index: int) -> Record:
        source = bisect_right(self._ends, index)
        return self._sources[source].read(index - (self._ends[source] - len(self._sources[source])))


def _open(path: Path, complain: Complain) -> Source:
    if not path.is_file():
        raise ConfigError(f"there is no file {path}; give text files (.txt, .md) or JSON lines (.jsonl)")
    try:
        if path.suffix in (".jsonl", ".ndjson"):
            return JsonLines(path, complain)
        if path.suffix in (".txt", ".md", ".text"):
            return TextFile(path, complain)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; check the file") from error
    raise ConfigError(f"{path} has the ending {path.suffix!r}; expected .txt, .md, .text, .jsonl or .ndjson")


def _lines(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """The lines of a file and their sizes; of a huge one only the beginning is kept in memory."""
    while line := file.readline(MOST_BYTES + 1):
        size, part = len(line), line
        while not part.endswith(b"\n") and (part := file.readline(MOST_BYTES)):
            size += len(part)
        yield line, size


def _sizes(record: Record) -> list[bytes]:
    """What tells a record's pictures from others under the same names."""
    if not record.images:
        return []
    return [str(check_files(record.images, record.folder or Path(), record.where)).encode()]


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8 (byte {error.start}); convert it") from error


def _huge(where: str, size: int) -> str:
    return f"{where} has {size:,} bytes; a record may have {MOST_BYTES:,}, so split it into several"
