"""Whether gates fit a model's cache, and which of them belongs to which layer."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import ModelMismatchError
from .budget import CacheShape
from .config import GateConfig


def fit_gates(gates: GateConfig, shape: CacheShape, places: Sequence[int], layers: int) -> tuple[int, ...]:
    """Which gate belongs to each competing layer.

    Gates come for the competing layers only, or for all ``layers`` of the model, of which the competing ones
    are at ``places``.

    Raises:
        ModelMismatchError: the gates' shape is not the model's.
    """
    pairs = (
        ("KV heads", gates.kv_heads, shape.kv_heads),
        ("hidden size", gates.hidden_size, shape.hidden_size),
    )
    wrong = [f"{name} {found}, the model has {wanted}" for name, found, wanted in pairs if found != wanted]
    if gates.layers not in (shape.layers, layers):
        wrong.append(f"{gates.layers} layers, the model has {shape.layers} that can be bounded")
    if wrong:
        raise ModelMismatchError(
            f"these gates ({gates.base_model or 'base model unnamed'}) are for another model: "
            f"{'; '.join(wrong)}; give gates trained for this model"
        )
    return tuple(range(shape.layers)) if gates.layers == shape.layers else tuple(places)
