"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..errors import ConfigError


def require_free(target: str | os.PathLike[str]) -> Path:
    """The absolute path of a folder to be written; ConfigError if something is there already."""
    target = Path(target).expanduser().absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
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
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        with _explained(target):
            yield scratch
            scratch.chmod(0o755)
            if target.exists():
                target.rmdir()
            scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def whole_file(target: str | os.PathLike[str]) -> Iterator[Path]:
    """A scratch file beside ``target`` (same suffix) that replaces it when the block ends well."""
    target = Path(target).expanduser().absolute()
    with _explained(target):
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=target.suffix, dir=target.parent)
        os.close(handle)
    scratch = Path(name)
    try:
        with _explained(target):
            yield scratch
            scratch.replace(target)
    finally:
        scratch.unlink(missing_ok=True)


@contextlib.contextmanager
def _explained(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"cannot write {target}: {reason}; nothing was left behind") from error
