"""What gates see of a prompt in their base model, which runs in MLX."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..core.config import EvictionConfig
from ..demo.language import story
from ..errors import ConfigError
from ..mlx_backend import api, hooks
from ..mlx_backend.gates import RetentionGates

TOKENS = 1024


def prompt_inputs(
    model: str | os.PathLike[str], gates: RetentionGates, text: str | None = None
) -> dict[int, mx.array]:
    """Attention inputs (T, hidden) of each gate's layer, in the first 1,024 tokens of a text.

    Without a text it is a story of the demo, which is words to the demo model and English to others.

    Raises:
        CheckpointError: the folder holds no model.
        ConfigError: it has no tokenizer, or the text is empty.
        ModelMismatchError: the gates' shape is not the model's.
        UnsupportedModelError: mlx-lm cannot load it, or it cannot be hooked.
    """
    network, tokenizer = api.load(Path(model))
    if tokenizer is None:
        raise ConfigError(f"{model} has no tokenizer, so that no prompt can be read; add its tokenizer files")
    tokens = tokenizer.encode(story(TOKENS).text if text is None else text)[:TOKENS]
    if not tokens:
        raise ConfigError("the prompt is empty; give some text")
    return attention_inputs(network, gates, tokens)


def attention_inputs(model: Any, gates: RetentionGates, tokens: list[int]) -> dict[int, mx.array]:
    """As :func:`prompt_inputs`, for a hooked model and token ids (T,)."""
    attached = hooks.attachment(model)
    if attached is None:
        raise ConfigError("the model has no hooks; call mlx_kvret.attach first")
    seen: dict[int, mx.array] = {}
    cache = hooks.new_cache(model, attached, EvictionConfig(policy="full"))
    for index, entry in enumerate(cache):
        for one in getattr(entry, "caches", (entry,)):
            one.observe = partial(_note, seen, index)
    model(mx.array([tokens]), cache=cache)
    # nothing was computed yet, and only what the last layer's input needs ever is
    mx.eval(seen)
    layout = attached.layout
    places = [index for index, _ in layout.places]
    return {gate: seen[place] for gate, place in zip(layout.check_gates(gates), places, strict=True)}


def _note(seen: dict[int, mx.array], index: int, x: mx.array) -> None:
    seen[index] = x[0]
