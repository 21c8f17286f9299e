"""The decayed attention in transformers' registries of attention and mask functions.

A model that was switched to :data:`IMPLEMENTATION` calls :func:`_attend` in every attention layer. Its mask
is kept as the arguments of transformers' own mask function and built for one block of queries at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from mlx_kvret.errors import UnsupportedModelError

from .attention import PackedMask, decay_attention

IMPLEMENTATION = "kvret_training"
# where the hook before an attention module leaves its Call
CALL = "_kvret_call"
# arguments of an attention call that change its result in ways the decayed attention does not follow
_UNKNOWN = ("softcap", "position_bias")


@dataclass(frozen=True)
class Call:
    """What an attention call needs beyond its arguments: log β given the KV heads, and the documents."""

    fade: Callable[[int], torch.Tensor | None]
    documents: PackedMask


class _BlockMask:
    """The model's own mask within each document, for one block at a time. Implements ``attention.Mask``."""

    def __init__(self, how: dict[str, Any], documents: PackedMask, window: int | None):
        self._how, self._documents, self._window = how, documents, window
        # some models' layers of one kind look ahead inside of a picture, and those of the other kind do not
        self.ahead = documents.ahead and how.get("mask_function") is not causal_mask_function

    def block(self, queries: range, keys: range) -> torch.Tensor:
        where = {"q_length": len(queries), "q_offset": queries.start}
        where |= {"kv_length": len(keys), "kv_offset": keys.start}
        mask = sdpa_mask(**self._how | where | {"allow_is_causal_skip": False})
        assert mask is not None  # since nothing may be skipped
        # not every model tells its mask where documents begin
        return mask & self._documents.block(queries, keys)

    def first_key(self, queries: range) -> int:
        return self._documents.first_key(queries, self._window)

    def last_key(self, queries: range) -> int:
        return self._documents.last_key(queries) if self.ahead else queries.stop


@dataclass(frozen=True)
class _Deferred:
    """What a mask function would build, kept as its arguments."""

    how: dict[str, Any]


def _defer_mask(**how: Any) -> _Deferred:
    return _Deferred(how)


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    name = type(module).__name__
    if wrong := [argument for argument in _UNKNOWN if others.get(argument) is not None]:
        raise UnsupportedModelError(
            f"{name} uses {', '.join(wrong)} in attention, which training does not follow; use another model"
        )
    if not isinstance(attention_mask, _Deferred) or CALL not in vars(module):
        raise UnsupportedModelError(f"{name} builds its attention mask by hand; use another model")
    call = vars(module).pop(CALL)
    mask = _BlockMask(attention_mask.how, call.documents, sliding_window)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = decay_attention(query, key, value, call.fade(key.shape[1]), mask, scale, sinks=s_aux)
    return out.transpose(1, 2), None


AttentionInterface.register(IMPLEMENTATION, _attend)
AttentionMaskInterface.register(IMPLEMENTATION, _defer_mask)
