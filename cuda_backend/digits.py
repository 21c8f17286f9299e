"""Keys of the total order in which entries are kept, in two words, and a selection by counting digits."""

from __future__ import annotations

import math

import numpy as np
import torch

from mlx_kvret.core.config import EvictionConfig
from mlx_kvret.core.eviction import heads_per_group, own_quotas
from mlx_kvret.core.pictures import Pictures
from mlx_kvret.core.ranks import Digit, last_keys, second_word
from mlx_kvret.core.shares import Share
from mlx_kvret.core.types import Ints, Mask

from .kernels.dispatch import select as select_alone
from .selection import ascending_bits, must_stay, select_split


def select(
    score: torch.Tensor,
    position: torch.Tensor,
    head: torch.Tensor,
    seen: int,
    config: EvictionConfig,
    share: Share,
    due: Mask,
    pictures: Pictures = (),
) -> torch.Tensor:
    """As :func:`cuda_backend.selection.select`, of heads that may stand on several ranks, which ask at once.

    ``head`` counts this rank's; ``due`` (groups,) are the groups that select. With the scope ``"modality"``
    as :func:`cuda_backend.selection.select_split`, of one row.
    """
    heads = share.shape.heads
    if share.spread(config):
        must = must_stay(score, position, head, seen, config, heads)
        of_all = config.budget * heads_per_group(config, share.whole.layers, share.whole.kv_heads)
        first = must
        if config.scope == "modality":
            first = must | within_quotas(score, must, position, head, seen, config, share, pictures)
        keep = over_ranks(score, first, position, head, of_all, seen, share, due)
        return keep if config.threshold is None else keep & (must | (score >= math.log(config.threshold)))
    size = heads_per_group(config, share.shape.layers, share.shape.kv_heads)
    if config.scope == "modality":
        keep = select_split(score, position, head, seen, config, heads, pictures)
    else:
        keep = select_alone(score, position, head, seen, config, size, heads)
    if share.copies:
        keep = torch.from_numpy(share.ranks.first_mask(keep.cpu().numpy())).to(keep.device)
    return keep


def over_ranks(
    score: torch.Tensor,
    must: torch.Tensor,
    position: torch.Tensor,
    head: torch.Tensor,
    wanted: int | Ints,
    seen: int,
    share: Share,
    due: Mask,
) -> torch.Tensor:
    """As :func:`mlx_kvret.core.ranks.select`; ``head`` counts this rank's, as many or more is no entry."""
    device, whole = score.device, share.whole
    alive, head = head < share.shape.heads, head.long()
    first = torch.where(alive, ascending_bits(score) + (must.long() << 32) + 1, 0)
    flat = torch.from_numpy(share.heads).to(device).long()[head.clamp(max=share.shape.heads - 1)]
    _, width = second_word(seen, whole.heads)
    second = torch.where(alive, (position.long() << width) + (2**width - 1 - flat), 0)
    groups = len(first)
    base = torch.arange(groups, device=device)[:, None]

    def column(words: Ints) -> torch.Tensor:
        return torch.from_numpy(words.astype(np.int64)).to(device)[:, None]

    def count(digit: Digit, prefix: tuple[Ints, Ints]) -> Ints:
        word, end = (first, second)[digit.word], digit.shift + digit.bits
        inside = alive & ((word >> end) == column(prefix[digit.word]))
        if digit.word:
            inside &= first == column(prefix[0])
        place = ((word >> digit.shift) & (2**digit.bits - 1)) + (base << digit.bits)
        counts = torch.zeros(groups << digit.bits, dtype=torch.int32, device=device)
        counts.index_add_(0, place.flatten(), inside.flatten().int())
        return counts.view(groups, -1).cpu().numpy()

    lowest = last_keys(count, wanted, due, seen, whole.heads, share.ranks)
    low, lower = (column(words) for words in lowest)
    return alive & ((first > low) | ((first == low) & (second >= lower)))


def within_quotas(
    score: torch.Tensor,
    must: torch.Tensor,
    position: torch.Tensor,
    head: torch.Tensor,
    seen: int,
    config: EvictionConfig,
    share: Share,
    pictures: Pictures,
) -> torch.Tensor:
    """The best candidates, of all ranks, of text and of pictures, as many as each one's quota, (1, N)."""
    marked, most = own_quotas(pictures, seen, config, share.whole.heads)
    quota, none = np.array(most), share.shape.heads
    seeing = torch.from_numpy(marked).to(score.device)[position.long().clamp(0, seen - 1)]
    open_to_all = (head < none) & ~must
    own = torch.cat([open_to_all & ~seeing, open_to_all & seeing])
    twice = [array.repeat(2, 1) for array in (score, position, head)]
    heads = torch.where(own, twice[2], none)
    # a group that is not due keeps everything
    some = quota > 0
    best = over_ranks(twice[0], torch.zeros_like(own), twice[1], heads, quota, seen, share, some)
    return (best & torch.from_numpy(some).to(best.device)[:, None]).any(0, keepdim=True)
