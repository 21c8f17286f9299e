"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from ..errors import ConfigError


def require_free(target: str | os.PathLike[str]) -> Path:
    """The absolute path of a folder to be written.

    Raises:
        ConfigError: something other than an empty folder is there already, or the path cannot be looked at.
    """
    target = Path(target).expanduser().absolute()
    with _explained(target):
        taken = os.path.lexists(target) and (not target.is_dir() or any(target.iterdir()))
    if taken:
        raise ConfigError(f"{target} exists already; choose another destination or remove it first")
    return target


@contextlib.contextmanager
def whole_folder(target: str | os.PathLike[str]) -> Iterator[Path]:
    """A scratch folder beside ``target`` that takes its place when the block ends without an error.

    Raises:
        ConfigError: the target exists and is not an empty folder, or cannot be written.
    """
    target = require_free(target)
    with _explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = _scratch(target)
        scratch.mkdir()
    try:
        with _explained(target):
            yield scratch
            if target.exists():
                target.rmdir()
            scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def whole_file(target: str | os.PathLike[str]) -> Iterator[Path]:
    """A scratch file beside ``target`` (same suffix) that replaces it when the block ends without an error.

    Raises:
        ConfigError: the target cannot be written.
    """
    target = Path(target).expanduser().absolute()
    scratch = _scratch(target)
    with _explained(target):
        scratch.touch(exist_ok=False)
    try:
        with _explained(target):
            yield scratch
            scratch.replace(target)
    finally:
        scratch.unlink(missing_ok=True)


def _scratch(target: Path) -> Path:
    # not from tempfile, whose files and folders are for their owner only
    return target.with_name(f".{target.stem[:64]}.{secrets.token_hex(8)}{target.suffix[:64]}")


@contextlib.contextmanager
def _explained(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = ": ".join(str(part) for part in (error.strerror or error, error.filename) if part)
        raise ConfigError(
            f"cannot write {target}: {reason}; it is as it was before, mend the cause or choose another place"
        ) from error
