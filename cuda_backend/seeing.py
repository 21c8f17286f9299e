"""A prompt with pictures: what its processor makes of it, and how it is read in chunks to its last token."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from mlx_kvret.core.picture_prompts import (
    Asked,
    asked,
    check_no_video,
    is_processed,
    listed,
    tokenizer_of,
)
from mlx_kvret.core.pictures import TOKEN_TYPES, InChunks, check_finite, check_text, runs
from mlx_kvret.core.processors import processing, seeing_processor
from mlx_kvret.core.vision import picture_tokens
from mlx_kvret.errors import ConfigError, UnsupportedFeatureError

from .attachment import attachment
from .cache import BoundedCache, cache_argument
from .pictures import Eyes

FEATURES = "mm_encoder_outputs"
GRIDS = "image_grid_thw"


@dataclass
class Prepared:
    """A prompt's ``ids`` (1, T), and what else its processor made, by the names of the model's arguments."""

    ids: torch.Tensor
    given: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def tokens(self) -> list[int]:
        found: list[int] = self.ids[0].tolist()
        return found


def eyes_of(model: PreTrainedModel) -> Eyes:
    """What is known of a model that sees.

    Raises:
        ConfigError: it does not.
    """
    made = attachment(model)
    if made is None or made.eyes is None:
        raise ConfigError(
            f"this {model.config.model_type} model reads text only; drop the pictures, or load a "
            "vision-language model"
        )
    return made.eyes


def prepared(model: PreTrainedModel, processor: Any, prompt: Any, images: Any, first: bool) -> Prepared:
    """A prompt with pictures in any form.

    Raises:
        ConfigError: it cannot be read, or the model or the processor takes no pictures.
    """
    eyes_of(model)
    if is_processed(prompt):
        if listed(images):
            raise ConfigError("the prompt has its pictures already; drop images")
        return taken(model, prompt)
    processor = seeing_processor(processor)
    return processed(model, processor, asked(processor, prompt, images, first=first), first)


def check_no_pictures(model: PreTrainedModel, ids: Sequence[int]) -> None:
    """As :func:`mlx_kvret.core.pictures.check_text`, of a model's tokens."""
    made = attachment(model)
    check_text(ids, () if made is None or made.eyes is None else made.eyes.tokens)


def processed(model: PreTrainedModel, processor: Any, found: Asked, first: bool) -> Prepared:
    """What the processor makes of a rendered prompt.

    Raises:
        ConfigError: the processor refuses it, or no tokens come of its pictures.
    """
    bos = tokenizer_of(processor).bos_token
    begin = first and (bos is None or not found.text.startswith(bos))
    shown = {"images": [list(found.pictures)]} if found.pictures else {}
    with processing():
        made = processor(text=[found.text], **shown, add_special_tokens=begin, return_tensors="pt")
    prompt = taken(model, made)
    if found.pictures and not set(prompt.tokens) & picture_tokens(model.config):
        raise ConfigError(
            f"no token of the prompt stands for a picture in this {model.config.model_type} model; the chat "
            "template or the processor is not the model's"
        )
    return prompt


def taken(model: PreTrainedModel, made: Mapping[str, Any]) -> Prepared:
    """What a processor made of one prompt, in arrays of any make.

    Raises:
        ConfigError: it is of several prompts, or of a video, or is no array.
    """
    # some are made whenever they are asked for
    made = dict(made.items())
    check_no_video(made)
    found = {str(name): _tensor(model, name, value) for name, value in made.items() if value is not None}
    ids = found.pop("input_ids").long()
    ids = ids[None] if ids.ndim == 1 else ids
    if ids.ndim != 2 or ids.shape[0] != 1:
        raise ConfigError(
            f"the prompt has input_ids of shape {tuple(ids.shape)}; one text is generated at a time, "
            "give one row"
        )
    mask = found.pop("attention_mask", None)
    if mask is not None and not bool(mask.all()):
        raise ConfigError("the prompt's attention_mask hides some of its tokens; give the tokens that count")
    known = {*inspect.signature(model.forward).parameters, *_tower_names(model)}
    return Prepared(ids, {name: value for name, value in found.items() if name in known})


def _tensor(model: PreTrainedModel, name: Any, value: Any) -> torch.Tensor:
    try:
        found = value if isinstance(value, torch.Tensor) else torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"the prompt's {name} cannot be read as an array ({error}); give arrays") from error
    return found.to(model.device, model.dtype if found.is_floating_point() else None)


