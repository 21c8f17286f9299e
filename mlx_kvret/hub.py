"""Where a model or a set of gates lies: a local folder, or a repository on the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from .errors import ConfigError, MissingDependencyError

_FILES = {
    "model": ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"],
    "gates": ["*.json", "*.safetensors", "*.pth"],
}
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)


def resolve(name: str | Path, what: Literal["model", "gates"] = "model") -> Path:
    """The local folder of a model or of gates, downloaded first if ``name`` is a hub id ``org/name``.

    The hub's own settings hold: ``HF_HUB_OFFLINE=1`` uses the local cache only, ``HF_HOME`` moves it.

    Raises:
        ConfigError: neither a folder nor a repository that can be had.
        MissingDependencyError: huggingface_hub is not installed.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ConfigError(f"{name} is a file; give the folder that holds the {what}")
    if not _HUB_ID.fullmatch(str(name)):
        raise ConfigError(
            f"there is no folder {name}, and it is no hub id (org/name) either; check the path of the {what}"
        )
    try:
        import huggingface_hub as hub
        from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
    except ImportError as error:
        raise MissingDependencyError(
            f"{name} is no local folder and fetching it needs huggingface_hub; "
            "run `pip install huggingface_hub`"
        ) from error
    try:
        return Path(hub.snapshot_download(str(name), allow_patterns=_FILES[what]))
    except GatedRepoError as error:
        why, cure = "its owner grants access on request", "ask for it there and run `hf auth login`"
        cause: Exception = error
    except RepositoryNotFoundError as error:
        why, cure = "the hub has no such public repository", "check the spelling, or run `hf auth login`"
        cause = error
    except (HfHubHTTPError, OSError, ValueError) as error:
        offline = hub.constants.HF_HUB_OFFLINE
        why = "offline mode is on and it is not in the cache" if offline else "it cannot be downloaded"
        cure = "unset HF_HUB_OFFLINE, or give a local folder" if offline else _advice(error)
        cause = error
    raise ConfigError(f"{name} is no local folder, and as a hub id: {why}; {cure}") from cause


def _advice(error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return f"check the network or give a local folder ({reason})"
