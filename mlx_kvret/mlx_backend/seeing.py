"""A prompt with pictures for a model of mlx-vlm: prepared, embedded, and read in chunks to its last token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..core.picture_prompts import (
    Asked,
    asked,
    check_no_video,
    is_processed,
    listed,
    tokenizer_of,
)
from ..core.pictures import InChunks, check_finite, check_text, runs
from ..core.processors import processing, seeing_processor
from ..errors import ConfigError
from .cache import BoundedCache
from .vision import can_see, family, logits_of, speaking, tokens_of_pictures


def reader_of(model: nn.Module, processor: Any) -> Any:
    """A processor's tokenizer as mlx-lm's loops want it, with the end tokens that the model's config has."""
    if isinstance(processor, TokenizerWrapper) or processor is None:
        return processor
    tokenizer = tokenizer_of(processor)
    known = vars(tokenizer).get("_kvret_reader")
    if known is None:
        stops = getattr(getattr(tokenizer, "stopping_criteria", None), "eos_token_ids", None)
        known = TokenizerWrapper(tokenizer, eos_token_ids=sorted(set(stops)) if stops else None)
        vars(tokenizer)["_kvret_reader"] = known
    return known


@dataclass
class Prepared:
    """A prompt's token ids (1, T), the pixels and whatever else goes with them into the model."""

    ids: mx.array
    pixels: Any
    given: dict[str, Any]

    @property
    def tokens(self) -> list[int]:
        return [int(one) for one in np.array(self.ids[0])]

    def as_mapping(self) -> dict[str, Any]:
        """What :func:`taken` takes back."""
        return {"input_ids": self.ids, "pixel_values": self.pixels, **self.given}


def prepared(model: nn.Module, processor: Any, prompt: Any, images: Any, first: bool) -> Prepared:
    """A prompt with pictures, in any form of :mod:`..core.picture_prompts`, as the processor makes it.

    Raises:
        ConfigError: a prompt that cannot work, or one that the processor refuses.
    """
    if not can_see(model):
        raise ConfigError(
            "there are pictures in the prompt, and this model reads text only; load a vision-language model, "
            "or give the whole one instead of its language model"
        )
    if is_processed(prompt):
        if listed(images):
            raise ConfigError("the prompt holds pixels already; drop images")
        return taken(prompt)
    processor = seeing_processor(processor)
    return processed(model, processor, asked(processor, prompt, images, first=first), first)


def processed(model: nn.Module, processor: Any, found: Asked, first: bool) -> Prepared:
    """What the processor makes of a rendered prompt.

    Raises:
        ConfigError: the processor refuses it, or other tokens come of it than of its pictures.
    """
    bos = tokenizer_of(processor).bos_token
    begin = first and (bos is None or not found.text.startswith(bos))
    with processing():
        made = _made(model, processor, found, begin)
    if not begin:
        made = _unbegun(made, tokenizer_of(processor), found.text)
    rest = {k: v for k, v in made.items() if k not in ("input_ids", "pixel_values", "attention_mask")}
    prompt = Prepared(mx.array(made["input_ids"]), made.get("pixel_values"), rest)
    if found.pictures and not set(prompt.tokens) & tokens_of_pictures(model):
        raise ConfigError(
            f"no token of the prompt stands for a picture in this {family(model)} model; the chat template "
            "or the processor is not the model's"
        )
    return prompt


def _made(model: nn.Module, processor: Any, found: Asked, begin: bool) -> Mapping[str, Any]:
    from mlx_vlm.utils import prepare_inputs

    pictures, config = list(found.pictures), getattr(model, "config", None)
    try:
        return prepare_inputs(
            processor,
            images=pictures,
            prompts=found.text,
            image_token_index=getattr(config, "image_token_index", None),
            add_special_tokens=begin,
        )
    except ValueError as error:
        # LLaVA's of mlx-vlm hands what is meant for its tokenizer to a picture processor that refuses it
        if "unexpected keyword argument" not in str(error) or not pictures:
            raise
        return processor(images=pictures, text=[found.text])


def _unbegun(made: Mapping[str, Any], tokenizer: Any, text: str) -> dict[str, Any]:
    """Without the begin token that some processors put before a text, whether they are asked to or not."""
    ids, bos = np.asarray(made["input_ids"]), tokenizer.bos_token_id
    wanted = tokenizer.encode(text, add_special_tokens=False)[:2]
    extra = bos is not None and ids[0, 0] == bos and wanted != ids[0, :2].tolist()
    if not extra or (wanted[:1] == [bos] and ids[0, 1] != bos):
        return dict(made)
    by_token = {name for name, x in made.items() if np.shape(x)[:2] == ids.shape}
    return {name: x[:, 1:] if name in by_token else x for name, x in made.items()}


