"""Positions of M-RoPE, counted by the cache: a picture takes fewer of them than it has tokens.

A vision-language model's own file keeps the difference in the model object, from the first picture on: two
conversations would disturb each other, a cache in a file would lose it, and a second picture be read as text.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from mlx_kvret.core.pictures import Picture, Pictures, next_position, runs
from mlx_kvret.core.types import Ints, Mask
from mlx_kvret.errors import ConfigError

from .cache import BoundedCache
from .layer import running
from .pictures import Arriving, Eyes

_COUNT, _PREPARE = "compute_3d_position_ids", "_prepare_position_ids_for_generation"


def prepare(model: PreTrainedModel, eyes: Eyes) -> None:
    """Have the model leave positions to the cache, where there is one of ours."""
    if eyes.counter is None:
        return

    def count(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return None if running.get() is not None else getattr(type(self), _COUNT)(self, *args, **kwargs)

    def prepared(self: PreTrainedModel, inputs: torch.Tensor, kwargs: dict[str, Any]) -> Any:
        cache = next((v for v in kwargs.values() if v is not None and hasattr(v, "get_seq_length")), None)
        if cache is not None and not isinstance(cache, BoundedCache):
            return getattr(type(self), _PREPARE)(self, inputs, kwargs)
        return _for_generate(eyes, cache, inputs, kwargs)

    vars(eyes.counter)[_COUNT] = MethodType(count, eyes.counter)
    vars(model)[_PREPARE] = MethodType(prepared, model)


def release(model: PreTrainedModel, eyes: Eyes) -> None:
    """Undo :func:`prepare`."""
    if eyes.counter is not None:
        vars(eyes.counter).pop(_COUNT, None)
        vars(model).pop(_PREPARE, None)


def place(eyes: Eyes, cache: BoundedCache, rows: int, tokens: int, kwargs: dict[str, Any]) -> None:
    """Give a decoder's call its positions, and have the cache know the pictures in it once it is over.

    Raises:
        ConfigError: positions that do not go on where the conversation stands, or pictures without a grid.
    """
    sight = cache.sight
    arriving: Arriving | None = sight.arriving
    marks = None if arriving is None else arriving.marks
    places = sight.places(cache.competing)
    real = sight.real(rows, places, tokens, None if arriving is None else arriving.mask)
    own, clocks = sight.pictures(rows), sight.clocks(rows, places)
    given = kwargs.get("position_ids")
    if eyes.counter is None:
        if marks is not None:
            sight.coming = _arrived(own, clocks, marks, real, None)
        return
    before = list(map(next_position, own, clocks))
    if given is None:
        device = next(eyes.counter.parameters()).device
        start = torch.tensor([n - a for n, (a, _) in zip(before, real, strict=True)]).to(device)
        if marks is None:
            kwargs["position_ids"] = (start[:, None] + torch.arange(tokens, device=device)).clamp_(min=0)
            kwargs["position_ids"] = kwargs["position_ids"].expand(3, -1, -1)
            return
        assert arriving is not None
        found = _counted(eyes, arriving, marks, real)
        given = kwargs["position_ids"] = found + torch.tensor(before, device=found.device)[:, None]
    shown = given.expand(3, -1, -1) if given.ndim == 2 else given[-3:]
    sight.coming = _arrived(own, clocks, marks, real, shown.cpu().numpy())


def _counted(eyes: Eyes, arriving: Arriving, marks: Mask, real: list[tuple[int, int]]) -> torch.Tensor:
    """Positions (3, R, T) by the model's own rule, as if each row began here; in padding they say nothing."""
    rows, tokens = marks.shape
    types = arriving.types if arriving.types is not None else torch.from_numpy(marks).long()
    mask = torch.zeros(rows, tokens, dtype=torch.long, device=types.device)
    for row, (begin, end) in enumerate(real):
        # the rule knows no empty sequence
        mask[row, begin : max(end, begin + 1)] = 1
    given = {n: arriving.given[n] for n in _rule(eyes) if arriving.given.get(n) is not None}
    return _ruled(eyes, types, mask, given)


def _rule(eyes: Eyes) -> list[str]:
    """Arguments of the model's rule that tell of pictures."""
    own = ("self", "input_ids", "mm_token_type_ids", "attention_mask", "kwargs")
    return [name for name in inspect.signature(eyes.counter.get_rope_index).parameters if name not in own]


