"""Records with pictures in local files: parquet, TSV, JSON and JSON lines, as public benchmarks come in.

A picture is a path relative to the file, base64, or (in parquet) the bytes of an image file.
"""

from __future__ import annotations

import base64
import binascii
import csv
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..bitmap import Bitmap
from ..core.images import open_picture
from ..core.reading import parse_json
from ..errors import ConfigError, MissingDependencyError
from .readers import Row, json_lines, read_file

# characters; the smallest picture has more, and a path has a point before its ending
_SHORTEST = 64


def picture_rows(path: Path, *names: str) -> Iterator[Row]:
    """The records of a file, each with all of the named fields.

    Raises:
        ConfigError: says which record is broken or lacks what.
        MissingDependencyError: parquet without pyarrow.
    """
    kind = path.suffix.lower()
    if kind == ".jsonl":
        yield from json_lines(path, *names)
        return
    readers = {".json": _json, ".tsv": _tsv, ".parquet": _parquet}
    if kind not in readers:
        raise ConfigError(
            f"{path}: expected a file of kind {', '.join(readers)} or .jsonl; name it so, or convert it"
        )
    for number, fields in enumerate(readers[kind](path), 1):
        where = f"{path}, record {number}"
        missing = [name for name in names if not isinstance(fields, dict) or fields.get(name) is None]
        if missing:
            raise ConfigError(f"{where}: no {', '.join(missing)}; expected {', '.join(names)}")
        yield Row(fields, where)


def bitmap(row: Row, name: str, folder: Path, value: Any = None) -> Bitmap:
    """The picture in a field, or that ``value`` is one.

    Raises:
        ConfigError: no picture is there, or it cannot be decoded.
    """
    found = row.fields.get(name) if value is None else value
    if isinstance(found, dict):  # parquet's image feature
        found = found.get("bytes") or found.get("path")
    if isinstance(found, str) and (data := _of_base64(found)) is not None:
        found = data
    return Bitmap.of(np.asarray(open_picture(found, f"{row.where}: {name}", folder)))


def _of_base64(text: str) -> bytes | None:
    """The bytes of bare base64; None for what is too short or has other letters, as paths do."""
    try:
        return base64.b64decode(text, validate=True) if len(text) >= _SHORTEST else None
    except (binascii.Error, ValueError):
        return None


def _json(path: Path) -> Iterator[Any]:
    """A list of records, or an object of records by id."""
    try:
        data = parse_json(read_file(path))
    except ValueError as error:
        raise ConfigError(f"cannot read {path} as JSON: {error}") from error
    if not isinstance(data, (list, dict)):
        raise ConfigError(
            f"{path} holds a {type(data).__name__}; expected a list of records, or records by id"
        )
    yield from data if isinstance(data, list) else data.values()


def _tsv(path: Path) -> Iterator[Any]:
    try:
        text = read_file(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"cannot read {path} as text: {error}") from error
    csv.field_size_limit(sys.maxsize)
    yield from csv.DictReader(io.StringIO(text, newline=""), delimiter="\t")


def _parquet(path: Path) -> Iterator[Any]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise MissingDependencyError(f"{path.name} needs pyarrow; run `pip install pyarrow`") from error
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(16):
                yield from batch.to_pylist()
    except (OSError, ArrowException) as error:
        raise ConfigError(f"cannot read {path} as parquet: {error}") from error
