"""Links from the pages to files outside of docs/ lead into the repository."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).parents[2]


def on_page_markdown(markdown: str, config: Any, **_: Any) -> str:
    """The text of a page before mkdocs reads it."""
    root = f"{config.repo_url.rstrip('/')}/blob/HEAD" if config.repo_url else CHECKOUT.as_uri()
    return re.sub(r"\]\(\.\./(?=\w)", f"]({root}/", markdown)
