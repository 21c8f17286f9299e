"""What the reference engine keeps in each layer, and how it scores and selects: torch, many texts at once.

The entries of a layer stand in (B, H, C): B texts, H KV heads, C places of which some may be empty.
The rule is that of :func:`mlx_kvret.core.eviction.select`, text by text.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn import functional as F

from ..core.config import EvictionConfig
from ..core.eviction import quotas
from ..core.policies import random_score
from ..errors import ConfigError
from .methods import Method

KERNEL = 5
_BITS = 30


@dataclass
class Entries:
    """``keys`` and ``values`` (B, H, C, D); the others (B, H, C). ``attention`` is what was paid so far."""

    keys: torch.Tensor
    values: torch.Tensor
    log_beta: torch.Tensor
    position: torch.Tensor
    attention: torch.Tensor
    valid: torch.Tensor

    def joined(self, new: Entries) -> Entries:
        """These entries, then new ones."""
        names = [field.name for field in dataclasses.fields(self)]
        return Entries(*(torch.cat([getattr(self, name), getattr(new, name)], 2) for name in names))

    def keep(self, mask: torch.Tensor) -> Entries:
        """The entries of ``mask`` (B, H, C), in order, moved together."""
        texts, heads, count = mask.shape
        width = int(mask.sum(2).max())
        first = (~mask).to(torch.uint8).sort(dim=2, stable=True).indices[:, :, :width]
        rows = torch.arange(0, mask.numel(), count, device=mask.device).view(texts, heads, 1) + first
        # whole rows are copied at once, many times faster than a gather along an expanded index
        wide = (part.flatten(0, 2).index_select(0, rows.flatten()) for part in (self.keys, self.values))
        narrow = (self.log_beta, self.position, self.attention, mask)
        return Entries(
            *(part.view(texts, heads, width, part.shape[-1]) for part in wide),
            *(part.gather(2, first) for part in narrow),
        )


def is_due(layers: list[Entries], config: EvictionConfig) -> bool:
    """Whether any group of any text has reached (M + B) entries per head."""
    held = torch.stack([entries.valid.sum(2) for entries in layers], 1)
    size = _heads_per_group(layers, config)
    groups = held.flatten(1).unflatten(1, (-1, size)).sum(2)
    return bool((groups >= (config.budget + config.buffer) * size).any())


def observed(queries: torch.Tensor, entries: Entries, seen: int, scale: float) -> torch.Tensor:
    """What a text's last queries (B, Hq, w, D) pay to each entry held now, summed, (B, H, C)."""
    texts, heads, count = entries.valid.shape
    own = torch.arange(seen - queries.shape[2], seen, device=queries.device)
    hidden = ~entries.valid[:, :, None] | (entries.position[:, :, None] > own[:, None])
    logits = queries.float().reshape(texts, heads, -1, queries.shape[3]) @ entries.keys.float().mT * scale
    logits = logits.view(texts, heads, -1, len(own), count)
    # a query that sees nothing any more pays nothing
    logits = logits.masked_fill(hidden[:, :, None], torch.finfo(torch.float32).min)
    return logits.softmax(-1).masked_fill(hidden[:, :, None], 0.0).sum((2, 3))


def _heads_per_group(layers: list[Entries], config: EvictionConfig) -> int:
    heads = layers[0].valid.shape[1]
    return {"layer": heads, "head": 1}.get(config.scope, len(layers) * heads)


def evict(
    layers: list[Entries],
    method: Method,
    config: EvictionConfig,
    seen: int,
    useful: torch.Tensor,
    pictured: torch.Tensor,
) -> list[Entries]:
    """One compaction of every group that is due.

    Args:
        layers: entries of each layer.
        seen: tokens seen so far.
        useful: (B, T) marks positions that hold an answer; only the oracle looks.
        pictured: (B, T) marks positions that are a picture's; only the scope ``modality`` looks.
    """
    heads, size = layers[0].valid.shape[1], _heads_per_group(layers, config)
    parts = [
        _candidates(entries, layer, method, config, seen, useful, pictured)
        for layer, entries in enumerate(layers)
    ]
    if config.scope in ("global", "modality"):
        joined = Candidates(*(torch.cat(arrays, 1) for arrays in zip(*parts, strict=True)))
        kept = select(joined, seen, config, size).split([part.valid.shape[1] for part in parts], 1)
    else:
        rows = heads // size
        split = [Candidates(*(x.reshape(len(x) * rows, -1) for x in part)) for part in parts]
        kept = tuple(select(part, seen, config, size) for part in split)
    masks = [mask.reshape(entries.valid.shape) for mask, entries in zip(kept, layers, strict=True)]
    return [entries.keep(mask) for entries, mask in zip(layers, masks, strict=True)]


class Candidates(NamedTuple):
    """Entries in rows of those that compete, one row per text and group; all (rows, N).

    ``head`` is the flat head; places where ``valid`` is false hold no entry; ``pictured`` ones are a
    picture's.
    """

    score: torch.Tensor
    position: torch.Tensor
    head: torch.Tensor
    valid: torch.Tensor
    pictured: torch.Tensor


