"""How a command ends: whatever goes wrong is one line on stderr and a status, never a traceback.

Status 1: something could not be done; 2: the command line is wrong; 75: another rank is gone; 130: ctrl-C.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import click

from ..core.launched import launched
from ..core.plain import plain
from ..core.watch import STATUS
from ..errors import KVRetError, RankLost

TRACEBACK = "MLX_KVRET_TRACEBACK"
_FULL = {errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF}


def one_line(text: object) -> str:
    """A message fit for a terminal, in one line."""
    return " ".join(plain(str(text)).split())


def tell(error: object) -> None:
    """An error as one line on stderr, if anyone listens there; of several processes it says whose."""
    found = launched()
    later = found is not None and found.rank > 0
    whose = f"rank {found.rank}: " if found is not None and later else ""
    with contextlib.suppress(OSError, ValueError):
        # who is not the first says nothing else
        click.echo(f"{whose}error: {one_line(error)}", file=sys.__stderr__ if later else sys.stderr)


class _Lost(click.ClickException):
    """Another rank is gone: the status is that of a process which has waited for it in vain."""

    exit_code = STATUS


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Turn every exception inside into one of click's, with a message that says what to do."""
    try:
        yield
        if sys.stdout is not None:
            sys.stdout.flush()
    except (click.exceptions.Exit, click.ClickException, click.Abort):
        raise
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic of the tokenizers library is no Exception
        if os.environ.get(TRACEBACK):
            traceback.print_exc()
        raise (_Lost if isinstance(error, RankLost) else click.ClickException)(_reason(error)) from error


def _reason(error: BaseException) -> str:
    said = str(error) or type(error).__name__
    if isinstance(error, KVRetError):
        return said
    if isinstance(error, OSError):
        if error.filename is None and error.errno in _FULL:
            # files are written elsewhere, with errors that name them
            _discard(sys.stdout)
            return f"cannot write to standard output: {error.strerror}"
        where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        return f"{where}{error.strerror or said}; check the path, and what it lies on"
    if isinstance(error, UnicodeError):
        return f"some text is not valid UTF-8 ({said}); convert it first"
    if isinstance(error, MemoryError):
        return f"out of memory ({said}); lower --budget or what is read at a time, or take a smaller model"
    if isinstance(error, RecursionError):
        return "a file or an option is nested too deep; check what was given"
    if isinstance(error, ImportError):
        return f"a package that is needed cannot be imported ({said}); install it again"
    return (
        f"unexpected {type(error).__name__}: {said} (a fault of mlx-kvret; {TRACEBACK}=1 shows where, "
        "please report it)"
    )


def _stdout_broken() -> str | None:
    """Why standard output takes no more; what it did not take is dropped, or Python would try again."""
    try:
        sys.stdout.flush()
        return None
    except (OSError, ValueError) as error:
        _discard(sys.stdout)
        return getattr(error, "strerror", None) or str(error)


def ended(run: Callable[[], Any]) -> NoReturn:
    """Run a command to its end, which is the process's."""
    try:
        _check_streams()
        found = run()
        # click hands the status of an early end back
        status = found if isinstance(found, int) else 0
    except click.UsageError as error:
        status = error.exit_code
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
        else:
            command = f"; see `{error.ctx.command_path} --help`" if error.ctx else ""
            tell(f"{error.format_message().rstrip('.')}{command}")
    except click.ClickException as error:
        status = error.exit_code
        tell(error.format_message())
    except (KeyboardInterrupt, click.Abort):
        status = 130
    why = _stdout_broken()
    if why and not status:
        tell(f"cannot write to standard output: {why}")
        status = 1
    sys.exit(status)


def _check_streams() -> None:
    """Have all three standard streams, or say which is missing."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # or the next file that is opened would take its number, and be written to
            os.open(os.devnull, os.O_RDWR)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (for the rest of the process)
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        raise click.ClickException("standard output is closed; send it to /dev/null if it is not wanted")
    for stream in (sys.stdout, sys.stderr):
        # a terminal that lacks a character shows its number
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _discard(stream: Any) -> None:
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
        stream.flush()


@contextlib.contextmanager
def leaving_at_once() -> Iterator[None]:
    """Ctrl-C ends the process where it stands, status 130: for imports and loading, which need no undoing.

    A KeyboardInterrupt inside an import may be swallowed, or come out as another error.
    """
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def stoppable() -> Iterator[Callable[[], bool]]:
    """Ctrl-C asks for a stop after the current token, so that the cache stays whole; yields the question."""
    asked = False

    def ask(*_: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)
