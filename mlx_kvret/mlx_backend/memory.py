"""Memory of MLX's device."""

from __future__ import annotations

import mlx.core as mx

from ..core.machine import free_host_bytes


def free_bytes() -> int | None:
    """Free memory of MLX's device; None where it cannot be told."""
    if mx.default_device() == mx.gpu and mx.metal.is_available():
        return int(mx.device_info()["max_recommended_working_set_size"]) - mx.get_active_memory()
    return free_host_bytes()
