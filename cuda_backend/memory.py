"""Out of memory, explained: which chunk of the prompt or which budget would fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from transformers import PreTrainedModel

from mlx_kvret.core.budget import tokens_within
from mlx_kvret.core.chunks import does_not_fit, largest_chunk
from mlx_kvret.core.machine import free_host_bytes
from mlx_kvret.errors import ConfigError

from .cache import BoundedCache, cache_argument


def free_bytes(device: torch.device) -> int | None:
    """Free memory of a device; None where it cannot be told."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else free_host_bytes()


def out_of_memory(error: Exception) -> bool:
    """Whether a device or the machine refused an allocation; the CPU's error has no type of its own."""
    own = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return own or "can't allocate memory" in str(error)


@contextmanager
def explained(model: PreTrainedModel, cache: BoundedCache, ids: torch.Tensor, chunk: int) -> Iterator[None]:
    """Turn running out of memory into an error that helps; the cache stays as it was before the pass.

    ``ids`` (1, n) are read in chunks of ``chunk`` tokens.

    Raises:
        OutOfMemoryError: with a chunk that was tried and fits, or else with a budget.
    """
    try:
        yield
        return
    except Exception as error:
        if not out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0]
    # outside the handler, whose traceback would keep the tensors of the pass
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
    size = min(chunk, ids.shape[1])
    fits = None if cache.in_place else largest_chunk(size, partial(_fits, model, cache, ids))
    raise does_not_fit(size, cache.seen, reason, fits, _budget_advice(model, cache))


def _fits(model: PreTrainedModel, cache: BoundedCache, ids: torch.Tensor, size: int) -> bool:
    """Whether so many tokens can be read now."""
    try:
        with torch.no_grad(), cache.trial():
            model(ids[:, :size], **cache_argument(model, cache), logits_to_keep=1)
    except Exception as error:
        if not out_of_memory(error):
            raise
        return False
    return True


def _budget_advice(model: PreTrainedModel, cache: BoundedCache) -> str:
    if model.device.type != "cuda" or cache.shared is None:
        return "lower the budget"
    free, _ = torch.cuda.mem_get_info(model.device)
    shape, rows, bits = cache.shared.shape, max(1, cache.rows), cache.shared.config.kv_bits
    # a compaction holds the pool once more while it grows
    room = (free + cache.nbytes) // (2 * rows)
    try:
        return f"a budget of {tokens_within(room, shape, None, bits)} tokens per head would fit"
    except ConfigError:
        return "the model leaves no room for a cache; load it in fewer bits"
