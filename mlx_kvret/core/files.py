"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import secrets
import shutil
import socket
import stat
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
    target = _followed(require_free(target))
    with _explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        sweep(target.parent)
        scratch = _scratch(target)
        scratch.mkdir()
    try:
        with _explained(target):
            yield scratch
            # takes the place of an empty folder in one step
            scratch.replace(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def whole_file(
    target: str | os.PathLike[str], private: bool = False, parents: bool = False
) -> Iterator[Path]:
    """A scratch file beside ``target`` (same suffix) that replaces it when the block ends without an error.

    A symbolic link stays one: what it points to is replaced. A file that is there keeps its mode; a new one
    can be read by all that the umask allows, a ``private`` one by its owner only. With ``parents`` folders
    that are missing are made.

    Raises:
        ConfigError: the target cannot be written, or is something other than a file.
    """
    target = Path(target).expanduser().absolute()
    with _explained(target):
        target = _followed(target)
        if parents:
            target.parent.mkdir(parents=True, exist_ok=True)
        mode = _mode(target)
        sweep(target.parent)
        scratch = _scratch(target)
        scratch.touch(0o600 if private or mode is not None else 0o666, exist_ok=False)
    try:
        with _explained(target):
            yield scratch
            if mode is not None:
                scratch.chmod(mode)
            scratch.replace(target)
    finally:
        scratch.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove what writers of this program left in a folder when they were killed.

    Nothing but our own scratch files and folders, whose names tell machine and process, and only where that
    process is gone.
    """
    with contextlib.suppress(OSError):
        for found in os.scandir(folder):
            name = _SCRATCH.fullmatch(found.name)
            if name is None or name["machine"] != _machine() or _runs(int(name["process"])):
                continue
            if found.is_dir(follow_symlinks=False):
                shutil.rmtree(found.path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    os.unlink(found.path)


_SCRATCH = re.compile(
    r"\..*\.kvret-(?P<machine>[0-9a-f]{12})-(?P<process>[1-9][0-9]{0,9})-[0-9a-f]{8}(\..*)?", re.DOTALL
)


def _scratch(target: Path) -> Path:
    # not from tempfile, whose files and folders are for their owner only
    own = f"kvret-{_machine()}-{os.getpid()}-{secrets.token_hex(4)}"
    return target.with_name(f".{_shortened(target.stem)}.{own}{_shortened(target.suffix)}")


def _shortened(name: str) -> str:
    # file systems count bytes
    return name.encode(errors="surrogateescape")[:64].decode(errors="ignore")


@functools.cache
def _machine() -> str:
    """This machine and, in a container, the container: processes are numbered anew in each."""
    try:
        numbers = os.readlink("/proc/self/ns/pid")
    except OSError:
        numbers = ""
    return hashlib.sha256(f"{socket.gethostname()} {numbers}".encode()).hexdigest()[:12]


def _runs(process: int) -> bool:
    if os.name != "posix":
        # there is no asking without sending a signal
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        # another user's
        return True
    return True


def _followed(target: Path) -> Path:
    """Where a symbolic link leads; any other path as it is."""
    return Path(os.path.realpath(target)) if os.path.islink(target) else target


def _mode(target: Path) -> int | None:
    """The permissions of a file, None where there is none; what is no file is refused."""
    try:
        found = target.stat()
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(found.st_mode):
        kind = "folder" if stat.S_ISDIR(found.st_mode) else "device or pipe"
        raise ConfigError(f"cannot write {target}: it is a {kind}; give the path of a file")
    return stat.S_IMODE(found.st_mode)


@contextlib.contextmanager
def _explained(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = ": ".join(str(part) for part in (error.strerror or error, error.filename) if part)
        raise ConfigError(
            f"cannot write {target}: {reason}; it is as it was before, mend the cause or choose another place"
        ) from error
