"""A pass of a language model that sees: the cache owns the positions, and notes which tokens are pictures.

mlx-vlm keeps the position of what comes next on the model. There it is lost when a cache is saved, disturbed
by every other conversation, and wrong for a second picture. Here the cache tells every pass its positions.
What mlx-vlm works out for a whole prompt (positions, masks and features of its pictures) comes with each of
its chunks, and is cut to the chunk by where the prompt began, not by where the conversation did.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..core.pictures import TOKEN_TYPES, Picture, Pictures, joined, next_position, runs
from ..core.state import State
from ..core.types import Ints
from ..errors import ConfigError, UnsupportedFeatureError
from .both_ways import both_ways
from .bounded import Bounded
from .entry import BoundedKVCache
from .forward import leaves, run

# what mlx-vlm gives for all tokens of a prompt at once, (1, P, ...), with each of its chunks
_BY_TOKEN = ("visual_pos_masks", "per_layer_inputs", *TOKEN_TYPES)


@dataclass(frozen=True)
class Prompt:
    """A prompt under way: an array that all its passes are given, its length, where and at which position it
    begins.
    """

    key: Any
    length: int
    start: int
    base: int


@dataclass
class Coming:
    """A pass of ``tokens`` tokens into a cache that has seen ``seen``, with ``pictures`` among them.

    ``at`` is where the pass begins in its ``prompt``.
    """

    ids: list[int] | None
    tokens: int
    seen: int
    pictures: Pictures
    prompt: Prompt

    @property
    def at(self) -> int:
        return self.seen - self.prompt.start


def run_seeing(
    model: nn.Module,
    eyes: frozenset[int],
    call: Callable[..., Any],
    cache: list[Any],
    inputs: mx.array,
    kwargs: dict[str, Any],
) -> Any:
    """A pass of mlx-vlm's language model ``call(model, inputs, **kwargs)`` into a bounded ``cache``.

    ``eyes`` are the token ids of pictures, which count as such where embeddings are given.

    Raises:
        UnsupportedFeatureError: several sequences at once, and pictures among them.
        ConfigError: positions that are not those of the cache.
        OutOfMemoryError, CacheError: as :func:`.forward.run`.
    """
    shared = next((part.shared for part in leaves(cache) if isinstance(part, BoundedKVCache)), None)
    if shared is not None and shared.batch:
        return _run_rows(model, call, cache, shared, inputs, kwargs)
    if inputs.shape[0] != 1:
        raise UnsupportedFeatureError(
            f"a batch of {inputs.shape[0]} sequences does not work with a cache of one; generate with "
            "mlx_kvret.generate_batch, or make a cache for each"
        )
    whole: Any = cache if shared is None else shared
    whole.passes.check()
    seen, owner = (whole.seen, whole.sight) if shared is None else (shared.seen, shared.row)
    known: Pictures = whole.pictures if shared is None else owner.pictures
    tokens, embeds = inputs.shape[1], kwargs.get("inputs_embeds")
    # a single id is the model's own, and may still be in the making
    ids = None if embeds is None else [int(one) for one in np.array(inputs[0])]
    coming = Coming(ids, tokens, seen, known, _prompt(owner.prompt, seen, known, *_key(model, ids, kwargs)))
    given, pictures = dict(kwargs), known
    _cut(coming, given)
    found = [] if ids is None else runs(ids, eyes)
    if hasattr(model, "get_rope_index"):
        given, pictures = _with_positions(model, coming, given, found)
    elif found:
        pictures = joined(known, [(seen + a, seen + b) for a, b in found])
    before = State([(owner, {"pictures": owner.pictures, "prompt": owner.prompt})])
    after = State([(owner, {"pictures": pictures, "prompt": coming.prompt})])

    def forward(count: int) -> Any:
        if count == tokens:
            with both_ways(model, shared):
                return call(model, inputs, **given)
        cut = {name: given[name][..., :count] for name in ("position_ids",) if name in given}
        return call(model, inputs[:, :count], **given | cut)

    return run(cache, tokens, forward, sliced=embeds is None, noted=(before, after))


def _run_rows(
    model: nn.Module,
    call: Callable[..., Any],
    cache: list[Any],
    shared: Bounded,
    inputs: mx.array,
    kwargs: dict[str, Any],
) -> Any:
    """A pass of text for the rows of a batch, each at a position of its own."""
    if any(kwargs.get(name) is not None for name in ("inputs_embeds", "position_ids")):
        raise UnsupportedFeatureError(
            "a batch of a bounded vision-language model reads text, at positions that its caches count; have "
            "each cache read its pictures alone, as mlx_kvret.generate_batch does"
        )
    rows, tokens, given = list(shared.rows), inputs.shape[1], dict(kwargs)
    if hasattr(model, "get_rope_index"):
        first = mx.array([next_position(row.pictures, row.seen) for row in rows], mx.int32)
        places = first[:, None] + mx.arange(tokens, dtype=mx.int32)
        given["position_ids"] = mx.broadcast_to(places, (3, *places.shape))

    def forward(count: int) -> Any:
        cut = {name: given[name][..., :count] for name in ("position_ids",) if name in given}
        return call(model, inputs[:, :count], **given | cut)

    noted = (
        State([(row, {"prompt": row.prompt}) for row in rows]),
        State([(row, {"prompt": None}) for row in rows]),
    )
    return run(cache, tokens, forward, sliced=True, noted=noted)


def _key(model: nn.Module, ids: list[int] | None, kwargs: dict[str, Any]) -> tuple[Any, int]:
    """What all passes of a prompt are given, the very same array, and for how many tokens it is; or None."""
    # glm4v leaves the positions of a prompt on the model
    told = kwargs.get("position_ids")
    told = getattr(model, "_position_ids", None) if told is None else told
    if ids is None:
        return None, 0
    if told is not None:
        return told, told.shape[-1]
    key = next((kwargs[name] for name in _BY_TOKEN if kwargs.get(name) is not None), None)
    return key, 0 if key is None else key.shape[1]


def _prompt(under_way: Prompt | None, seen: int, known: Pictures, key: Any, length: int) -> Prompt:
    """The prompt that a pass belongs to: that of the pass before, or one that begins here."""
    if under_way is not None and under_way.key is key and seen - under_way.start < length:
        return under_way
    return Prompt(key, length, seen, next_position(known, seen))


def _cut(coming: Coming, given: dict[str, Any]) -> None:
    """Cut what is given for a whole prompt to the tokens of the pass, in place."""
    first, last = coming.at, coming.at + coming.tokens
    masks = given.get("visual_pos_masks")
    features = given.get("deepstack_visual_embeds")
    for name in _BY_TOKEN:
        value = given.get(name)
        if isinstance(value, mx.array) and value.shape[1] != coming.tokens:
            given[name] = value[:, first:last]
    if masks is not None and features is not None:
        a, b = np.searchsorted(np.flatnonzero(np.array(masks[0])), [first, last]).tolist()
        given["deepstack_visual_embeds"] = [one[a:b] for one in features]
        if a == b:
            given["visual_pos_masks"] = given["deepstack_visual_embeds"] = None


def _with_positions(
    model: nn.Module, coming: Coming, given: dict[str, Any], found: list[tuple[int, int]]
) -> tuple[dict[str, Any], Pictures]:
    """The pass's arguments with its positions (3, 1, T), and all pictures seen when it is over."""
    told, tokens, at = given.pop("position_ids", None), coming.tokens, coming.at
    given.pop("rope_deltas", None)
    # positions are given; with the pixels the model would begin anew
    given["pixel_values"] = None
    if not found:
        base = next_position(coming.pictures, coming.seen)
        if told is not None and told.shape[-1] == tokens and coming.ids is None:
            _check(told, base)
        positions = mx.arange(base, base + tokens, dtype=mx.int32)
        given["position_ids"] = mx.broadcast_to(positions, (3, 1, tokens))
        return given, coming.pictures
    if told is None:
        told = coming.prompt.key
    if told is None or told.shape[-1] < at + tokens:
        grids = (given.get("image_grid_thw"), given.get("video_grid_thw"))
        if at or (grids[0] is None and grids[1] is None):
            raise ConfigError(
                "a pass brings pictures, and nothing tells their positions; give image_grid_thw with the "
                "first pass of a prompt, or position_ids"
            )
        told = model.get_rope_index(mx.array([coming.ids]), *grids)[0]
    wide = np.array(told).astype(np.int64).reshape(-1, told.shape[-1])
    rows = np.broadcast_to(wide, (3, wide.shape[1])) - wide[:, :1] + coming.prompt.base
    given["position_ids"] = mx.array(rows[:, at : at + tokens].astype(np.int32))[:, None]
    return given, _noted(coming, found, rows)


