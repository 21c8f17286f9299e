"""The pictures that go with a prompt on the command line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Pictures:
    """The pictures that go with the prompt of a model."""

    def __init__(self, model: Any, tokenizer: Any, images: list[Any]) -> None:
        self.model, self.tokenizer, self.images = model, tokenizer, images

    def seeing(self, template: Any) -> Any:
        """The template as one that takes pictures, where there are some."""
        from ..api import backend_of
        from ..picture_template import SeeingTemplate

        if not self.images:
            return template
        return SeeingTemplate(template, self.model, self.tokenizer, backend_of(self.model))

    def asked(self, template: Any, text: str, plan: Callable[[str], list[int]]) -> Any:
        """The prompt that a text is planned as, with the pictures."""
        return template.prompt(plan(template.show(self.images, text))) if self.images else plan(text)
