"""Pictures in training: what a model of mlx-vlm makes of them, once for teacher and student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ...core.picture_prompts import Asked
from ...core.pictures import TOKEN_TYPES
from ...core.types import Ints
from ...errors import UnsupportedModelError
from ...training.pictures import Inputs, Shown, ends_of, places_of
from ..both_ways import looks_both_ways
from ..seeing import Seen, processed, taken
from ..vision import can_see, family, forgetful, speaking, tokens_of_pictures

# what embeddings come with: for each token, for each token of a picture, and what is of no use here
_BY_TOKEN = ("per_layer_inputs", *TOKEN_TYPES)
_DEEP, _MARKS = "deepstack_visual_embeds", "visual_pos_masks"
_ELSE = {"attention_mask", "attention_mask_4d", "rope_deltas", "position_ids", _DEEP, _MARKS}


class Seeing:
    """Implements :class:`mlx_kvret.training.pictures.Sees`."""

    def __init__(self, model: nn.Module, processor: Any) -> None:
        self.model, self.processor = model, processor
        self.tokens = tokens_of_pictures(model)

    @classmethod
    def of(cls, model: nn.Module, processor: Any) -> Seeing | None:
        """None for a model of text, or without a processor of pictures."""
        if not can_see(model) or not hasattr(processor, "image_processor"):
            return None
        return cls(model, processor)

    def __call__(self, text: str, pictures: Sequence[Any]) -> Mapping[str, Any]:
        made = processed(self.model, self.processor, Asked(text, list(pictures)), first=False).as_mapping()
        return {name: value for name, value in made.items() if value is not None}

    def inputs(self, ids: mx.array, starts: Ints, shown: Sequence[Shown]) -> Inputs:
        """What a language model is given for rows (R, T) with pictures; M-RoPE begins anew in each document.

        Raises:
            UnsupportedModelError: the model is given something that does not follow rows and documents.
        """
        base = self.model.get_input_embeddings(ids, None, mask=mx.ones_like(ids)).to_dict()
        made = {name: base[name] for name in ("inputs_embeds", *_BY_TOKEN) if base.get(name) is not None}
        positions = np.broadcast_to(places_of(starts), (3, *starts.shape)).copy()
        marks, deep = np.zeros(starts.shape, bool), list[mx.array]()
        for piece in sorted(shown, key=lambda one: (one.row, one.begin)):
            seen, row = self._document(piece), piece.row
            own = slice(piece.start, piece.start + len(piece.ids))
            place = slice(piece.begin, piece.begin + len(piece.ids))
            for name in ("inputs_embeds", *_BY_TOKEN):
                value = seen.embeds if name == "inputs_embeds" else seen.given.get(name)
                if value is not None:
                    made.setdefault(name, mx.zeros((*starts.shape, *value.shape[2:]), value.dtype))
                    made[name][row, place] = value[0, own]
            if (found := seen.given.get("position_ids")) is not None:
                rows = np.array(found).reshape(-1, found.shape[-1])[:, own]
                positions[:, row, place] = rows - rows[:, :1]
            if (features := seen.given.get(_DEEP)) is not None:
                told = np.array(seen.given[_MARKS]).reshape(-1)
                marks[row, place] = told[own]
                a, b = (int(told[:end].sum()) for end in (own.start, own.stop))
                deep.append(mx.stack([one[a:b] for one in features]))
        given: dict[str, Any] = {**made, "position_ids": mx.array(positions)}
        if deep:
            given |= {_MARKS: mx.array(marks), _DEEP: mx.concatenate(deep, 1)}
        mx.eval(list(given.values()))
        # without the types of tokens its own mask is causal too
        whole = looks_both_ways(speaking(self.model)) and any(name in given for name in TOKEN_TYPES)
        return Inputs(given, ends_of(starts, shown) if whole else None)

    def _document(self, piece: Shown) -> Seen:
        """A whole document as the model sees it."""
        with forgetful(speaking(self.model)):
            seen = Seen(self.model, taken({"input_ids": piece.document, **piece.pixels}))
        strange = sorted(seen.given.keys() - piece.pixels.keys() - {*_BY_TOKEN, *_ELSE})
        if strange:
            raise UnsupportedModelError(
                f"{family(self.model)} models give their decoder {', '.join(strange)}; training on pictures "
                "does not follow that, train on text alone"
            )
        return seen
