"""The few things that serving asks of a backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

from ..core.budget import CacheShape
from ..core.config import EvictionConfig
from ..core.shares import Share
from ..core.snapshot import Snapshot
from ..core.types import Array
from .channels import Splitter
from .drawing import Drawing

# one that chooses a token (1,) from log probabilities (1, V), both on the device
Choose = Any


class Passes(Protocol):
    """What a scheduler asks, by itself or through its store of snapshots."""

    def new_cache(self, budget: int | None) -> Any:
        """An empty cache, with a budget of its own or the server's."""

    def copy(self, cache: Any) -> Any:
        """The same cache once more; neither sees what the other reads from now on."""

    def read(self, cache: Any, ids: list[int]) -> None:
        """One forward pass over tokens whose logits nobody wants."""

    def looking(self, cache: Any, made: dict[str, Any], chunk: int) -> Iterator[int]:
        """Reads what :meth:`processed` made, but its last token, and tells after each chunk how much."""

    def chooser(self, asked: Drawing) -> Choose:
        """How one row's next tokens are chosen."""

    def host(self, logprobs: Any) -> Array:
        """Log probabilities (V,) of one row, float32."""


class Backend(Passes, Protocol):
    """A model, its caches and its arrays; used by one thread only, but for what is plain data.

    Attributes:
        shape: of what the bounded layers cache.
        layers: their places in the model.
        eviction: what every cache is made with, the server's budget in it.
        identity: the model and its gates, by content.
        vocabulary: how many token ids the model has.
        ends: the token ids that end an answer.
        batches: whether rows can decode in one pass.
        eyes: the token ids that stand for pictures; none where the model reads text only.
        ranks: the processes that hold the model together, whose ``token`` (1,) is the first one's; None: one
            does.
        split: this one's part, where there are several; ``shape`` and ``layers`` are those of the whole.
    """

    shape: CacheShape
    layers: list[int]
    eviction: EvictionConfig
    identity: str
    vocabulary: int | None
    ends: frozenset[int]
    batches: bool
    eyes: frozenset[int]
    ranks: Any
    split: Share | None

    def share(self, cache: Any, parent: Any) -> None:
        """As :meth:`.prefixes.Pools.share`."""

    def pool(self, cache: Any) -> tuple[int, int]:
        """As :meth:`.prefixes.Pools.pool`."""

    def processed(self, text: str, pictures: list[Any]) -> dict[str, Any]:
        """What the model's processor makes of a rendered text and its pictures, for any thread.

        Raises:
            ConfigError: it refuses them.
        """

    def decoder(self, cache: Any) -> Callable[[Any], Any]:
        """The next steps of a cache: from a token (1,), which it reads, to log probabilities (1, V)."""

    def array(self, token: int) -> Any:
        """A token (1,) on the device."""

    def generator(self, rows: int) -> Any:
        """A batch generator for so many rows, where there are ``batches``."""

    def row(self, found: Any) -> Any:
        """The cache of a row as the generator gives it out, which stands in its arrays."""

    def take(self, cache: Any) -> Snapshot:
        """What a cache holds, on the host."""

    def reopen(self, snapshot: Snapshot) -> Any:
        """A cache that goes on where a snapshot was taken. Raises KVRetError if it is another model's."""

    def splitter(self, tokenizer: Any, ids: list[int], tools: list[dict[str, Any]] | None) -> Splitter:
        """What finds thoughts and tool calls in the answer to a prompt."""

    def free_bytes(self) -> int | None:
        """Memory for caches; None where it cannot be told."""


def backend_for(model: Any, tokenizer: Any, options: dict[str, Any]) -> Backend:
    """The backend of a loaded model, whose caches are made with these eviction options."""
    if "mlx" in {cls.__module__.partition(".")[0] for cls in type(model).__mro__}:
        from .on_mlx import OnMLX

        return OnMLX(model, tokenizer, options)
    from .on_torch import OnTorch

    return OnTorch(model, tokenizer, options)
