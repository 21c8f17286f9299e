"""Processes that hold a model together, by transformers' ``tp_plan``: who, and how they sum."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import distributed
from transformers import PreTrainedModel

from mlx_kvret.core.budget import CacheShape
from mlx_kvret.core.ranks import Ranks
from mlx_kvret.core.shares import Share
from mlx_kvret.core.types import Array, Ints
from mlx_kvret.core.watch import watched
from mlx_kvret.errors import ConfigError, RankError, RankLost, UnsupportedFeatureError, UnsupportedModelError


class TorchRanks(Ranks):
    """The processes of a group of ``torch.distributed``, which computes on ``device``."""

    def __init__(self, group: distributed.ProcessGroup, device: torch.device) -> None:
        super().__init__(distributed.get_rank(group), distributed.get_world_size(group))
        self._group, self._device = group, device

    def _sum(self, counts: Ints) -> Ints:
        summed = torch.from_numpy(counts.copy()).to(self._device)
        with watched("a sum over the ranks"), connected():
            distributed.all_reduce(summed, group=self._group)
            return summed.cpu().numpy()

    def _gather(self, array: Array) -> list[Array]:
        data = torch.from_numpy(array.reshape(-1).view(np.uint8).copy()).to(self._device)
        parts = [torch.empty_like(data) for _ in range(self.size)]
        with watched("arrays of the other ranks"), connected():
            distributed.all_gather(parts, data, group=self._group)
            found = [part.cpu().numpy() for part in parts]
        return [part.view(array.dtype).reshape(array.shape) for part in found]

    def token(self, token: torch.Tensor) -> torch.Tensor:
        """The first rank's tokens (R,), on its device."""
        with watched("a token of the first rank"), connected():
            found = token.clone()
            distributed.broadcast(found, group=self._group, group_src=0)
            return found


def split(how: str) -> Any:
    """What has transformers' loader split a model's heads over the processes there are.

    Raises:
        ConfigError: there is one process.
        UnsupportedFeatureError: layers are split on MLX only; or this transformers cannot.
    """
    if how != "tensor":
        raise UnsupportedFeatureError("layers are split over ranks on MLX only; take parallel='tensor'")
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        raise ConfigError(
            "a model is split over several processes, and there is one; start them with "
            "`torchrun --nproc-per-node 2 ...`"
        )
    try:
        from transformers.distributed import DistributedConfig
    except ImportError as error:
        raise UnsupportedFeatureError(
            "this transformers cannot split a model over ranks; install transformers 5.18 or later"
        ) from error
    return DistributedConfig(tp_plan="auto", tp_size=size)


@contextmanager
def together(share: Share | None, what: str) -> Iterator[None]:
    """Wait for ``what``, which several ranks have a part in where there is a share, and not in vain."""
    if share is None:
        yield
    else:
        with watched(what), connected():
            yield


def patient(run: Callable[[Any, Callable[[], Any]], Any]) -> Callable[[Any, Callable[[], Any]], Any]:
    """A method of a cache that makes a forward pass, watched where several ranks make it."""

    @functools.wraps(run)
    def call(cache: Any, forward: Callable[[], Any]) -> Any:
        with together(cache.share, "a forward pass"):
            return run(cache, forward)

    return call


def tensor_ranks(model: PreTrainedModel) -> TorchRanks | None:
    """Those over which transformers has split the heads, or None.

    Raises:
        UnsupportedModelError: it is split in another way.
    """
    mesh = getattr(model, "_device_mesh", None)
    if mesh is None or mesh.size() == 1:
        return None
    sizes = dict(zip(mesh.mesh_dim_names or ("tp",), mesh.shape, strict=True))
    if other := [name for name, size in sizes.items() if size > 1 and name != "tp"]:
        raise UnsupportedModelError(
            f"the model is split over ranks by {', '.join(other)}; a bounded cache works with tensor "
            "parallelism alone (tp_plan='auto')"
        )
    group = mesh["tp"].get_group() if len(sizes) > 1 else mesh.get_group()
    return TorchRanks(group, model.device)


def is_split(model: PreTrainedModel) -> bool:
    """Whether several processes hold a model."""
    return tensor_ranks(model) is not None


def split_of(model: PreTrainedModel, shape: CacheShape) -> Share | None:
    """This process's share, where several hold the model, by the ``shape`` of what it caches; all must ask.

    Raises:
        UnsupportedModelError: its heads do not divide by the ranks.
    """
    ranks = tensor_ranks(model)
    if ranks is None:
        return None
    text = model.config.get_text_config()
    wanted, found = int(text.num_key_value_heads), shape.kv_heads
    share = Share.tensor(ranks, shape, latent=found == wanted)
    if share.whole.kv_heads != wanted:
        raise UnsupportedModelError(
            f"{model.config.model_type} models cannot be bounded over {ranks.size} ranks: each has {found} "
            f"KV heads, the model {wanted}; use as many ranks as divide them, or one"
        )
    return share


@contextmanager
def connected() -> Iterator[None]:
    """A lost connection is told as such.

    Raises:
        RankLost: another rank is gone.
    """
    try:
        yield
    except RankError:
        raise
    except RuntimeError as error:
        # of torch's transports, which have no class of their own for it
        if not any(name in str(error) for name in ("transport", "NCCL", "ProcessGroup")):
            raise
        reason = str(error).strip().partition("\n")[0].partition(". This is")[0]
        raise RankLost(f"another rank is gone or late ({reason}); start all of them again") from error
