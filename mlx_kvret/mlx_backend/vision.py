"""Vision-language models of mlx-vlm: which part speaks, what is known of its eyes, and what they leave on it.

mlx-vlm is never imported here: a model of it has been made by it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..core.pictures import Pictures
from ..core.vision import picture_tokens

PACKAGE = "mlx_vlm"
# where the language models with M-RoPE keep the positions of whatever they read last
_POSITIONS = ("_position_ids", "_rope_deltas")


@dataclass
class Sight:
    """The pictures a sequence has seen, and what is known of the prompt that brought the last of them."""

    pictures: Pictures = ()
    prompt: Any = None


def is_vision(model: nn.Module) -> bool:
    """Whether a model is mlx-vlm's, as a whole or its language model."""
    return type(model).__module__.partition(".")[0] == PACKAGE


def can_see(model: nn.Module) -> bool:
    """Whether a model is a whole one of mlx-vlm's, which takes pictures."""
    return is_vision(model) and isinstance(getattr(model, "language_model", None), nn.Module)


def speaking(model: nn.Module) -> nn.Module:
    """The part of a model that caches: the language model of mlx-vlm's, else the model itself."""
    part: nn.Module = model.language_model if can_see(model) else model
    return part


def family(model: nn.Module) -> str:
    """The folder of mlx-vlm that a model is written in: ``"qwen3_vl"``; nothing for others."""
    parts = type(model).__module__.split(".")
    return parts[2] if parts[0] == PACKAGE and len(parts) > 2 else ""


def config_of(model: nn.Module) -> dict[str, Any]:
    """A language model's config as a dictionary, without what is not said."""
    # mlx-lm's models have args; some of mlx-vlm's have a config only, or the whole model's beside
    found = getattr(model, "args", None) or getattr(model, "config", None)
    text = getattr(found, "text_config", None)
    found = found if text is None or isinstance(text, dict) else text
    return {name: value for name, value in vars(found).items() if value is not None} if found else {}


def tokens_of_pictures(model: nn.Module) -> frozenset[int]:
    """Token ids that stand for patches, of a whole model or of a language model that knows them."""
    return picture_tokens(getattr(model, "config", None))


def logits_of(out: Any) -> mx.array:
    """A forward pass's logits: mlx-vlm's models return them in an object."""
    found: mx.array = getattr(out, "logits", out)
    return found


@contextmanager
def forgetful(model: nn.Module) -> Iterator[None]:
    """A language model as one that has read nothing; afterwards it is as it was."""
    before = {name: getattr(model, name) for name in _POSITIONS if hasattr(model, name)}
    forget(model)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(model, name, value)


def forget(model: nn.Module) -> None:
    """Have a language model know no positions."""
    for name in _POSITIONS:
        if hasattr(model, name):
            setattr(model, name, None)
