"""Processes that hold a model together, by mlx-lm's ``shard`` or ``pipeline``: who, and how they sum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import generation_stream

from ..core.budget import CacheShape
from ..core.ranks import Ranks
from ..core.shares import Share
from ..core.types import Array, Ints
from ..core.watch import watched
from ..errors import ConfigError, UnsupportedModelError

_SHARDED = (
    nn.AllToShardedLinear,
    nn.ShardedToAllLinear,
    nn.QuantizedAllToShardedLinear,
    nn.QuantizedShardedToAllLinear,
)


class MLXRanks(Ranks):
    """The processes of a group of ``mx.distributed``."""

    def __init__(self, group: Any) -> None:
        super().__init__(group.rank(), group.size())
        self._group = group

    def _sum(self, counts: Ints) -> Ints:
        with watched("a sum over the ranks"):
            drain()
            summed = mx.distributed.all_sum(mx.array(counts), group=self._group, stream=mx.cpu)
            # by itself np.array would take what is there when a connection is lost, and say nothing
            mx.eval(summed)
            return np.array(summed)

    def _gather(self, array: Array) -> list[Array]:
        # in words of a type that every transport knows
        data = np.zeros((-(-array.nbytes // 4), 4), np.uint8)
        data.reshape(-1)[: array.nbytes] = array.reshape(-1).view(np.uint8)
        words = mx.array(data.reshape(-1).view(np.int32))[None]
        with watched("arrays of the other ranks"):
            drain()
            gathered = mx.distributed.all_gather(words, group=self._group, stream=mx.cpu)
            mx.eval(gathered)
            all_of_it = np.array(gathered)
        parts = (np.ascontiguousarray(row).view(np.uint8)[: array.nbytes] for row in all_of_it)
        return [part.view(array.dtype).reshape(array.shape) for part in parts]

    def token(self, token: mx.array) -> mx.array:
        """The first rank's tokens (R,), in the graph of whatever pass it is of."""
        own = token * mx.array(self.rank == 0, token.dtype)
        return mx.distributed.all_sum(own, group=self._group)


def split(model: nn.Module, how: str) -> None:
    """Split a model that has no hooks over the processes there are: ``"tensor"`` its heads, else its layers.

    Raises:
        ConfigError: there is one process.
        UnsupportedModelError: mlx-lm does not split this model so, or not over so many.
    """
    group, name = mx.distributed.init(), getattr(model, "model_type", "these")
    if group.size() == 1:
        raise ConfigError(
            "a model is split over several processes, and there is one; start them with "
            "`mlx.launch -n 2 python ...`"
        )
    stack = getattr(model, "model", None)
    if not hasattr(*((model, "shard") if how == "tensor" else (stack, "pipeline"))):
        raise UnsupportedModelError(
            f"mlx-lm does not split {name} models by {'heads' if how == 'tensor' else 'layers'}; split by "
            "the other, or take one machine"
        )
    heads, latent = _config(model, "num_key_value_heads"), _config(model, "kv_lora_rank")
    if how == "tensor" and heads and not latent and heads % group.size():
        raise UnsupportedModelError(
            f"the model has {heads} KV heads, which {group.size()} processes cannot share evenly; start as "
            "many as divide them, or split by layers (pipeline)"
        )
    if how == "tensor":
        model.shard(group)
    elif len(model.layers) < group.size():
        raise UnsupportedModelError(f"{group.size()} processes cannot share {len(model.layers)} layers")
    else:
        stack.pipeline(group)  # type: ignore[union-attr]
    mx.eval(model.parameters())


def drain() -> None:
    """Wait until no pass exchanges anything: on CPUs each stream does so by itself, in any order."""
    mx.synchronize(generation_stream)
    mx.synchronize()


@dataclass(frozen=True)
class Split:
    """This process's share of a model; where layers are split, the ``places`` of all ranks' that compete too.

    ``layers`` are those of the whole model.
    """

    share: Share
    places: tuple[int, ...] = ()
    layers: int = 0


def split_of(
    model: nn.Module, shape: CacheShape, latent: bool, places: Sequence[int], name: str
) -> Split | None:
    """How several processes hold a model, or None; all must ask.

    Args:
        shape, places: what this one caches, and in which of its layers.
        latent: whether its attention computes on what is cached, of which then each rank has all.

    Raises:
        UnsupportedModelError: it is not split as mlx-lm's models are.
    """
    tensor, stage = _tensor_ranks(model), _stage(model)
    if tensor is None and stage is None:
        return None
    if tensor is not None and stage is not None:
        raise UnsupportedModelError(
            "the model is split by heads and by layers too; use one of model.shard and model.model.pipeline"
        )
    if tensor is not None:
        share = Share.tensor(tensor, shape, latent)
        heads = _config(model, "num_key_value_heads")
        if not share.copies and heads != share.whole.kv_heads:
            raise UnsupportedModelError(
                f"{name} models cannot be bounded over {tensor.size} ranks: each has {shape.kv_heads} "
                f"KV heads, the model {heads}; use as many ranks as divide them, or one"
            )
        return Split(share)
    group = mx.distributed.init()
    if (group.rank(), group.size()) != (stage.pipeline_rank, stage.pipeline_size):
        raise UnsupportedModelError(
            f"the model's layers are split over {stage.pipeline_size} ranks of the {group.size()} that there "
            "are; split them over all"
        )
    ranks = MLXRanks(group)
    share, all_places = Share.pipeline(ranks, shape, [stage.start_idx + index for index in places])
    # the first rank has the last layers
    layers = max(int(count[0]) for count in ranks.gather(np.array([len(stage.layers)], np.int32)))
    return Split(share, tuple(all_places), layers)


def is_split(model: nn.Module) -> bool:
    """Whether several processes hold a model."""
    return _tensor_ranks(model) is not None or _stage(model) is not None


def _tensor_ranks(model: nn.Module) -> MLXRanks | None:
    """Those over which ``model.shard`` has split the heads, or None."""
    found = (module.group for module in model.modules() if isinstance(module, _SHARDED))
    return next((MLXRanks(group) for group in found if group.size() > 1), None)


def _stage(model: nn.Module) -> Any:
    """The part of the model whose layers ``pipeline`` has split, or None."""
    return next((module for module in model.modules() if getattr(module, "pipeline_size", 1) > 1), None)


def _config(model: nn.Module, name: str) -> Any:
    args = getattr(model, "args", None)
    return getattr(args, name, None) or getattr(args, "text_config", {}).get(name)
