"""A model folder's ``config.json``, read before a loader of others believes it.

The loaders build what a config says: a layer for each of ``num_hidden_layers``, were it a billion.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .checkpoint import read_json
from .fingerprint import text_config
from .reading import parse_json

CONFIG_FILE = "config.json"
# more than any model has, of whatever is built one by one
_MOST = 65_536
_COUNTS = re.compile(r"(num|n)_.*(layer|head|expert|block)s?.*")
_LAYERS = ("num_hidden_layers", "n_layers", "n_layer", "num_layers")
# what safetensors allows
_LONGEST_HEADER = 100_000_000


def model_config(folder: Path) -> dict[str, Any]:
    """The config of a model folder, as fit to build a model from.

    Raises:
        CheckpointError: there is none, it is no JSON object, or its counts cannot be those of the weights.
    """
    path = folder / CONFIG_FILE
    if not path.exists():
        raise CheckpointError(f"{folder} holds no {CONFIG_FILE}; expected a model folder with safetensors")
    config = read_json(path)
    for part in (config, text_config(config)):
        for name, value in part.items():
            if _COUNTS.fullmatch(name) and _is_count(value) and value > _MOST:
                raise CheckpointError(
                    f"{path}: {name} is {value}, expected at most {_MOST}; copy or download the model again"
                )
    layers = [(name, text_config(config).get(name)) for name in _LAYERS]
    names = {name for file in sorted(folder.glob("*.safetensors")) for name in tensor_names(file)}
    if names:
        for name, count in layers:
            if isinstance(count, int) and _is_count(count) and count > len(names):
                raise CheckpointError(
                    f"{path}: {name} is {count}, and the folder's files hold {len(names)} tensors; copy or "
                    "download the model again"
                )
    return config


def tensor_names(file: Path) -> Iterator[str]:
    """The names of a safetensors file's tensors, from its header alone.

    Raises:
        CheckpointError: it is cut short, or no such file.
    """
    try:
        with file.open("rb") as content:
            size = int.from_bytes(content.read(8), "little")
            if size > _LONGEST_HEADER:
                raise ValueError(f"its header would have {size} bytes")
            header = parse_json(content.read(size))
            ends = [entry["data_offsets"][1] for entry in _entries(header).values()]
            whole = 8 + size + max(ends, default=0)
            if file.stat().st_size != whole:
                raise ValueError(f"it has {file.stat().st_size} bytes, its header tells of {whole}")
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise CheckpointError(
            f"{file} is not a whole safetensors file ({error}); copy or download the model again"
        ) from error
    yield from _entries(header)


def _entries(header: dict[str, Any]) -> dict[str, Any]:
    return {name: entry for name, entry in header.items() if name != "__metadata__"}


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