def taken(made: Mapping[str, Any]) -> Prepared:
    """What a processor made of one prompt, in arrays of any make.

    Raises:
        ConfigError: it is of several prompts, or of a video, or is no array.
    """
    # some are made whenever they are asked for
    made = dict(made.items())
    check_no_video(made)
    found = {str(name): _array(name, value) for name, value in made.items() if value is not None}
    ids = found.pop("input_ids")
    ids = ids[None] if ids.ndim == 1 else ids
    if ids.ndim != 2 or ids.shape[0] != 1:
        raise ConfigError(
            f"the prompt has input_ids of shape {tuple(ids.shape)}; one text is generated at a time, give "
            "one row"
        )
    mask = found.pop("attention_mask", None)
    if mask is not None and not mask.all().item():
        raise ConfigError("the prompt's attention_mask hides some of its tokens; give the tokens that count")
    return Prepared(ids, found.pop("pixel_values", None), found)


def _array(name: Any, value: Any) -> Any:
    if isinstance(value, mx.array):
        return value
    try:
        found = np.asarray(value)
        return mx.array(found if found.dtype != np.float64 else found.astype(np.float32))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"the prompt's {name} cannot be read as an array ({error}); give arrays") from error


def check_no_pictures(model: nn.Module, ids: Sequence[int]) -> None:
    """As :func:`mlx_kvret.core.pictures.check_text`, of a model's tokens."""
    check_text(ids, tokens_of_pictures(model) if can_see(model) else ())


class Seen(InChunks):
    """A prompt's embeddings (1, T, D), and what the language model is given with each of its chunks."""

    def __init__(self, model: nn.Module, prompt: Prepared) -> None:
        lm = speaking(model)
        out = model.get_input_embeddings(
            prompt.ids, prompt.pixels, mask=mx.ones_like(prompt.ids), **prompt.given
        )
        rest = {k: v for k, v in out.to_dict().items() if k != "inputs_embeds" and v is not None}
        features = [out.inputs_embeds, *rest.get("deepstack_visual_embeds", ())]
        check_finite(all(bool(mx.isfinite(one).all()) for one in features))
        # positions that are left on the model are another conversation's at the next chunk
        if "position_ids" not in rest and getattr(lm, "_position_ids", None) is not None:
            rest["position_ids"] = lm._position_ids
        self.model, self.ids, self.embeds = lm, prompt.ids, out.inputs_embeds
        self.given = prompt.given | rest
        spans = runs(prompt.tokens, tokens_of_pictures(model))
        if hasattr(lm, "get_rope_index"):
            _check_places(spans, prompt.given.get("image_grid_thw"), self.given.get("position_ids"))
        self.last = len(prompt.tokens) - 1
        self.until, self.spans = self.last, [(a, min(b, self.last)) for a, b in spans if a < self.last]

    def chunks(self, cache: BoundedCache, step: int) -> Iterator[int]:
        for end in super().chunks(cache, step):
            mx.clear_cache()
            yield end

    def one_pass(self, start: int, end: int, cache: BoundedCache) -> Any:
        out = self.model(
            self.ids[:, start:end], inputs_embeds=self.embeds[:, start:end], cache=cache, **self.given
        )
        return logits_of(out)


def _check_places(spans: list[tuple[int, int]], grids: Any, positions: Any) -> None:
    """Refuse pictures that mlx-vlm counts as text: it looks for the token that templates put before each."""
    if spans and (grids is None or len(grids) != len(spans)):
        raise ConfigError(
            f"the prompt has {len(spans)} pictures among its tokens and {0 if grids is None else len(grids)} "
            "image_grid_thw; give one for each"
        )
    wide = np.zeros((3, 0)) if positions is None else np.array(positions).reshape(-1, positions.shape[-1])
    for start, end in spans:
        sides = np.ptp(wide[-2:, start:end], axis=1) + 1 if wide.shape[1] else np.zeros(2)
        if sides.prod() != end - start:
            raise ConfigError(
                f"the picture at tokens {start} to {end - 1} stands without what the model's template puts "
                "before one, so that it would be read as text; write <image>, or give messages"
            )


class Speaker(nn.Module):
    """A language model of mlx-vlm as mlx-lm's loops call one; of ``seen`` the last token is to be read."""

    def __init__(self, model: nn.Module, seen: Seen | None = None) -> None:
        super().__init__()
        self.model = model
        self._seen = [] if seen is None else [seen]

    @property
    def layers(self) -> Any:
        return self.model.layers

    def __call__(self, inputs: mx.array, cache: Any = None, **options: Any) -> mx.array:
        if self._seen:
            found: mx.array = self._seen.pop().finish(cache)
            return found
        return logits_of(self.model(inputs, cache=cache, **options))
