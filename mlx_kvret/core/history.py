"""What went when: the entries that each compaction took, and how much of every token is left.

An entry that was evicted never comes back, so one number for each token and head says it all: the compaction
that took the entry, or that it is still there.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np

from ..errors import ConfigError
from .budget import CacheShape
from .config import EvictionConfig
from .pictures import Picture
from .types import Array, Ints

# of an entry that no compaction took
KEPT = np.iinfo(np.int32).max


@dataclass(frozen=True)
class Moment:
    """A sequence of which ``seen`` tokens are read: it holds ``entries`` in ``nbytes`` bytes."""

    seen: int
    entries: int
    nbytes: int


class History:
    """The entries of one sequence, followed from compaction to compaction.

    ``compactions`` are the moments after each that took something, ``now`` is the last one. ``gone`` (L·H, n)
    is the number of the compaction that took the entry of a flat head and a token, else KEPT.
    """

    def __init__(self, layers: int, kv_heads: int) -> None:
        self.layers, self.kv_heads = layers, kv_heads
        self.compactions: list[Moment] = []
        self.now = Moment(0, 0, 0)
        self._room = np.full((layers * kv_heads, 0), KEPT, np.int32)
        # flat heads and positions of what was there when one looked last, at so many tokens
        self._head: Ints = np.zeros(0, np.int64)
        self._position: Ints = np.zeros(0, np.int64)
        self._looked = 0

    @property
    def gone(self) -> Ints:
        return self._room[:, : self.now.seen]

    def follow(self, cache: Any) -> None:
        """Take in what has happened to a cache of one sequence, which compacted at most once meanwhile.

        Where several tokens were read at once, or the history begins with a cache that has a past, what went
        in between counts as one compaction. Costs nothing to speak of while nothing went.
        """
        moment = Moment(int(cache.seen), int(cache.entries), int(cache.nbytes))
        before = self.now
        if moment.seen < before.seen:
            self._forget(moment.seen)
        self._grow(moment.seen)
        self.now = moment
        if moment.entries != self._expected():
            self._look(cache.kept_positions())

    def _expected(self) -> int:
        """Entries if nothing went since one looked."""
        return len(self._head) + (self.now.seen - self._looked) * len(self._room)

    def _look(self, kept: Sequence[Sequence[Ints]]) -> None:
        heads = [positions for layer in kept for positions in layer]
        head = np.repeat(np.arange(len(heads)), [len(positions) for positions in heads])
        position = np.concatenate(heads).astype(np.int64)
        number = len(self.compactions)
        self._room[self._head, self._position] = number
        self._room[:, self._looked : self.now.seen] = number
        self._room[head, position] = KEPT
        self._head, self._position, self._looked = head, position, self.now.seen
        self.compactions.append(self.now)

    def _forget(self, seen: int) -> None:
        """Tokens were taken back, of which no compaction was."""
        there = self._position < seen
        self._head, self._position = self._head[there], self._position[there]
        self._looked = min(self._looked, seen)
        self._room[:, seen:] = KEPT

    def _grow(self, seen: int) -> None:
        if seen > self._room.shape[1]:
            room = np.full((len(self._room), max(seen, 2 * self._room.shape[1])), KEPT, np.int32)
            room[:, : self._room.shape[1]] = self._room
            self._room = room

    # ------------------------------------------------------------------ shares

    def moment(self, at: int | None = None) -> Moment:
        """After compaction ``at``, or now."""
        return self.now if at is None else self.compactions[at]

    def held(self, at: int | None = None, layer: int | None = None, head: int | None = None) -> Ints:
        """How many heads hold each token (n,) after compaction ``at``, or now; 0 where it was not read yet.

        Args:
            layer, head: of this layer, or this KV head of it, alone.
        """
        seen = self.moment(at).seen
        number = len(self.compactions) if at is None else at
        found: Ints = (self._scope(layer, head) > number).sum(0)
        found[seen:] = 0
        return found

    def lost(self, at: int, layer: int | None = None, head: int | None = None) -> Ints:
        """How many heads lost each token (n,) at compaction ``at``."""
        found: Ints = (self._scope(layer, head) == at).sum(0)
        return found

    def _scope(self, layer: int | None, head: int | None) -> Ints:
        if layer is None:
            if head is not None:
                raise ConfigError("a head is counted within its layer; give the layer too")
            return self.gone
        rows = self.gone[layer * self.kv_heads : (layer + 1) * self.kv_heads]
        return rows if head is None else rows[head : head + 1]

    # ------------------------------------------------------------------ as data

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON.

        ``gone`` is base64 of zlib of unsigned little-endian numbers of ``bytes`` bytes, (L·H, n): how many
        compactions an entry outlived of those that came after its token was read; the largest number of that
        size where it is still there.
        """
        ages = self._ages()
        most = int(ages[self.gone != KEPT].max(initial=0))
        size = next(size for size in (1, 2, 4) if most < 256**size - 1)
        ages[self.gone == KEPT] = 256**size - 1
        packed = zlib.compress(ages.astype(f"<u{size}").tobytes(), 3)
        return {
            "layers": self.layers,
            "kv_heads": self.kv_heads,
            "compactions": [astuple(moment) for moment in self.compactions],
            "now": astuple(self.now),
            "bytes": size,
            "gone": base64.b64encode(packed).decode(),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> History:
        """What :meth:`to_dict` gave; it can be looked at, not followed on."""
        made = cls(data["layers"], data["kv_heads"])
        made.compactions, made.now = [Moment(*m) for m in data["compactions"]], Moment(*data["now"])
        size, packed = data["bytes"], zlib.decompress(base64.b64decode(data["gone"]))
        ages = np.frombuffer(packed, f"<u{size}").reshape(len(made._room), -1).astype(np.int64)
        kept = ages == 256**size - 1
        made._room = np.where(kept, KEPT, ages + made._first()).astype(np.int32)
        return made

    def _ages(self) -> Array:
        found: Array = self.gone - self._first().astype(np.int32)
        return found

    def _first(self) -> Ints:
        """The first compaction (n,) after each token was read."""
        ends = np.array([moment.seen for moment in self.compactions], np.int64)
        return np.searchsorted(ends, np.arange(self.now.seen), side="right")


def described(
    history: History,
    texts: Sequence[str],
    shape: CacheShape,
    layers: Sequence[int],
    config: EvictionConfig,
    model: str,
    pictures: Iterable[Picture] = (),
) -> dict[str, Any]:
    """A history with all that a page shows beside it, as plain JSON: what a full cache would take, and texts.

    Args:
        texts: of each token (n,).
        layers: places in the model of the layers that compete.
        pictures: where they stand among the tokens; those of known rows and columns are drawn so.
    """
    return history.to_dict() | {
        "model": model,
        "budget": config.budget,
        "buffer": config.buffer,
        "policy": config.policy,
        "layer_numbers": list(layers),
        "full_bytes_per_token": shape.full_nbytes(1),
        "texts": list(texts),
        "pictures": [[p.start, p.end, p.columns] for p in pictures if p.rows * p.columns == p.tokens],
    }
