"""A browser for tests: headless Chromium, which notes all that a page asks for and complains about."""

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

CHROMIUM = shutil.which("chromium-headless-shell") or shutil.which("chromium")
SHARES = [0, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4]


@dataclass
class Seen:
    """A page, the addresses it asked for, and what stood in its console."""

    page: Any
    asked: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One for each file: while it is there, this thread can run no other loop of asyncio's."""
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium; on Debian: apt-get install chromium-headless-shell")
    with pytest.MonkeyPatch.context() as patch:
        # OpenBLAS, put in front of this process for the sake of MLX, starts threads in Chromium, which dies
        patch.delenv("LD_PRELOAD", raising=False)
        started = playwright.sync_playwright().start()
    try:
        with started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]) as made:
            yield made
    finally:
        started.stop()


@contextlib.contextmanager
def opened(browser: Any, address: str, width: int = 1000, height: int = 800) -> Iterator[Seen]:
    page = browser.new_page(viewport={"width": width, "height": height})
    seen = Seen(page)
    page.on("request", lambda request: seen.asked.append(request.url))
    page.on("console", lambda message: seen.complaints.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: seen.complaints.append(str(error)))
    page.on("dialog", lambda dialog: (seen.complaints.append(f"dialog {dialog.message}"), dialog.dismiss()))
    try:
        page.goto(address)
        yield seen
    finally:
        page.close()


def slide(page: Any, at: int) -> None:
    """Move the slider to a compaction, the number of all being now."""
    page.evaluate(
        "at => { const s = document.querySelector('#compaction'); s.value = at;"
        " s.dispatchEvent(new Event('input')) }",
        at,
    )


def shades(page: Any) -> list[str]:
    """The shade of each token: l0 … l8, or ahead."""
    return [name.split()[0] for name in classes(page)]


def classes(page: Any) -> list[str]:
    found: list[str] = page.evaluate("[...document.querySelectorAll('.text span')].map(s => s.className)")
    return found


def expected(history: Any, at: int | None, layer: int | None = None, head: int | None = None) -> list[str]:
    """The shades that numpy makes of a history."""
    heads = history.layers * history.kv_heads if layer is None else history.kv_heads if head is None else 1
    shares = history.held(at, layer, head) / heads
    levels = np.searchsorted(SHARES, shares, side="left") + (shares == 1)
    ahead = np.arange(len(levels)) >= history.moment(at).seen
    return ["ahead" if later else f"l{level}" for level, later in zip(levels, ahead, strict=True)]
