"""Which releases of torch and transformers the torch backend works with, told without importing them."""

from __future__ import annotations

from importlib import metadata

from packaging.version import Version

from mlx_kvret.errors import MissingDependencyError

NEEDED = {"torch": "2.6", "transformers": "5.17"}


def check_versions() -> None:
    """Refuse a torch or transformers that is too old.

    Raises:
        MissingDependencyError: names what was found and the command that mends it.
    """
    for name, least in NEEDED.items():
        found = metadata.version(name)
        if Version(found) < Version(least):
            raise MissingDependencyError(
                f"{name} is {found}, expected at least {least}; run `pip install -U '{name}>={least}'`"
            )
