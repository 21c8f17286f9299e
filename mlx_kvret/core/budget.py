"""Budgets as memory: what a cache of a given shape and budget costs, and which budget fits in "256MB"."""

from __future__ import annotations

import re
from dataclasses import dataclass
from numbers import Integral

from ..errors import ConfigError
from .bits import KVBits, packings
from .config import EvictionConfig
from .eviction import heads_per_group
from .options import short

# per kept entry: log β, position, owner and slot list, 4 bytes each
BOOKKEEPING = 16
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class CacheShape:
    """What decides how many bytes an entry takes. ``key_dim`` and ``value_dim`` differ for MLA models."""

    layers: int
    kv_heads: int
    key_dim: int
    value_dim: int
    itemsize: int
    hidden_size: int

    @property
    def heads(self) -> int:
        return self.layers * self.kv_heads

    @property
    def entry_bytes(self) -> int:
        """Keys and values of one token in one KV head."""
        return (self.key_dim + self.value_dim) * self.itemsize

    def kept_bytes(self, kv_bits: KVBits) -> int:
        """Keys and values of one kept entry: the same, or as packed words.

        Raises:
            UnsupportedFeatureError: bits that these heads cannot have.
        """
        packed = packings(kv_bits, self.key_dim, self.value_dim)
        return self.entry_bytes if packed is None else 4 * sum(one.words(self.itemsize) for one in packed)

    def counted(self, kept: int, newest: int, kv_bits: KVBits) -> int:
        """Bytes of so many kept entries, and of the newest ones beside them, which are no words."""
        return kept * (self.kept_bytes(kv_bits) + BOOKKEEPING) + newest * (self.entry_bytes + BOOKKEEPING)

    def deferred(self, budget: int, buffer: int, kv_bits: KVBits = None) -> int:
        """g: how many tokens' gate inputs may wait, so that they stay within 4 % of the cache.

        Reading the gates once per g tokens makes their traffic vanish; the waiting inputs cost
        g·hidden·L·itemsize, more than K and V themselves where heads are few.
        """
        cached = budget * self.kept_bytes(kv_bits) + buffer * self.entry_bytes
        room = 0.04 * cached * self.kv_heads
        return max(1, min(32, buffer, int(room // (self.hidden_size * self.itemsize))))

    def nbytes(
        self, budget: int, buffer: int, kv_bits: KVBits = None, groups: int = 1, spare: int = 0
    ) -> int:
        """Most bytes a cache of M = ``budget`` and B = ``buffer`` takes once prefill is over.

        Each of the ``groups`` of heads that compete has a slot for what is not kept; ``spare`` tokens per
        head more have room where groups are out of step (:meth:`held_by`).
        """
        waiting = self.deferred(budget, buffer, kv_bits) * self.hidden_size * self.itemsize * self.layers
        entry = self.kept_bytes(kv_bits) + BOOKKEEPING
        # the last slots are in no head's list, and every head's list has a beginning and the last an end
        kept = (budget + spare) * self.heads * entry + groups * (entry - 4) + 4 * (self.heads + 1)
        return kept + buffer * self.heads * (self.entry_bytes + 4) + waiting

    def held_by(self, config: EvictionConfig) -> int:
        """As :meth:`nbytes`, of a cache with these options."""
        groups = self.heads // heads_per_group(config, self.layers, self.kv_heads)
        spare = config.buffer if config.threshold is not None and groups > 1 else 0
        # a threshold may leave B tokens in the window when one more comes
        buffer = config.buffer + (config.threshold is not None)
        return self.nbytes(config.budget, buffer, config.kv_bits, groups, spare)

    def full_nbytes(self, tokens: int) -> int:
        """Bytes of a full cache of that many tokens."""
        return tokens * self.heads * self.entry_bytes


def parse_budget(text: str | int) -> tuple[int | None, int | None]:
    """``"1024"`` or 1024 to (tokens per KV head, None); ``"256MB"`` to (None, bytes)."""
    if isinstance(text, Integral) and not isinstance(text, bool) and text >= 1:
        return int(text), None
    if isinstance(text, (Integral, float)) and not isinstance(text, bool):
        text = short(text)
    match = isinstance(text, str) and re.fullmatch(
        r"\s*([-+]?\d{1,30}(?:\.\d{1,15})?)\s*([KMG]I?B|B)?\s*", text.upper(), re.ASCII
    )
    if not match:
        raise ConfigError(
            f"budget {short(text)} is neither tokens per head (1024) nor memory ('256MB', '1.5GiB')"
        )
    number, unit = match.groups()
    if unit is None and "." in number:
        raise ConfigError(f"budget {text!r} is no whole number of tokens; write 1024, or a size like 256MB")
    amount = int(float(number) * _UNITS[unit]) if unit else int(number)
    if amount < 1:
        raise ConfigError(f"budget is {text}; expected at least 1 token per KV head, or a size like 256MB")
    return (None, amount) if unit else (amount, None)


def tokens_within(size: int, shape: CacheShape, buffer: int | None, kv_bits: KVBits = None) -> int:
    """The largest M whose cache (with its buffer, by default M/8) takes at most ``size`` bytes.

    Raises:
        ConfigError: not even one token per head fits.
    """

    def cost(budget: int) -> int:
        return shape.nbytes(budget, max(1, budget // 8) if buffer is None else buffer, kv_bits)

    if cost(1) > size:
        raise ConfigError(
            f"a budget of {size:,} bytes is too small: this model needs {cost(1):,} bytes for one token per "
            f"KV head and its buffer; give at least that"
        )
    low, high = 1, 2
    while cost(high) <= size:
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) <= size else (low, middle)
    return low