def _check(told: mx.array, base: int) -> None:
    """Refuse positions of text that are not those after ``base`` others, counted from there or from 0."""
    wide = np.array(told).reshape(-1, told.shape[-1])
    steps = wide - wide[:, :1] - np.arange(wide.shape[1])
    if steps.any() or (wide[:, 0] != wide[0, 0]).any() or wide[0, 0] not in (0, base):
        raise ConfigError(
            f"position_ids begin at {wide[:, 0].tolist()}, and the cache goes on at {base}; it counts "
            "positions itself, leave them out"
        )


def _noted(coming: Coming, found: list[tuple[int, int]], positions: Ints) -> Pictures:
    """The pictures seen, and those at ``found`` in a pass; ``positions`` (3, P) are of the whole prompt."""
    known, first = list(coming.pictures), coming.prompt.start
    for a, b in found:
        start, end = coming.seen + a, coming.seen + b
        if a == 0 and coming.at and known and known[-1].end == start:
            # the rest of a picture that the pass before has cut
            start = known.pop().start
        own = positions[:, start - first : end - first]
        rows, columns = (int(np.ptp(axis)) + 1 for axis in own[1:])
        whole = rows * columns == end - start
        advance = int(own.max()) + 1 - next_position(known, start)
        known.append(Picture(start, end, *((rows, columns) if whole else (0, 0)), advance))
    return tuple(known)
