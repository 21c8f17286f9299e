"""Waiting no longer than so long, without a task of its own: for what comes with every token."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")


async def within(seconds: float, awaited: Awaitable[T]) -> T:
    """What is awaited, in this task.

    Raises:
        asyncio.TimeoutError: it took longer, and was cancelled.
    """
    task, late = asyncio.current_task(), False

    def end() -> None:
        nonlocal late
        late = True
        assert task is not None
        task.cancel()

    timer = asyncio.get_running_loop().call_later(seconds, end)
    try:
        return await awaited
    except asyncio.CancelledError:
        if late:
            raise asyncio.TimeoutError from None
        raise
    finally:
        timer.cancel()