def select(found: Candidates, seen: int, config: EvictionConfig, size: int) -> torch.Tensor:
    """Which entries stay, (rows, N); ``size`` heads compete in a row."""
    score, position, head, valid, pictured = found
    heads = int(head.max()) + 1
    if seen * heads >= 1 << _BITS:
        raise ConfigError(f"{seen} tokens in {heads} heads are too many to rank here; use another backend")
    must = (position < config.sinks) | (position >= seen - config.window)
    # unique keys: no two entries of a row share position and head, so that the n-th largest cuts exactly
    tie = position * heads + (heads - 1 - head)
    key = (_ascending_bits(score) << _BITS) + tie
    if config.min_per_head:
        first = must
        for index in torch.unique(head).tolist():
            own = torch.where(valid & (head == index), key + (must.long() << 32 + _BITS), -1)
            first = first | ((own >= _nth(own, config.min_per_head)) & (own >= 0))
        must = first
    first = must
    if config.scope == "modality":
        first = must | _within_quotas(key, must, valid, pictured, config, size)
    key = torch.where(valid, key + (first.long() << 32 + _BITS), -1)
    keep = (key >= _nth(key, config.budget * size)) & valid
    if config.threshold is not None:
        keep = keep & (must | (score >= math.log(config.threshold)))
    due = valid.sum(1, keepdim=True) >= (config.budget + config.buffer) * size
    return torch.where(due, keep, valid)


def _within_quotas(
    key: torch.Tensor,
    must: torch.Tensor,
    valid: torch.Tensor,
    pictured: torch.Tensor,
    config: EvictionConfig,
    size: int,
) -> torch.Tensor:
    """The best unprotected entries of text and of pictures, as many as the quota of each, (rows, N)."""
    kinds = (valid & ~pictured, valid & pictured)
    guarded = torch.stack([(kind & must).sum(1) for kind in kinds], 1).tolist()
    quota = torch.tensor([quotas((text, seen), config, size) for text, seen in guarded], device=key.device)
    first = torch.zeros_like(must)
    for index, kind in enumerate(kinds):
        own = torch.where(kind & ~must, key, -1)
        n = quota[:, index : index + 1]
        least = own.sort(1, descending=True).values.gather(1, (n - 1).clamp(0, own.shape[1] - 1))
        first = first | ((own >= least) & (own >= 0) & (n > 0))
    return first


def _nth(key: torch.Tensor, n: int) -> torch.Tensor:
    """The n-th largest of each row, (rows, 1); the smallest if there are fewer."""
    n = min(n, key.shape[1])
    return key.kthvalue(key.shape[1] - n + 1, dim=1, keepdim=True).values


def _ascending_bits(score: torch.Tensor) -> torch.Tensor:
    """float32 to int64 in [0, 2^32) of the same order; NaN counts as the lowest, -0 as 0."""
    score = torch.where(score.isnan(), -math.inf, score.float()) + 0.0
    bits = score.view(torch.int32).long()
    # the bits of negative numbers ascend as the numbers fall
    return torch.where(bits < 0, -1 - (bits & 0x7FFFFFFF), bits) + (1 << 31)


def _candidates(
    entries: Entries,
    layer: int,
    method: Method,
    config: EvictionConfig,
    seen: int,
    useful: torch.Tensor,
    pictured: torch.Tensor,
) -> Candidates:
    """A layer's entries in one row per text."""
    heads = entries.valid.shape[1]
    head = (layer * heads + torch.arange(heads, device=entries.valid.device))[None, :, None]
    scores = score(entries, method, config, seen, useful, head)
    places = entries.position.flatten(1)
    own = pictured.gather(1, places).view_as(entries.position)
    arrays = (scores, entries.position, head.expand_as(entries.valid), entries.valid, own)
    return Candidates(*(array.flatten(1) for array in arrays))


def score(
    entries: Entries,
    method: Method,
    config: EvictionConfig,
    seen: int,
    useful: torch.Tensor,
    head: torch.Tensor,
) -> torch.Tensor:
    """The score of every entry under a method, (B, H, C) float32, higher is kept longer."""
    position = entries.position
    if method.policy == "learned":
        return (seen + 1 - position).float() * entries.log_beta + _look_ahead(entries, config.lookahead)
    if method.policy == "knorm":
        return -entries.keys.float().norm(dim=-1)
    if method.policy == "keydiff":
        unit = F.normalize(entries.keys.float(), dim=-1, eps=1e-12)
        mean = F.normalize((unit * entries.valid[..., None]).sum(2, keepdim=True), dim=-1, eps=1e-12)
        return -(unit * mean).sum(-1)
    if method.policy == "random":
        return _random(position, head, config.policy_seed)
    if method.policy == "h2o":
        return entries.attention
    if method.policy == "snapkv":
        return F.max_pool1d(entries.attention * entries.valid, KERNEL, 1, KERNEL // 2)
    if method.policy == "oracle":
        places = position.flatten(1)
        return (useful.gather(1, places).view_as(position) * (1 << 22) + position).float()
    return position.float()


def _look_ahead(entries: Entries, terms: int) -> torch.Tensor | float:
    if terms == 1:
        return 0.0
    flat = entries.log_beta.abs() < 1e-30
    safe = torch.where(flat, -1.0, entries.log_beta)
    return torch.where(flat, float(terms), (terms * safe).expm1() / safe.expm1()).log()


def _random(position: torch.Tensor, head: torch.Tensor, seed: int) -> torch.Tensor:
    drawn = random_score(position.cpu().numpy(), head.expand_as(position).cpu().numpy(), seed)
    return torch.from_numpy(drawn).to(position.device)
