"""What is known of an attached model, and where it is kept: on the model itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from ..core.config import EvictionConfig, GateConfig
from ..core.fingerprint import identity
from ..core.shares import Share
from .dispatch import Namespace, User
from .gates import RetentionGates
from .probe import Layout
from .vision import speaking


class Namespaces(User):
    """Where the functions of one model's attentions find mlx-lm's attention function: their globals."""

    def __init__(self, attentions: list[Namespace]) -> None:
        self.attentions = attentions


@dataclass
class Attachment:
    """What is known of an attached model: its layout, its gates, and how new caches are made.

    ``eyes`` are the token ids that stand for patches of pictures, of a model that sees; ``rows`` tells
    whether its rows decode together as each does alone, once that was tried.
    """

    layout: Layout
    gates: RetentionGates | None
    owner: dict[str, str]
    namespaces: Namespaces
    eviction: EvictionConfig
    eyes: frozenset[int] = frozenset()
    rows: bool | None = None
    _identity: str = ""

    def identity(self, model: nn.Module) -> str:
        """Which model, with which gates, may use a cache made here: of the same config and weights."""
        if not self._identity:
            self._identity = identity(self.owner, _weights(speaking(model)))
        return self._identity

    @property
    def gate_config(self) -> GateConfig | None:
        return None if self.gates is None else self.gates.config

    def __deepcopy__(self, memo: dict[int, Any]) -> Attachment:
        """Of a copied model: hooks of its own, the same gates, which never change."""
        return replace(self, namespaces=Namespaces(self.namespaces.attentions))


def attachment(model: nn.Module) -> Attachment | None:
    """The attachment of a model, or of the language model of one that sees; or None."""
    found: Attachment | None = speaking(model).__dict__.get("_kvret")
    return found


def share_of(model: nn.Module) -> Share | None:
    """This process's share of an attached model, or None where it holds all of it."""
    attached = attachment(model)
    return None if attached is None else attached.layout.share


def _weights(model: nn.Module) -> Iterator[tuple[str, np.ndarray]]:
    """A few values of every weight."""
    flat: Any = tree_flatten(model.parameters())
    parts = [weight.reshape(-1)[:: max(1, weight.size // 8)].astype(mx.float32) for _, weight in flat]
    values = np.split(np.array(mx.concatenate(parts)), np.cumsum([part.size for part in parts])[:-1])
    return zip([name for name, _ in flat], values, strict=True)