def _ruled(eyes: Eyes, types: torch.Tensor, mask: torch.Tensor, given: dict[str, Any]) -> torch.Tensor:
    runs_of, grids = int(((types > 0) & mask.bool() & ~_shifted(types > 0)).sum()), 0
    for name, value in given.items():
        grids += len(value) if name.endswith("_grid_thw") else 0
    if not grids:
        raise ConfigError(
            f"the call holds {runs_of} pictures and not their image_grid_thw, which tell positions; "
            "give all that the model's processor makes"
        )
    try:
        positions, _ = eyes.counter.get_rope_index(
            input_ids=types, mm_token_type_ids=types, attention_mask=mask, **given
        )
    except (StopIteration, RuntimeError, IndexError, TypeError) as error:
        raise ConfigError(
            f"the call holds {runs_of} pictures and {grids} grids of sizes that do not fit ({error}); give "
            "those of its new pictures only, as many as it has tokens for"
        ) from error
    found: torch.Tensor = positions
    return found


def _shifted(seen: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(seen, (1, 0))[:, :-1]


def _arrived(
    before: list[Pictures],
    clocks: list[int],
    marks: Mask | None,
    real: list[tuple[int, int]],
    shown: Ints | None,
) -> list[Pictures]:
    """The pictures of each row after a pass; ``shown`` are its positions (3, R, T), if M-RoPE's."""
    coming = []
    for row, (own, seen, (begin, end)) in enumerate(zip(before, clocks, real, strict=True)):
        part = slice(begin, end)
        mark = np.zeros(end - begin, bool) if marks is None else marks[row, part]
        coming.append(arrived(own, seen, mark, None if shown is None else shown[:, row, part]))
    return coming


def arrived(before: Pictures, seen: int, marks: Mask, shown: Ints | None) -> Pictures:
    """The pictures of a sequence after more tokens, (n,) of which are marked as a picture's.

    ``shown`` (3, n) are their positions: of time, rows and columns.

    Raises:
        ConfigError: the positions do not go on where the sequence stands.
    """
    found, count = list(before), len(marks)
    for a, b in runs(marks.tolist(), (1,)):
        piece = Picture(seen + a, seen + b, advance=b - a)
        if shown is not None:
            own = shown[:, a:b]
            after = shown[:, b].min() if b < count else shown.max() + 1
            high, wide = (int(side.max() - side.min()) + 1 for side in own[1:])
            grid = {"rows": high, "columns": wide} if high * wide == b - a else {}
            piece = replace(piece, advance=int(after - own.min()), **grid)
        if found and found[-1].end == piece.start:
            # read in parts, or side by side
            last = found.pop()
            piece = Picture(last.start, piece.end, advance=last.advance + piece.advance)
        found.append(piece)
    if shown is None or not count:
        return tuple(found)
    expected = max(int(shown.max()) + 1, next_position(before, seen))
    wrong = expected - next_position(found, seen + count)
    if wrong and not marks.any():
        raise ConfigError(
            f"position_ids end before {expected}, and the conversation will stand at {expected - wrong}; "
            "drop them: the cache knows where it stands"
        )
    if wrong:
        found[-1] = replace(found[-1], advance=found[-1].advance + wrong)
    return tuple(found)


def _for_generate(
    eyes: Eyes, cache: BoundedCache | None, inputs: torch.Tensor, kwargs: dict[str, Any]
) -> torch.Tensor | None:
    """Positions (4, R, N) of a text of which the cache holds a beginning, for transformers' ``generate``.

    It takes the grids away before the model is called. None where the cache can count for itself.
    """
    if kwargs.get("input_ids") is not None and kwargs["input_ids"].shape[1]:
        inputs = kwargs["input_ids"]
    types, given = (
        kwargs.get("mm_token_type_ids"),
        {n: kwargs[n] for n in _rule(eyes) if kwargs.get(n) is not None},
    )
    if inputs.ndim != 2 or not any(name.endswith("_grid_thw") for name in given):
        return None
    if types is None:
        tokens = torch.tensor(sorted(eyes.tokens), device=inputs.device)
        types = torch.isin(inputs, tokens).long()
    places = 0 if cache is None else cache.seen
    mask = kwargs.get("attention_mask")
    mask = torch.ones_like(inputs) if mask is None else mask.long()
    fresh = _ruled(eyes, types[:, places:], mask[:, places:], given)
    if cache is not None:
        clocks = cache.sight.clocks(len(inputs), places)
        before = list(map(next_position, cache.sight.pictures(len(inputs)), clocks))
        fresh = fresh + torch.tensor(before, device=fresh.device)[:, None]
    text = (mask.cumsum(-1) - 1).clamp_(min=0)
    seen = torch.cat([text[None, :, :places].expand(3, -1, -1), fresh], 2)
    return torch.cat([text[None], seen])
