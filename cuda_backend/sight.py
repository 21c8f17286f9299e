"""Pictures in a cache: those its sequences hold, and what a pass that is under way brings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mlx_kvret.core.pictures import Modality, Pictures, forgotten, of_modality
from mlx_kvret.core.shares import Share
from mlx_kvret.core.state import State
from mlx_kvret.core.types import Ints

from .bounded import Bounded
from .stock_layers import kept_positions


class Sight:
    """The pictures of a cache's rows, which stand in the rows themselves; or here, if nothing is evicted.

    ``arriving`` is what a call of the model brings, ``coming`` the pictures of each row once its pass is
    over, ``block`` the mask that the pass's own tokens were given, where they do not only look back.
    """

    def __init__(self, shared: Bounded | None) -> None:
        self.shared = shared
        self.own: list[Pictures] = []
        # places before the first token of each row
        self.padding: list[int] = []
        self.arriving: Any = None
        self.coming: list[Pictures] | None = None
        self.block: torch.Tensor | None = None

    def places(self, competing: Sequence[Any]) -> int:
        """What hosts count: the tokens of the row that has seen the most, and padding."""
        return int(competing[0].get_seq_length() if self.shared is None else self.shared.places)

    def pictures(self, rows: int) -> list[Pictures]:
        """Of each row."""
        if self.shared is not None:
            return [row.pictures for row in self.shared.rows]
        return self.own or [()] * rows

    def kept(
        self, competing: Sequence[Any], row: int, modality: Modality | None, share: Share | None = None
    ) -> list[list[Ints]]:
        """As :meth:`.cache.BoundedCache.kept_positions`."""
        if self.shared is not None:
            found = self.shared.kept_positions(row)
        else:
            found = kept_positions(competing, share)
        return found if modality is None else of_modality(found, self.pictures(row + 1)[row], modality)

    def clocks(self, rows: int, places: int) -> list[int]:
        """Tokens seen by each row, padding left out."""
        if self.shared is not None:
            return [row.seen for row in self.shared.rows]
        return [places - n for n in self.padding or [0] * rows]

    def real(self, rows: int, places: int, tokens: int, mask: torch.Tensor | None) -> list[tuple[int, int]]:
        """Where in a pass of ``tokens`` places each row's tokens stand; ``mask`` (R, N) hides padding."""
        if self.shared is not None:
            assert self.shared.reading is not None
            return self.shared.reading.ends
        if mask is not None and mask.ndim == 2:
            hidden = (~mask.bool()).sum(1).tolist()
            self.padding = [min(n, places) for n in hidden]
            return [(min(max(n - places, 0), tokens), tokens) for n in hidden]
        return [(0, tokens)] * rows

    def before(self) -> State:
        """What undoes a pass, where the rows do not."""
        return State([(self, {"own": self.own, "padding": self.padding})])

    def commit(self) -> None:
        """The pass has come to its end."""
        if self.coming is not None and self.shared is not None:
            for row, own in zip(self.shared.rows, self.coming, strict=True):
                row.pictures = own
        elif self.coming is not None:
            self.own = self.coming

    def release(self) -> None:
        """Forget what a pass brought."""
        self.arriving = self.coming = self.block = None

    def forget(self, seen: int, count: int) -> None:
        """Only ``seen`` tokens are left, the newest ``count`` are not; raises as :func:`forgotten`."""
        if self.shared is None:
            self.own = [forgotten(own, seen) for own in self.own]
            return
        # the rows themselves forget
        for row in self.shared.rows:
            forgotten(row.pictures, max(row.seen - count, 0))

    def pick(self, which: Sequence[int]) -> None:
        """Only these rows are left, where the rows themselves do not leave."""
        if self.own:
            self.own = [self.own[at] for at in which]
        if self.padding:
            self.padding = [self.padding[at] for at in which]

    def like(self, other: Sight) -> Sight:
        """This one, with the rows of another where they stand here."""
        self.own, self.padding = other.own, other.padding
        return self
