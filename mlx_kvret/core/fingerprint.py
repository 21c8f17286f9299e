"""Which base model a set of gates or a saved cache belongs to, as one readable line.

A fingerprint is made of the fields of a Hugging Face ``config.json`` that a fine-tune or a quantised copy
leaves alone, e.g. ``hidden_size=2560 num_hidden_layers=36 ... rope_theta=1e+06``. Two fingerprints are
compared field by field, so that a refusal can name what differs. Fields that one of them lacks are skipped:
what a missing ``head_dim`` means is known to the model's class only (Gemma 3: 256, not hidden / heads).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

from ..errors import ModelMismatchError
from .types import Floats

FIELDS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
)


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The language model's part of a config (vision-language models nest it)."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def fingerprint(config: dict[str, Any]) -> str:
    """One line of ``field=value`` pairs from a model's ``config.json``."""
    config = text_config(config)
    values = {name: config.get(name) for name in FIELDS} | {"rope_theta": _rope_theta(config)}
    return " ".join(f"{name}={value:g}" for name, value in values.items() if isinstance(value, (int, float)))


def differences(found: str, expected: str) -> list[str]:
    """Fields in which two fingerprints differ, each as ``"hidden_size is 64, expected 128"``."""
    theirs, ours = (dict(pair.partition("=")[::2] for pair in line.split()) for line in (found, expected))
    return [
        f"{name} is {theirs[name]}, expected {ours[name]}"
        for name in theirs
        if name in ours and theirs[name] != ours[name]
    ]


def identity(owner: dict[str, str], weights: Iterable[tuple[str, Floats]]) -> str:
    """Which model a cache in memory belongs to, its gates and a few values of every one of its weights.

    Caches in files know the ``owner`` only, for they move between copies in other types.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, values in sorted((name, values.tobytes()) for name, values in weights):
        digest.update(name.encode() + b"\0" + values)
    return f"{sorted(owner.items())} {digest.hexdigest()}"


def check_identity(model: str, cache: str) -> None:
    """Refuse a cache of another model.

    Raises:
        ModelMismatchError: the two identities differ.
    """
    if model != cache:
        raise ModelMismatchError(
            "the cache belongs to another model, or to this one with other gates or weights; make one for "
            "this model with mlx_kvret.make_cache"
        )


def _rope_theta(config: dict[str, Any]) -> Any:
    # transformers 5 nests it, some models once more per kind of layer
    rope = config.get("rope_parameters") or {}
    if isinstance(rope, dict):
        rope = rope.get("full_attention", rope)
        if isinstance(rope, dict) and "rope_theta" in rope:
            return rope["rope_theta"]
    return config.get("rope_theta")
