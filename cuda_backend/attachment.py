"""What is known of an attached model, and where it is kept: on the model itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from mlx_kvret.core.config import EvictionConfig, GateConfig
from mlx_kvret.core.fingerprint import identity
from mlx_kvret.core.shares import Share

from .gates import RetentionGates
from .pictures import Eyes
from .probe import Layout
from .rope import Fixed


@dataclass
class Attachment:
    """What is known of an attached model: its layout, gates and eyes, and how it is detached."""

    layout: Layout
    gates: RetentionGates | None
    owner: dict[str, str]
    eviction: EvictionConfig
    implementation: str
    rope: Fixed
    eyes: Eyes | None = None
    handles: list[Any] = field(default_factory=list)
    _identity: str = ""

    def identity(self, model: nn.Module) -> str:
        """Which model, with which gates, may use a cache made here: of the same config and weights."""
        if not self._identity:
            self._identity = identity(self.owner, _weights(model))
        return self._identity

    @property
    def gate_config(self) -> GateConfig | None:
        return None if self.gates is None else self.gates.config


def attachment(model: nn.Module) -> Attachment | None:
    """The attachment of a model, or None."""
    found: Attachment | None = vars(model).get("_kvret")
    return found


def share_of(model: nn.Module) -> Share | None:
    """This process's share of an attached model, or None where it holds all of it."""
    attached = attachment(model)
    return None if attached is None else attached.layout.share


def _weights(model: nn.Module) -> Iterator[tuple[str, np.ndarray]]:
    """A few values of every weight."""
    for name, weight in model.named_parameters():
        # of a weight that is split over ranks, this one's part
        flat = getattr(weight, "to_local", lambda weight=weight: weight)().detach().flatten()
        yield name, flat[:: max(1, len(flat) // 8)].float().cpu().numpy()
