"""Serving on torch."""

from __future__ import annotations

import copy
from typing import Any

import torch

from mlx_kvret.cuda_backend import hooks, snapshots
from mlx_kvret.cuda_backend.attaching import make_cache
from mlx_kvret.cuda_backend.batch import BatchGenerator
from mlx_kvret.cuda_backend.cache import BoundedCache, cache_argument
from mlx_kvret.cuda_backend.generation import stop_tokens, vocabulary
from mlx_kvret.cuda_backend.memory import free_bytes
from mlx_kvret.cuda_backend.sampling import alone

from ..core.snapshot import Snapshot
from ..core.types import Array
from ..errors import UnsupportedFeatureError
from .channels import Plain, Splitter
from .drawing import Drawer, Drawing


class OnTorch:
    """As :class:`.backend.Backend`."""

    def __init__(self, model: Any, tokenizer: Any, options: dict[str, Any]) -> None:
        self.model, self._options = model, options
        first = make_cache(model, **options)
        made = hooks.attachment(model)
        assert made is not None and first.shared is not None
        self.shape, self.eviction = made.layout.shape, first.shared.config
        self.identity = first.identity
        self.vocabulary = vocabulary(model)
        self.batches = _batches(first)
        self.ends = frozenset(stop_tokens(model, tokenizer))

    def new_cache(self, budget: int | None) -> BoundedCache:
        own = {} if budget is None else {"budget": budget}
        return make_cache(self.model, **(self._options | own))

    def copy(self, cache: BoundedCache) -> BoundedCache:
        # in arrays of its own, which go with it
        return copy.deepcopy(cache)

    @torch.no_grad()
    def read(self, cache: BoundedCache, ids: list[int]) -> None:
        given = torch.tensor([ids], device=self.model.device)
        self.model(given, **cache_argument(self.model, cache), logits_to_keep=1)

    @torch.no_grad()
    def logprobs(self, cache: BoundedCache, token: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(token[:, None], **cache_argument(self.model, cache)).logits[:, -1]
        return logits.float().log_softmax(-1)

    def chooser(self, asked: Drawing) -> Any:
        if asked.greedy:
            return greedy
        if asked.plain:
            return alone(asked.sampling)
        draw = Drawer(asked)
        return lambda logprobs: self.array(draw(self.host(logprobs[0])))

    def host(self, logprobs: torch.Tensor) -> Array:
        return logprobs.float().cpu().numpy()

    def array(self, token: int) -> torch.Tensor:
        return torch.tensor([token], device=self.model.device)

    def generator(self, rows: int) -> BatchGenerator:
        return BatchGenerator(self.model, completion_batch_size=rows, prefill_batch_size=rows)

    def single(self, found: Any) -> BoundedCache:
        return copy.deepcopy(found[0])

    def take(self, cache: BoundedCache) -> Snapshot:
        return snapshots.take(cache, {})

    def reopen(self, snapshot: Snapshot) -> BoundedCache:
        return hooks.reopened_cache(self.model, snapshot)

    def splitter(self, tokenizer: Any, ids: list[int], tools: list[dict[str, Any]] | None) -> Splitter:
        return Plain()

    def free_bytes(self) -> int | None:
        return free_bytes(self.model.device)


def _batches(cache: BoundedCache) -> bool:
    """Whether caches such as this one can stand in a batch."""
    try:
        cache.check_clocks()
    except UnsupportedFeatureError:
        return False
    return True


def greedy(logprobs: torch.Tensor) -> torch.Tensor:
    return logprobs.argmax(-1)
