"""What the decoder of a vision-language model is given for texts with pictures, computed once, in torch.

The stock model runs until it calls its decoder, whose arguments are taken down: embeddings, positions, and
where a model has them DeepStack's features. So nothing here knows how a model sees.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..core.vision import picture_tokens
from ..errors import ConfigError, UnsupportedModelError
from .samples import Turn

_FOLLOWED = {"inputs_embeds", "position_ids", "visual_pos_masks", "deepstack_visual_embeds"}


@dataclass(frozen=True)
class Sight:
    """B texts of T tokens: ``embeddings`` (B, T, hidden), rotary ``position`` (3 or 1, B, T) and
    ``pictured`` (B, T), true at the tokens of pictures; ``deep`` are features (B, T, hidden) that are added
    after the first layers."""

    embeddings: torch.Tensor
    position: torch.Tensor
    pictured: torch.Tensor
    deep: tuple[torch.Tensor, ...] = ()

    @property
    def next_position(self) -> torch.Tensor:
        """The rotary position of the token after each text, (B, 1)."""
        return self.position.amax((0, 2))[:, None] + 1

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (self.embeddings, self.position, *self.deep))

    def part(self, first: int, last: int, ahead: torch.Tensor) -> dict[str, Any]:
        """What the decoder is given from ``first`` to before ``last``; a text begins at ``ahead`` (B, 1)."""
        given: dict[str, Any] = {
            "inputs_embeds": self.embeddings[:, first:last],
            "position_ids": self.position[:, :, first:last] + ahead,
        }
        if len(self.position) == 1:
            given["position_ids"] = given["position_ids"][0]
        here = self.pictured[:, first:last]
        if self.deep and here.any():
            given["visual_pos_masks"] = here
            given["deepstack_visual_embeds"] = [x[:, first:last][here] for x in self.deep]
        return given


class _Caught(Exception):
    pass


def look(model: Any, processor: Any, turns: Sequence[Turn]) -> Sight | None:
    """The sight of turns of equal length; None if none of them has pictures.

    Raises:
        ConfigError: the ids have not as many image tokens as the model makes of the pictures.
        UnsupportedModelError: the model sees nothing, or gives its decoder what is not followed here.
    """
    if not any(turn.pictures for turn in turns):
        return None
    return _joined([_one(model, processor, turn) for turn in turns])


def image_tokens(model: Any) -> frozenset[int]:
    """The tokens that stand for a part of a picture.

    Raises:
        UnsupportedModelError: the model sees nothing.
    """
    if known := picture_tokens(model.config):
        return known
    raise UnsupportedModelError(
        f"{type(model).__name__} does not take pictures, and there are some in this task; use a "
        "vision-language model"
    )


def _one(model: Any, processor: Any, turn: Turn) -> Sight:
    tokens, device = image_tokens(model), model.device
    ids = torch.tensor([turn.ids], device=device)
    pictured = torch.isin(ids, torch.tensor(sorted(tokens), device=device))
    given: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if turn.pictures:
        made = processor.image_processor(images=[p.image for p in turn.pictures], return_tensors="pt")
        given |= {name: x.to(device) for name, x in made.items()}
        if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
            given["mm_token_type_ids"] = pictured.int()
    decoder, caught = model.get_decoder(), dict[str, Any]()

    def record(*_: Any, **arguments: Any) -> None:
        caught.update(arguments)
        raise _Caught

    decoder.forward = record
    try:
        with torch.no_grad():
            model(**given)
    except _Caught:
        pass
    except ValueError as error:
        raise ConfigError(
            f"{type(model).__name__} does not take these pictures and tokens: {error}"
        ) from error
    finally:
        del decoder.forward
    return _sight(model, caught, pictured, len(turn.ids))


def _sight(model: Any, caught: dict[str, Any], pictured: torch.Tensor, tokens: int) -> Sight:
    masks = {"attention_mask", "cache", "use_cache", "past_key_values", "output_attentions", "return_dict"}
    if odd := [n for n, v in caught.items() if v is not None and n not in _FOLLOWED | masks | {"input_ids"}]:
        raise UnsupportedModelError(
            f"{type(model).__name__} gives its decoder {', '.join(odd)}, which evaluation with pictures does "
            "not follow; use another model"
        )
    x, position = caught.get("inputs_embeds"), caught.get("position_ids")
    if x is None:
        x = model.get_input_embeddings()(caught["input_ids"])
    if position is None:
        position = torch.arange(tokens, device=x.device)[None]
    position = position[None] if position.dim() == 2 else position[-3:]
    deep = []
    for features in caught.get("deepstack_visual_embeds") or ():
        deep.append(x.new_zeros(x.shape).masked_scatter(pictured[..., None], features.to(x.dtype)))
    return Sight(x, position, pictured, tuple(deep))


def _joined(sights: Sequence[Sight]) -> Sight:
    """Side by side; texts without a picture have no features of it."""
    deepest = max(len(sight.deep) for sight in sights)
    deep = [
        torch.cat([s.deep[i] if s.deep else torch.zeros_like(s.embeddings) for s in sights])
        for i in range(deepest)
    ]
    rows = max(len(sight.position) for sight in sights)
    position = torch.cat([s.position.expand(rows, -1, -1) for s in sights], 1)
    x, pictured = (torch.cat([getattr(s, name) for s in sights]) for name in ("embeddings", "pictured"))
    return Sight(x, position, pictured, tuple(deep))


class Sights:
    """Sights of turns that were looked at before, up to some bytes."""

    def __init__(self, model: Any, processor: Any, room: int = 1 << 30) -> None:
        self.model, self.processor, self.room = model, processor, room
        self._known: dict[tuple[Turn, ...], Sight] = {}
        self._tokens = picture_tokens(model.config)

    def __call__(self, turns: Sequence[Turn]) -> Sight | None:
        if not any(turn.pictures for turn in turns):
            if self._tokens & {token for turn in turns for token in turn.ids}:
                raise ConfigError("a text has image tokens without pictures; give them, or remove the tokens")
            return None
        key = tuple(turns)
        if key not in self._known:
            found = look(self.model, self.processor, turns)
            assert found is not None
            while self._known and found.nbytes + sum(s.nbytes for s in self._known.values()) > self.room:
                del self._known[next(iter(self._known))]
            self._known[key] = found
        return self._known[key]
