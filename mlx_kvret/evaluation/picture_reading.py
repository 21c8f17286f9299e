"""Texts with pictures through the backends' own forward passes, in chunks that cut no picture."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from ..bitmap import Bitmap
from ..core.picture_prompts import tokenizer_of
from ..core.pictures import chunk_ends, runs
from ..core.vision import picture_tokens
from ..errors import ConfigError, UnsupportedModelError
from .samples import Turn


def check_sees(model: Any, processor: Any) -> None:
    """Refuse pictures where they cannot be taken.

    Raises:
        UnsupportedModelError: the model sees nothing, or came without its processor.
    """
    if not picture_tokens(getattr(model, "config", None)) or tokenizer_of(processor) is processor:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not take pictures, and there are some in this task; use a "
            "vision-language model, loaded with its processor"
        )


def read_on_mlx(model: Any, processor: Any, turn: Turn, cache: Any, chunk: int) -> None:
    """Take in a turn with pictures by a model of mlx-vlm."""
    import mlx.core as mx

    from ..mlx_backend.seeing import Prepared, Seen

    check_sees(model, processor)
    _spans(model, turn.ids, turn.pictures)
    made = {name: mx.array(x) for name, x in _made(processor, turn.pictures, "np").items()}
    seen = Seen(model, Prepared(mx.array([turn.ids]), made.pop("pixel_values"), made))
    # to the last token, in chunks as on torch: the turn is not one that is answered at once
    seen.until = len(turn.ids)
    seen.read(cache, chunk)
    mx.eval([layer.state for layer in cache])


def read_on_torch(model: Any, processor: Any, turn: Turn, cache: Any, chunk: int) -> None:
    """Take in a turn with pictures by a model of transformers."""
    import torch

    from mlx_kvret.cuda_backend.cache import cache_argument

    check_sees(model, processor)
    spans, device = _spans(model, turn.ids, turn.pictures), next(model.parameters()).device
    held, start = cache_argument(model, cache), 0
    typed = "mm_token_type_ids" in inspect.signature(model.forward).parameters
    for end in chunk_ends(len(turn.ids), chunk, spans):
        ids = torch.tensor([turn.ids[start:end]], device=device)
        inside = [p for p, (a, _) in zip(turn.pictures, spans, strict=True) if start <= a < end]
        given = {name: x.to(device) for name, x in _made(processor, inside, "pt").items()} if inside else {}
        if inside and typed:
            marks = torch.tensor(sorted(picture_tokens(model.config)), device=device)
            given["mm_token_type_ids"] = torch.isin(ids, marks).long()
        with torch.no_grad():
            model(ids, use_cache=True, logits_to_keep=1, **given, **held)
        start = end


def _spans(model: Any, ids: Sequence[int], pictures: Sequence[Bitmap]) -> list[tuple[int, int]]:
    spans = runs(ids, picture_tokens(model.config))
    if len(spans) != len(pictures):
        raise ConfigError(
            f"a text has {len(spans)} runs of image tokens and {len(pictures)} pictures; one is expected for "
            "each"
        )
    return spans


def _made(processor: Any, pictures: Sequence[Bitmap], form: str) -> dict[str, Any]:
    found = processor.image_processor(images=[p.image for p in pictures], return_tensors=form)
    return dict(found.items())
