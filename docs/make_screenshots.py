"""The pictures of the pages, taken by headless Chromium: inspect.png, and page.png of a running server.

python docs/make_screenshots.py [--chromium PATH]

Needs Chromium (Debian: chromium-headless-shell) and playwright.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

import mlx_kvret
from mlx_kvret.demo import STORY
from mlx_kvret.serving.server import Serving
from mlx_kvret.serving.settings import Settings
from mlx_kvret.serving.starting import Room, start

FOLDER = Path(__file__).parent
MOST_BYTES = 150_000
TURNS = (
    "remember Stella salmon remember Anna amber remember Hugo green rumour has Frank black and this tower "
    "stands behind the river recall Stella",
    "rumour has Ivan pink that farmer walks past the market rumour has Mira navy some tall village sleeps "
    "beneath one broken bridge recall Hugo",
    "recall Anna",
)


def shot(page: Page, name: str) -> None:
    target = FOLDER / name
    page.screenshot(path=target)
    if (size := target.stat().st_size) > MOST_BYTES:
        raise SystemExit(f"{target} has {size:,} bytes, more than {MOST_BYTES:,}; take a smaller part")
    print(f"{target}: {size:,} bytes")


def inspected(page: Page, model: Any, tokenizer: Any, title: str) -> None:
    text = STORY.read_text(encoding="utf-8")
    found = mlx_kvret.inspect(model, tokenizer, text, prompt="recall Stella", title=title, budget=64)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "page.html"
        found.save(path)
        page.goto(path.as_uri())
        page.wait_for_selector("#view[data-ready]")
        shot(page, "inspect.png")


def talked(page: Page, model: Any, tokenizer: Any, title: str) -> None:
    service, _ = start(
        model, tokenizer, {"budget": 24}, Settings(title, port=0), Room(10**8, rows=2, chunk=16)
    )
    ready, addresses = threading.Event(), list[str]()
    serving = Serving(service, lambda address: (addresses.append(address), ready.set()))  # type: ignore[func-returns-value]
    thread = threading.Thread(target=serving.run_until_told)
    thread.start()
    ready.wait()
    try:
        page.goto(addresses[0])
        page.wait_for_selector("body[data-ready]")
        for turn, text in enumerate(TURNS, 1):
            page.fill("#text", text)
            page.click("#send")
            page.wait_for_selector(f"body[data-turns='{2 * turn}']", timeout=60_000)
        page.evaluate("document.activeElement.blur()")
        shot(page, "page.png")
    finally:
        serving.stop()
        thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chromium", default=shutil.which("chromium-headless-shell"))
    options = parser.parse_args()
    model, tokenizer = mlx_kvret.load("demo")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=options.chromium, args=["--no-sandbox"])
        for take, height in ((inspected, 640), (talked, 1000)):
            page = browser.new_page(viewport={"width": 900, "height": height})
            take(page, model, tokenizer, "demo")
            page.close()
        browser.close()


if __name__ == "__main__":
    main()