def _tower(model: PreTrainedModel) -> Any:
    """What makes features of pictures."""
    found = getattr(model.base_model, "get_image_features", None)
    if found is None or FEATURES not in inspect.signature(model.forward).parameters:
        raise UnsupportedFeatureError(
            f"{model.config.model_type} models of this transformers release take no pictures in parts; "
            "update it (`pip install -U transformers`), or call the model itself with the processor's inputs"
        )
    return found


def _tower_names(model: PreTrainedModel) -> list[str]:
    return [name for name in inspect.signature(_tower(model)).parameters if name != "kwargs"]


@dataclass
class Features:
    """What a tower made of pictures: ``rows`` (n, hidden), as many as tokens stand for them, and its kind.

    ``deep`` are those that are added to hidden states further up, of each of some layers.
    """

    kind: Any
    rows: torch.Tensor
    listed: bool
    deep: list[torch.Tensor] | None

    @classmethod
    def of(cls, model: PreTrainedModel, given: Mapping[str, Any]) -> Features | None:
        """None where there are no pictures.

        Raises:
            UnsupportedFeatureError: the tower makes no numbers of them.
        """
        own = {name: given[name] for name in _tower_names(model) if name in given}
        if not any("pixel" in name for name in own):
            return None
        out = _tower(model)(**own, return_dict=True)
        pooled, deep = out.pooler_output, getattr(out, "deepstack_features", None)
        listed = not isinstance(pooled, torch.Tensor)
        rows, further = _rows(pooled), None if deep is None else [_rows(one) for one in deep]
        check_finite(all(bool(one.isfinite().all()) for one in (rows, *(further or ()))))
        return cls(type(out), rows, listed, further)

    def part(self, start: int, end: int) -> Any:
        """Of the tokens ``start`` to ``end`` - 1 of pictures, as the model takes them."""
        rows = self.rows[start:end]
        deep = {} if self.deep is None else {"deepstack_features": [[one[start:end]] for one in self.deep]}
        return self.kind(pooler_output=[rows] if self.listed else rows[None], **deep)


def _rows(features: Any) -> torch.Tensor:
    return torch.cat([one.reshape(-1, one.shape[-1]) for one in features])


class Seen(InChunks):
    """A prompt with its pictures seen, which is then read in chunks that cut none.

    Raises:
        ConfigError: other tokens stand for pictures than the tower makes of them.
    """

    def __init__(self, model: PreTrainedModel, prompt: Prepared) -> None:
        self.model, self.ids = model, prompt.ids
        self.last, tokens = prompt.ids.shape[1] - 1, eyes_of(model).tokens
        self.spans = runs(prompt.tokens, tokens)
        with torch.no_grad():
            self._features = Features.of(model, prompt.given)
        count = sum(b - a for a, b in self.spans)
        rows = 0 if self._features is None else len(self._features.rows)
        if rows != count:
            raise ConfigError(
                f"the prompt has {count} tokens of pictures, and its pictures make {rows}; give what the "
                "model's own processor makes of text and pictures"
            )
        self._types = {name: prompt.given[name] for name in TOKEN_TYPES if name in prompt.given}
        self._grids = prompt.given.get(GRIDS)
        if self._grids is not None and len(self._grids) != len(self.spans):
            raise ConfigError(
                f"the prompt has {len(self.spans)} pictures among its tokens and {len(self._grids)} "
                f"{GRIDS}; give one for each"
            )
        # a picture at the very end is read with the last token
        self.until = next((a for a, b in self.spans if a <= self.last < b), self.last)

    @torch.no_grad()
    def one_pass(self, start: int, end: int, cache: BoundedCache) -> torch.Tensor:
        within = [at for at, (a, b) in enumerate(self.spans) if start <= a < end]
        given: dict[str, Any] = {name: kinds[:, start:end] for name, kinds in self._types.items()}
        if within and self._features is not None:
            before = [b - a for a, b in self.spans]
            first = sum(before[: within[0]])
            rows = sum(before[at] for at in within)
            given[FEATURES] = {"image": self._features.part(first, first + rows)}
            if self._grids is not None:
                given[GRIDS] = self._grids[within[0] : within[-1] + 1]
        given |= cache_argument(self.model, cache)
        logits: torch.Tensor = self.model(self.ids[:, start:end], **given, logits_to_keep=1).logits[:, -1]
        return logits
