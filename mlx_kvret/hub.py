"""Where a model or a set of gates lies: a local folder, or a repository on the Hugging Face hub."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

from .core.options import of_type
from .errors import ConfigError, MissingDependencyError

# a subset of what mlx-lm fetches, so that its downloads are complete for us when offline
_FILES = {
    "model": [
        "*.json", "model*.safetensors", "tokenizer.model", "tiktoken.model", "*.tiktoken", "*.txt", "*.jinja"
    ],
    "gates": ["*.json", "*.safetensors", "*.pth"],
    "adapter": ["*.json", "*.safetensors"],
}  # fmt: skip
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)


def resolve(
    name: str | Path,
    what: Literal["model", "gates", "adapter"] = "model",
    revision: str | None = None,
    code: bool = False,
) -> Path:
    """The local folder of a model or of gates, downloaded first if ``name`` is a hub id ``org/name``.

    Names known here come first: ``demo`` and ``smollm2``, models and gates (a folder of that name is
    ``./demo``). Then local folders, then the hub.

    The hub's own settings hold: ``HF_HUB_OFFLINE=1`` uses the local cache only, ``HF_HOME`` moves it.

    Args:
        revision: a branch, a tag or a commit of the repository.
        code: fetch the repository's Python files too.

    Raises:
        ConfigError: neither a folder nor a repository or revision that can be had.
        MissingDependencyError: huggingface_hub is not installed.
    """
    of_type(f"the {what}", name, (str, os.PathLike), "a folder or a hub id (org/name)")
    if (known := _known(str(name), what)) is not None:
        if revision is not None:
            raise ConfigError(f"revision {revision} is of a hub repository, {name} is known here; drop it")
        return known
    folder = os.path.expanduser(name)
    if revision is not None and os.path.exists(folder):
        raise ConfigError(
            f"revision {revision} is of a hub repository, and {name} is on this machine; drop it, or give a "
            "hub id that is no path here"
        )
    if os.path.isdir(folder):
        return Path(folder)
    if os.path.exists(folder):
        raise ConfigError(f"{name} is a file; give the folder that holds the {what}")
    if not _HUB_ID.fullmatch(str(name)):
        raise ConfigError(
            f"there is no folder {name}, and it is no hub id (org/name) either; check the path of the {what}"
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise MissingDependencyError(
            f"{name} is no local folder and fetching it needs huggingface_hub; "
            "run `pip install huggingface_hub`"
        ) from error
    try:
        patterns = _FILES[what] + (["*.py"] if code else [])
        return Path(snapshot_download(str(name), revision=revision, allow_patterns=patterns))
    except Exception as error:  # which errors of its HTTP library come through depends on the release
        wanted = f"{name} at revision {revision}" if revision else f"{name}"
        raise ConfigError(f"{wanted} is no local folder, and as a hub id: {_advice(error)}") from error


def _known(name: str, what: str) -> Path | None:
    """The folder of a model, or of shipped gates, that is known by name."""
    from .zoo import known, names

    return names.model_folder(name) if what == "model" else known.shipped(name) if what == "gates" else None


def _advice(error: Exception) -> str:
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, GatedRepoError):
        return "its owner grants access on request; ask for it there and run `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return "the hub has no such public repository; check the spelling, or run `hf auth login`"
    if isinstance(error, RevisionNotFoundError):
        return "the repository has no such revision; give a branch, a tag or a commit that it has"
    if constants.HF_HUB_OFFLINE:
        return "offline mode is on and it is not in the cache; unset HF_HUB_OFFLINE, or give a local folder"
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    return f"it cannot be downloaded ({reason}); check the network, or give a local folder"
