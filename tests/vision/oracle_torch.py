"""What a bounded vision-language model must equal: stock attention over the positions that were kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from mlx_kvret.cuda_backend.cache import BoundedCache, BoundedKVCache, cache_argument

from .tiny_torch import BLOCKS, GRIDS, IMAGE, Picture, prompt, stock_cache

Part = list[int] | Picture
# two turns with a picture each, and words after each
TURNS: list[list[Part]] = [
    [[5, 6, 7, 8, 9], Picture(6, 8, 1), [11, 12, 13, 14]],
    [[15, 16, 17]],
    [[21, 22], Picture(8, 4, 2), [23, 24, 25, 26, 27, 28]],
    *[[[token]] for token in (3, 14, 15, 89, 6, 5)],
]


def calls(name: str, turns: list[list[Part]] = TURNS) -> list[dict[str, Any]]:
    return [prompt(name, parts) for parts in turns]


def whole(name: str, turns: list[list[Part]] = TURNS) -> dict[str, Any]:
    return prompt(name, [part for parts in turns for part in parts])


@torch.no_grad()
def stock_logits(model: PreTrainedModel, name: str, turns: list[list[Part]] = TURNS) -> torch.Tensor:
    """Of one call of the model as it is, (T, vocabulary)."""
    return model(**whole(name, turns), use_cache=False).logits[0]


@torch.no_grad()
def read(
    model: PreTrainedModel,
    cache: Any,
    given: list[dict[str, Any]],
    before: Callable[[Any], None] | None = None,
) -> torch.Tensor:
    """Logits (T, vocabulary) of one call after the other."""
    found = []
    for call in given:
        if before is not None:
            before(cache)
        found.append(model(**call, **cache_argument(model, cache)).logits[0])
    return torch.cat(found)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


class Kept:
    """Attention of competing layers over what was kept before each pass, and the pass by its own rule."""

    def __init__(self) -> None:
        self.passes: list[list[list[np.ndarray[Any, Any]]]] = []
        self.places: list[int] = []
        self.at = -1

    def record(self, cache: BoundedCache) -> None:
        self.passes.append(cache.kept_positions())
        self.places = [at for at, own in enumerate(cache.layers) if isinstance(own, BoundedKVCache)]

    def replay(self, _: Any) -> None:
        self.at += 1

    def attend(
        self, module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: Any = None, **_: Any
    ) -> tuple[torch.Tensor, None]:
        layer, groups = getattr(module, "layer_idx", None), query.shape[1] // key.shape[1]
        count, length = query.shape[2], key.shape[2]
        if layer in self.places and length > 0 and self.at >= 0 and key.shape[1] != query.shape[1]:
            visible = torch.zeros(1, key.shape[1], count, length, dtype=torch.bool)
            for head, kept in enumerate(self.passes[self.at][self.places.index(layer)]):
                visible[0, head, :, torch.from_numpy(kept)] = True
            own = torch.ones(count, count, dtype=torch.bool).tril()
            visible[..., length - count :] = own if mask is None else mask[..., length - count :]
            mask = visible.repeat_interleave(groups, 1)
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scaling, is_causal=False
        )
        return out.transpose(1, 2).contiguous(), None

    @contextmanager
    def used_by(self, model: PreTrainedModel) -> Iterator[None]:
        stock = model.config.get_text_config()._attn_implementation
        AttentionInterface.register("kept", self.attend)
        AttentionMaskInterface.register(
            "kept", lambda **how: sdpa_mask(**how | {"allow_is_causal_skip": False})
        )
        model.get_decoder().set_attn_implementation("kept")
        try:
            yield
        finally:
            model.get_decoder().set_attn_implementation(stock)


def with_positions(
    model: PreTrainedModel, name: str, turns: list[list[Part]] = TURNS
) -> list[dict[str, Any]]:
    """The calls as a stock cache needs them: with the positions, and the types of all tokens before."""
    given, every = calls(name, turns), whole(name, turns)
    ids, begin = every["input_ids"], 0
    if name in GRIDS:
        rule = {n: every[n] for n in ("image_grid_thw", "mm_token_type_ids")}
        positions, _ = model.model.get_rope_index(ids, **rule)
    for call in given:
        end = begin + call["input_ids"].shape[1]
        if name in GRIDS:
            call["position_ids"] = positions[..., begin:end]
        if name in BLOCKS:
            key = "token_type_ids" if name == "gemma3" else "mm_token_type_ids"
            call[key] = (ids[:, :end] == IMAGE).long()
        begin = end
    return given


def expected_logits(
    model: PreTrainedModel, name: str, kept: Kept, turns: list[list[Part]] = TURNS
) -> torch.Tensor:
    """What the positions that were kept before each call give."""
    with kept.used_by(model):
        return read(model, stock_cache(model), with_positions(model, name, turns), kept.replay)
