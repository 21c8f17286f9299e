"""Pictures in a forward pass: which of its tokens they are, and which tokens see each other.

What a pass brings is noted when the model is called, for its decoder is given embeddings and no tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from mlx_kvret.core.pictures import TOKEN_TYPES
from mlx_kvret.core.types import Mask
from mlx_kvret.core.vision import check_vision, has_vision, picture_tokens, whole_pictures
from mlx_kvret.errors import ConfigError, UnsupportedFeatureError, UnsupportedModelError

from .cache import BoundedCache

# what brings pictures, or what a vision tower made of them
_BRING = ("pixel_values", "pixel_values_videos", "mm_encoder_outputs", "image_hidden_states")


@dataclass(frozen=True)
class Eyes:
    """What is known of a model that sees.

    ``tokens`` stand for patches of pictures; ``whole`` tells that attention looks both ways inside of one, so
    that it must be read in one pass; ``counter`` is the module that counts the positions of M-RoPE, if any.
    """

    tokens: frozenset[int]
    whole: bool
    counter: Any = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> Eyes | None:
        """None for a model of text.

        Raises:
            UnsupportedModelError: pictures would be read wrongly.
        """
        config: Any = model.config
        check_vision(config.model_type)
        if not has_vision(config.to_dict()):
            return None
        counters = [m for m in model.modules() if "rope_deltas" in vars(m)]
        if len(counters) > 1 or not all(hasattr(m, "get_rope_index") for m in counters):
            raise UnsupportedModelError(
                f"{config.model_type} models count the positions of pictures in a way that is unknown here; "
                "use another model"
            )
        counter = counters[0] if counters else None
        return cls(picture_tokens(config), whole_pictures(config.model_type), counter)

    @contextmanager
    def closed(self) -> Iterator[None]:
        """The model as one that has seen no picture."""
        before = None if self.counter is None else self.counter.rope_deltas
        try:
            if self.counter is not None:
                self.counter.rope_deltas = None
            yield
        finally:
            if self.counter is not None:
                self.counter.rope_deltas = before


@dataclass
class Arriving:
    """What a call of the model brings.

    ``types`` (R, T) are those of its tokens, ``mask`` (R, N) hides padding, ``marks`` (R, T) tells which
    tokens are a picture's; None where there is no such thing. ``given`` are all arguments by name.
    """

    types: torch.Tensor | None
    mask: torch.Tensor | None
    marks: Mask | None
    given: dict[str, Any]


def note(model: PreTrainedModel, eyes: Eyes, cache: BoundedCache, args: Any, kwargs: dict[str, Any]) -> None:
    """Have the cache know what the call of a model brings; arguments are completed in place.

    Raises:
        ConfigError: tokens of pictures without pictures.
        UnsupportedFeatureError: a picture that is cut in two, in a model that must see it whole.
    """
    given = dict(zip(inspect.signature(model.forward).parameters, args, strict=False)) | kwargs
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    whole = ids if ids is not None else embeds
    if whole is None:
        return
    tokens, name = whole.shape[1], next((n for n in TOKEN_TYPES if given.get(n) is not None), None)
    types = None if name is None else given[name][..., -tokens:]
    marks = _marks(eyes, ids, types, any(given.get(n) is not None for n in _BRING)) if tokens > 1 else None
    if eyes.whole:
        _block(model, cache, marks, tokens, name, kwargs)
    cache.sight.arriving = Arriving(types, given.get("attention_mask"), marks, given)


def both_ways(mask: Any) -> bool:
    """Whether a mask function of transformers is the causal one, and both ways inside of blocks beside."""
    if getattr(mask, "__qualname__", "") != "or_masks.<locals>.or_mask":
        return False
    held = inspect.getclosurevars(mask).nonlocals.get("mask_functions", ())
    names = [getattr(function, "__qualname__", "") for function in held]
    return names == ["causal_mask_function", "blockwise_overlay.<locals>.inner_mask"]


def _marks(eyes: Eyes, ids: torch.Tensor | None, types: torch.Tensor | None, brought: bool) -> Mask | None:
    """Which tokens (R, T) are a picture's; None if none is."""
    if types is not None:
        found = types > 0
    elif ids is not None:
        found = torch.isin(ids, torch.tensor(sorted(eyes.tokens), device=ids.device))
    else:
        return None
    marks: Mask = found.cpu().numpy()
    if not marks.any():
        return None
    if not brought and ids is not None:
        raise ConfigError(
            f"the call holds {int(marks.sum())} tokens of pictures and no pictures; give what the model's "
            "processor makes of text and pictures, all of it"
        )
    return marks


def _block(
    model: PreTrainedModel,
    cache: BoundedCache,
    marks: Mask | None,
    tokens: int,
    name: str | None,
    kwargs: dict[str, Any],
) -> None:
    """Give the types of tokens, by which the model builds its masks, for all tokens that were seen."""
    if marks is None:
        if name is not None:
            kwargs[name] = None
        return
    places, rows = cache.seen, len(marks)
    sequences = zip(cache.sight.pictures(rows), cache.sight.clocks(rows, places), marks[:, 0], strict=False)
    if any(first and own and own[-1].end == seen for own, seen, first in sequences):
        raise UnsupportedFeatureError(
            "a picture was cut in two between calls of the model, whose tokens see each other in both "
            "directions; read it in one call (a larger prefill_chunk_size, or mlx_kvret.generate, which cuts "
            "beside pictures), into a new cache"
        )
    known = inspect.signature(model.forward).parameters
    name = name or next(n for n in TOKEN_TYPES if n in known)
    given = kwargs.get(name)
    types = torch.from_numpy(marks).long() if given is None else given
    if types.shape[-1] < places + tokens:
        kwargs[name] = torch.nn.functional.pad(types, (places + tokens - types.shape[-1], 0)).to(model.device)
