"""Which budgets, and how many conversations, fit into a memory: arithmetic alone, nothing is allocated."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from ..errors import ConfigError
from .bits import KVBits
from .budget import CacheShape, parse_budget, tokens_within
from .config import MOST_TOKENS
from .options import short, whole

# how much more than its mean a machine may come to hold
UNEVEN = 1.5
_UNITS = {"": 1, "K": 2**10, "M": 2**20}


@dataclass(frozen=True)
class Row:
    """One way to keep a conversation.

    ``budget`` is in tokens per KV head, None for the full cache; ``nbytes`` what the keys and values of one
    conversation take once its text is read, ``conversations`` how many such fit side by side. ``sound`` says
    whether the gates were found sound at this budget, None where they say nothing of that.
    """

    budget: int | None
    nbytes: int
    conversations: int
    sound: bool | None = None


@dataclass(frozen=True)
class Plan:
    """What fits: ``room`` bytes for conversations of ``context`` tokens, the full cache, and bounded ones.

    ``largest`` is the largest budget of which as many conversations fit as were asked for; None where the
    full cache fits or where nothing does.
    """

    room: int
    context: int
    conversations: int
    full: Row
    bounded: tuple[Row, ...]
    largest: Row | None


def plan(
    shape: CacheShape,
    memory: int,
    weights: int,
    context: int,
    conversations: int = 1,
    chunk: int = 2048,
    smallest: int | None = None,
    kv_bits: KVBits = None,
    machines: int = 1,
) -> Plan:
    """What fits into a memory.

    Args:
        machines: how many hold the model together, each with that memory; sizes are those of one. A selection
            over all of them fills some more than others, so that each has room for 1.5 times its mean.
        shape: what the layers of the model that can be bounded cache.
        memory: bytes for the weights, the caches, and the text that is being read.
        weights: bytes of the weights.
        context: tokens of a conversation.
        conversations: how many are wanted side by side.
        chunk: tokens read in one forward pass; one conversation reads at a time, and holds them beside its
            budget until the pass is over.
        smallest: the smallest budget at which the gates were found sound.
        kv_bits: of kept keys and values, as of :class:`~.config.EvictionConfig`; a full cache has none.

    Raises:
        ConfigError: the weights do not fit, with the memory that is needed.
        UnsupportedFeatureError: bits that the model's heads cannot have.
    """
    whole("context", context, 1, MOST_TOKENS)
    whole("conversations", conversations, 1, MOST_TOKENS)
    whole("machines", machines, 1, MOST_TOKENS)
    spare = 1.0 if machines == 1 else UNEVEN / machines
    weights = -(-weights // machines)
    taken = weights + shape.full_nbytes(min(chunk, context)) // machines
    if taken + spare * shape.nbytes(1, 1, kv_bits) > memory:
        raise ConfigError(
            f"the weights take {size(weights)}, and {size(taken - weights)} go to the text that is being "
            f"read, of {size(memory)} of memory; nothing is left for a cache: take a smaller model or one in "
            "fewer bits, or give more memory"
        )
    room = memory - taken

    def row(budget: int | None) -> Row:
        buffer = 0 if budget is None else max(1, budget // 8)
        if budget is None:
            nbytes = -(-shape.full_nbytes(context) // machines)
        else:
            nbytes = math.ceil(spare * shape.nbytes(budget, buffer, kv_bits))
        sound = None if smallest is None or budget is None else budget >= smallest
        return Row(budget, nbytes, room // nbytes, sound)

    full = row(None)
    # a larger one would never evict
    most = max(1, context * 8 // 9)
    budgets = {2**n for n in range(8, most.bit_length())} | ({smallest} if smallest else set())
    bounded = tuple(row(budget) for budget in sorted(budgets) if budget <= most)
    largest = None
    share = int(room // conversations / spare)
    if full.conversations < conversations and shape.nbytes(1, 1, kv_bits) <= share:
        largest = row(min(tokens_within(share, shape, None, kv_bits), most))
    return Plan(room, context, conversations, full, bounded, largest)


def parse_memory(text: str) -> int:
    """``"16GB"`` as bytes.

    Raises:
        ConfigError: no size with a unit.
    """
    try:
        _, found = parse_budget(text)
    except ConfigError:
        found = None
    if found is None:
        raise ConfigError(f"the memory is {short(text)}; expected a size such as 16GB, 11.5GiB or 800MB")
    return found


def parse_tokens(text: str) -> int:
    """``"131072"`` or ``"128k"`` (of 1,024) as a number of tokens.

    Raises:
        ConfigError: neither.
    """
    match = re.fullmatch(r"\s*(\d{1,12})\s*([KM]?)\s*", text.upper(), re.ASCII)
    if match is None:
        raise ConfigError(f"the context is {short(text)}; expected tokens such as 131072 or 128k")
    found = int(match[1]) * _UNITS[match[2]]
    whole("the context", found, 1, MOST_TOKENS)
    return found


def size(nbytes: int) -> str:
    """Bytes for people: three digits that count, in MB or GB."""
    value, unit = (nbytes / 1e9, "GB") if nbytes >= 1e9 else (nbytes / 1e6, "MB")
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{digits}f} {unit}"
