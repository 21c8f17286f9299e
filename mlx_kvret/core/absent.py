"""Methods of a host's base class that a cache does not have.

Hosts ask with ``hasattr`` what a cache can do, so what is refused is absent instead of raising when used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Absent:
    """Hides the inherited method of its name; ``unless`` tells of which objects it is not hidden."""

    def __init__(self, unless: Callable[[Any], bool] | None = None) -> None:
        self._unless = unless

    def __set_name__(self, owner: type, name: str) -> None:
        self._owner, self._name = owner, name

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is not None and self._unless is not None and self._unless(instance):
            return getattr(super(self._owner, instance), self._name)
        raise AttributeError(f"{owner.__name__} has no {self._name}: it cannot be done with a bounded cache")
