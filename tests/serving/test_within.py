"""Waiting with a limit, in the task itself."""

import asyncio
import threading

import pytest

from mlx_kvret.serving.within import within


def run(coroutine):
    """In a loop of its own, whatever loop this thread has."""
    found = []
    thread = threading.Thread(target=lambda: found.append(asyncio.run(coroutine)))
    thread.start()
    thread.join(10)
    return found[0]


def test_what_comes_in_time_is_given():
    async def main():
        queue = asyncio.Queue()
        asyncio.get_running_loop().call_later(0.01, queue.put_nowait, 5)
        return await within(5, queue.get()), asyncio.current_task().cancelled()

    assert run(main()) == (5, False)


def test_what_is_late_is_cancelled_and_nothing_is_lost():
    async def main():
        queue = asyncio.Queue()
        with pytest.raises(asyncio.TimeoutError):
            await within(0.01, queue.get())
        queue.put_nowait(7)
        return await within(1, queue.get())

    assert run(main()) == 7


def test_another_s_end_is_an_end():
    async def main():
        task = asyncio.ensure_future(within(5, asyncio.sleep(5)))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return True

    assert run(main())
