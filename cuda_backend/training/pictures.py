"""Pictures in training: what a vision tower makes of them, once for teacher and student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from mlx_kvret.core.picture_prompts import Asked
from mlx_kvret.errors import ConfigError, UnsupportedModelError
from mlx_kvret.training.pictures import Shown

from ..pictures import TYPES, Eyes
from ..seeing import FEATURES, GRIDS, Features, processed

# arguments of a decoder that are put together from documents, and those that stay out
_KNOWN = {"inputs_embeds", "position_ids", "visual_pos_masks", "deepstack_visual_embeds"}
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
        if self.eyes.whole:
            raise ConfigError(
                f"{self.model.config.model_type} models look both ways inside of a picture, which training "
                "does not follow; train on text alone, whose gates serve pictures too"
            )
        made = processed(self.model, self.processor, Asked(text, list(pictures)), first=False)
        return {"input_ids": made.ids.cpu().numpy(), **made.given}

    @torch.no_grad()
    def inputs(self, ids: torch.Tensor, starts: torch.Tensor, shown: Sequence[Shown]) -> dict[str, Any]:
        """What a decoder is given for rows (R, T) with pictures; M-RoPE begins anew with every document."""
        base = self._caught(input_ids=ids)
        position = torch.arange(ids.shape[1], device=ids.device) - starts
        given = {"inputs_embeds": base["inputs_embeds"].clone(), "position_ids": position}
        marks, deep = torch.zeros_like(ids, dtype=torch.bool), list[list[torch.Tensor]]()
        for piece in sorted(shown, key=lambda one: (one.row, one.begin)):
            own, place = (
                self._piece(piece, ids.device),
                (piece.row, slice(piece.begin, piece.begin + len(piece.ids))),
            )
            given["inputs_embeds"][place] = own["inputs_embeds"][0]
            if (found := own.get("position_ids")) is not None:
                if given["position_ids"].ndim == 2:
                    given["position_ids"] = given["position_ids"].expand(3, -1, -1).clone()
                given["position_ids"][:, place[0], place[1]] = found[-3:, 0]
            if own.get("visual_pos_masks") is not None:
                marks[place] = own["visual_pos_masks"][0]
                deep.append(own["deepstack_visual_embeds"])
        if deep:
            layers = [torch.cat(parts) for parts in zip(*deep, strict=True)]
            given |= {"visual_pos_masks": marks, "deepstack_visual_embeds": layers}
        return given

    def _piece(self, piece: Shown, device: torch.device) -> dict[str, Any]:
        """What the decoder would be given for one document alone."""
        ids = torch.from_numpy(piece.ids).long().to(device)[None]
        features = Features.of(self.model, piece.pixels)
        if features is None:
            raise ConfigError("a record's pictures have no pixels; give what the model's processor makes")
        rows = sum(b - a for a, b in piece.spans)
        call = {"input_ids": ids, FEATURES: {"image": features.part(piece.before, piece.before + rows)}}
        tokens = torch.tensor(sorted(self.tokens), device=device)
        call |= {name: torch.isin(ids, tokens).long() for name in TYPES if name in piece.pixels}
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
