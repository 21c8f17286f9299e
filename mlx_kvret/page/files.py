"""The page's files, and one page with all of them in it."""

from __future__ import annotations

import base64
import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


@cache
def read(name: str) -> str:
    """A file of this folder."""
    return (FOLDER / name).read_text(encoding="utf-8")


def page_of(data: dict[str, Any]) -> str:
    """A page that shows :func:`mlx_kvret.core.history.described` and needs nothing beside itself.

    Whatever a text holds is data in it: no character of one can end the block it stands in, and nothing runs
    or is fetched but the scripts and styles whose hashes the page's own policy names.
    """
    style, scripts = read("style.css"), [read("view.js"), read("inspect.js")]
    hashes = " ".join(_hash(script) for script in scripts)
    policy = f"default-src 'none'; script-src {hashes}; style-src {_hash(style)}; base-uri 'none'"
    parts = {
        "policy": f"{policy}; form-action 'none'; img-src data:",
        "style": style,
        "data": _harmless(data),
        "view": scripts[0],
        "inspect": scripts[1],
    }
    # not one replacement after another: a text may hold what looks like the next mark
    pieces = read("inspect.html").split("@@")
    return "".join(parts[piece] if at % 2 else piece for at, piece in enumerate(pieces))


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _harmless(data: dict[str, Any]) -> str:
    """JSON that no reader of HTML takes for a mark."""
    text = json.dumps(data, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
