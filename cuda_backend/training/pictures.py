"""Pictures in training: what a vision tower makes of them, once for teacher and student."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from mlx_kvret.core.picture_prompts import Asked
from mlx_kvret.core.pictures import TOKEN_TYPES
from mlx_kvret.errors import ConfigError, UnsupportedModelError
from mlx_kvret.training.pictures import Inputs, Shown, ends_of

from ..pictures import Eyes
from ..seeing import FEATURES, GRIDS, Features, processed

# arguments of a decoder that are put together from documents, of each token and else, and those that stay out
_BY_TOKEN = ("inputs_embeds", "per_layer_inputs")
_KNOWN = {*_BY_TOKEN, "position_ids", "visual_pos_masks", "deepstack_visual_embeds"}
_PLAIN = {"input_ids", "attention_mask", "cache", "past_key_values", "use_cache", "return_dict"}


class Seeing:
    """Implements :class:`mlx_kvret.training.pictures.Sees`."""

    def __init__(self, model: PreTrainedModel, processor: Any, eyes: Eyes) -> None:
        self.model, self.processor, self.eyes = model, processor, eyes
        self.tokens = eyes.tokens

    @classmethod
    def of(cls, model: PreTrainedModel, processor: Any) -> Seeing | None:
        """None for a model of text, or without a processor of pictures."""
        eyes = Eyes.of(model)
        if eyes is None or not hasattr(processor, "image_processor"):
            return None
        return cls(model, processor, eyes)

    def __call__(self, text: str, pictures: Sequence[Any]) -> Mapping[str, Any]:
        made = processed(self.model, self.processor, Asked(text, list(pictures)), first=False)
        return {"input_ids": made.ids.cpu().numpy(), **made.given}

    @torch.no_grad()
    def inputs(self, ids: torch.Tensor, starts: torch.Tensor, shown: Sequence[Shown]) -> Inputs:
        """What a decoder is given for rows (R, T) with pictures; M-RoPE begins anew with every document."""
        base, ends = self._caught(input_ids=ids), None
        position = torch.arange(ids.shape[1], device=ids.device) - starts
        given = {name: base[name].clone() for name in _BY_TOKEN if base.get(name) is not None}
        given["position_ids"] = position
        if self.eyes.whole:
            ends, masks = self._whole(ids, starts, shown)
            given |= masks
        marks, deep = torch.zeros_like(ids, dtype=torch.bool), list[list[torch.Tensor]]()
        for piece in sorted(shown, key=lambda one: (one.row, one.begin)):
            own = self._piece(piece, ids.device)
            place = piece.row, slice(piece.begin, piece.begin + len(piece.ids))
            for name in _BY_TOKEN:
                if own.get(name) is not None:
                    given[name][place] = own[name][0]
            # others are counted by the place
            if (found := own.get("position_ids")) is not None and found.ndim == 3:
                if given["position_ids"].ndim == 2:
                    given["position_ids"] = given["position_ids"].expand(3, -1, -1).clone()
                given["position_ids"][:, place[0], place[1]] = found[-3:, 0]
            if own.get("visual_pos_masks") is not None:
                marks[place] = own["visual_pos_masks"][0]
                deep.append(own["deepstack_visual_embeds"])
        if deep:
            layers = [torch.cat(parts) for parts in zip(*deep, strict=True)]
            given |= {"visual_pos_masks": marks, "deepstack_visual_embeds": layers}
        return Inputs(given, ends)

    def _whole(
        self, ids: torch.Tensor, starts: torch.Tensor, shown: Sequence[Shown]
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """The ends of sight, and the masks that the model makes of rows whose pictures are seen whole."""
        ends = torch.from_numpy(ends_of(starts.cpu().numpy(), shown)).to(ids.device)
        types = torch.zeros_like(ids)
        for piece in shown:
            for a, b in piece.spans:
                types[piece.row, piece.begin + a : piece.begin + b] = 1
        names = [
            name
            for name in TOKEN_TYPES
            if name in inspect.signature(self.model.base_model.forward).parameters
        ]
        masks = self._caught(input_ids=ids, **dict.fromkeys(names[:1], types)).get("attention_mask")
        return ends, {"attention_mask": masks}

    def _piece(self, piece: Shown, device: torch.device) -> dict[str, Any]:
        """What the decoder would be given for one document alone."""
        ids = torch.from_numpy(piece.ids).long().to(device)[None]
        features = Features.of(self.model, piece.pixels)
        if features is None:
            raise ConfigError("a record's pictures have no pixels; give what the model's processor makes")
        rows = sum(b - a for a, b in piece.spans)
        call = {"input_ids": ids, FEATURES: {"image": features.part(piece.before, piece.before + rows)}}
        tokens = torch.tensor(sorted(self.tokens), device=device)
        call |= {name: torch.isin(ids, tokens).long() for name in TOKEN_TYPES if name in piece.pixels}
        if (grids := piece.pixels.get(GRIDS)) is not None:
            call[GRIDS] = grids[piece.earlier : piece.earlier + len(piece.spans)]
        return self._caught(**call)

    def _caught(self, **call: Any) -> dict[str, Any]:
        """What the model gives its decoder, which is not run."""
        decoder, found = self.model.get_decoder(), dict[str, Any]()

        def forward(*_: Any, **given: Any) -> Any:
            found.update(given)
            raise _Caught

        vars(decoder)["forward"] = forward
        try:
            with self.eyes.closed():
                self.model.base_model(**call, use_cache=False)
        except _Caught:
            pass
        finally:
            del vars(decoder)["forward"]
        strange = [n for n, v in found.items() if v is not None and n not in _KNOWN | _PLAIN]
        if strange or "inputs_embeds" not in found:
            raise UnsupportedModelError(
                f"{self.model.config.model_type} models give their decoder {', '.join(strange) or 'tokens'}; "
                "training on pictures does not follow that, train on text alone"
            )
        return found


class _Caught(Exception):
    """The decoder was called."""
