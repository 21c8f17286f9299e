"""Whether a model is a certain base model, or a copy of it in another float type or in fewer bits.

Fine-tunes have the shape of their base, so a shape proves nothing. Two things do. The weights of the norms,
which are never quantised, are those of the base to the last bit of bfloat16 (known for bases of shipped
gates). Or the name under which the model was asked for is the base's own, or that of a copy (``…-4bit``) by
those who make copies. The ``_name_or_path`` in a ``config.json`` is no proof: a fine-tune is saved with its
base's.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..core.fingerprint import differences, fingerprint
from ..core.tensors import Tensor
from ..core.types import Array
from .known import Base
from .names import BASES, SHIPPED

# who publishes copies of others' models, unchanged but for their float type or bits
_COPIERS = ("mlx-community", "lmstudio-community", "unsloth")
# AWQ and the like are left out: they move scales into the norms, and what gates see is no longer the base's
_COPY = re.compile(
    r"[-_.](mlx|[2-8]-?bits?|int[48]|q[2-8]|b?fp?16|bfloat16|float16|fp?32|float32|mxfp[48]|nvfp4|dwq)$", re.I
)
_OTHER_TOWERS = ("vision", "visual", "audio")
_TYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_LARGEST_HEADER = 1 << 26


@dataclass
class Subject:
    """A model whose base is in question.

    Args:
        config: its ``config.json``.
        names: what it was asked for by, and the folder it lies in.
        norms: gives its norms' weights by name; an empty mapping where they cannot be had.
        changed: it was changed after loading, by an adapter.
    """

    config: dict[str, Any]
    names: Sequence[str] = ()
    norms: Callable[[], Mapping[str, Array]] = dict
    changed: bool = False

    @cached_property
    def shape(self) -> str:
        return fingerprint(self.config)

    @cached_property
    def digest(self) -> str | None:
        return norms_digest(self.norms())

    def may_be(self, base: Base) -> bool:
        """Whether the shape is the base's. The demos, which anyone may make again, are known by name only."""
        if base.name in SHIPPED:
            return base.name in self.names
        told = {pair.partition("=")[0] for pair in self.shape.split()}
        return {"hidden_size", "num_hidden_layers"} <= told and not differences(self.shape, base.shape)

    def judge(self, base: Base) -> tuple[bool, str]:
        """Whether a model of the base's shape surely is the base or a copy of it, and what tells."""
        if self.changed:
            return False, "it was changed by an adapter"
        same = None if base.norms is None or self.digest is None else self.digest == base.norms
        if same:
            return True, "by its weights"
        if any(is_copy(name, base.name) for name in self.names):
            return (
                True,
                "by its name" if same is None else "by its name, though its weights are another version's",
            )
        if same is None:
            return False, "its name does not tell" if self.names else "nothing tells its name"
        return False, "its weights are others: a fine-tune, or another version"


def of_folder(folder: Path, config: dict[str, Any], *names: str) -> Subject:
    """The subject of a model folder, by its files alone."""
    return Subject(config, (*names, str(folder)), lambda: folder_norms(folder))


def is_copy(name: str, base: str) -> bool:
    """Whether a name means a base model (a hub id, or a name known here) or a copy of it.

    ``name`` may be a hub id, a name known here, or a path: into the hub's cache, or ending in a hub id.
    """
    if name in BASES:
        return BASES[name] == base
    parts = Path(os.path.expanduser(name)).parts
    cached = [part.split("--", 2)[1:] for part in parts if part.startswith("models--")]
    pair = cached[-1] if cached and len(cached[-1]) == 2 else list(parts[-2:])
    if len(pair) != 2 or "/" not in base:
        return False
    owner, _, own = base.partition("/")
    if pair[0].lower() not in (owner.lower(), *_COPIERS):
        return False
    bare = pair[1]
    while stripped := _COPY.search(bare):
        if bare.lower() == own.lower():
            break
        bare = bare[: stripped.start()]
    return bare.lower() == own.lower()


def is_norm(name: str) -> bool:
    """Whether a weight of this name is a norm's of the language model."""
    return name.endswith(".weight") and "norm" in name and not any(tower in name for tower in _OTHER_TOWERS)


def norms_digest(norms: Mapping[str, Array]) -> str | None:
    """A name for the exact values of a model's norms in bfloat16, 16 hexadecimal digits; None for no norms.

    Args:
        norms: (n,) float arrays by name; what stands before ``layers.`` in a name does not count.
    """
    if not norms:
        return None
    digest = hashlib.sha256()
    for name, values in sorted((_short(name), values) for name, values in norms.items()):
        digest.update(f"{name} {values.shape};".encode())
        digest.update(Tensor.of(values, "BF16").bits.tobytes())
    return digest.hexdigest()[:16]


def folder_norms(folder: Path) -> dict[str, Array]:
    """The norms' weights in a model folder's safetensors files, float32; none where they cannot be read."""
    found: dict[str, Array] = {}
    try:
        for path in sorted(folder.glob("*.safetensors")):
            found |= _file_norms(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    return found


def _file_norms(path: Path) -> dict[str, Array]:
    found: dict[str, Array] = {}
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > _LARGEST_HEADER:
            raise ValueError("no safetensors file")
        header = json.loads(file.read(size))
        for name, entry in header.items():
            if not is_norm(name) or len(entry["shape"]) != 1 or entry["dtype"] not in _TYPES:
                continue
            begin, end = entry["data_offsets"]
            file.seek(8 + size + begin)
            bits = np.frombuffer(file.read(end - begin), _TYPES[entry["dtype"]])
            found[name] = Tensor(entry["dtype"], bits).float32()
    return found


def _short(name: str) -> str:
    before, layers, after = name.partition("layers.")
    return f"{layers}{after}" if layers else ".".join(before.split(".")[-2:])
