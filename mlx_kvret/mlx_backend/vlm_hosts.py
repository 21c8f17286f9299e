"""What mlx-vlm's generation asks of a cache beyond calling it, answered for bounded layers; inert for others.

mlx-vlm passes over caches that it cannot quantize without a word, and takes any cache that has a state for
one that it can keep and restore by prefix. Whoever uses it imports it, maybe after a model was attached.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from ..errors import UnsupportedFeatureError
from .dispatch import User, give_back, take_over
from .entry import BoundedKVCache

_QUANTIZE = "maybe_quantize_kv_cache"
_MODULES = ("mlx_vlm.generate", "mlx_vlm.generate.ar")
_BITS = ("kv_bits", "kv_key_bits", "kv_value_bits")


def refuse_bits(stock: Callable[..., Any]) -> Callable[..., Any]:
    """mlx-vlm quantizes full caches after every pass, whole bits and fractional ones."""

    def maybe_quantize_kv_cache(prompt_cache: list[Any], *args: Any, **options: Any) -> None:
        given = {name: options[name] for name in _BITS if options.get(name) is not None}
        parts = [part for entry in prompt_cache for part in getattr(entry, "caches", (entry,))]
        if given and any(isinstance(part, BoundedKVCache) for part in parts):
            name, bits = next(iter(given.items()))
            raise UnsupportedFeatureError(
                f"{name}={bits} of mlx-vlm has no effect on a bounded cache; drop it, and give kv_bits to "
                "mlx_kvret.attach or make_cache"
            )
        stock(prompt_cache, *args, **options)

    return maybe_quantize_kv_cache


def prepare(user: User) -> None:
    """Have mlx-vlm's generation treat bounded caches as they need it, as far as it is there."""
    for namespace in _namespaces():
        take_over(namespace, _QUANTIZE, refuse_bits, user)
    if (apc := sys.modules.get("mlx_vlm.apc_adapters")) is not None:
        apc.register_capability(BoundedKVCache, apc.Capability.UNSUPPORTED)


def release(user: User) -> None:
    """Undo :func:`prepare`."""
    for namespace in _namespaces():
        give_back(namespace, _QUANTIZE, user)


def _namespaces() -> list[dict[str, Any]]:
    found = [vars(sys.modules[name]) for name in _MODULES if name in sys.modules]
    return [namespace for namespace in found if _QUANTIZE in namespace]
