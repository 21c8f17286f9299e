"""Which path the MLX backend takes: its Metal kernels, or the plain MLX code that is their specification.

``MLX_KVRET_KERNELS`` says which: ``metal``, ``reference``, or ``auto`` (the default), which is Metal where
there is one.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import mlx.core as mx

from ...errors import ConfigError, KernelError

Result = TypeVar("Result")
VARIABLE = "MLX_KVRET_KERNELS"
CHOICES = ("auto", "metal", "reference")
HEAD_SIZES = (32, 64, 72, 80, 96, 112, 128, 192, 256, 512)
TYPES = (mx.float16, mx.bfloat16, mx.float32)
_TYPES = set(TYPES)


@dataclass(frozen=True)
class Status:
    """The path in use, ``"metal"`` or ``"reference"``, and why."""

    path: str
    why: str

    def __str__(self) -> str:
        return f"{self.path} ({self.why})"


def status() -> Status:
    """The path that kernels take now.

    Raises:
        ConfigError: the variable holds something else than a choice.
    """
    choice = os.environ.get(VARIABLE, "auto")
    if choice not in CHOICES:
        raise ConfigError(f"{VARIABLE} is {choice!r}; expected one of {', '.join(CHOICES)}")
    if choice != "auto":
        return Status(choice, f"{VARIABLE}={choice}")
    if not mx.metal.is_available():
        return Status("reference", "MLX has no Metal on this machine")
    if mx.default_device().type != mx.DeviceType.gpu:
        return Status("reference", "MLX's default device is the CPU")
    return Status("metal", f"{mx.device_info().get('device_name', 'a GPU')} has Metal")


def enabled() -> bool:
    """Whether kernels are to be used."""
    choice = os.environ.get(VARIABLE, "auto")
    if choice == "auto":
        # as status() says, for whom this is asked in every layer
        return mx.metal.is_available() and mx.default_device().type == mx.DeviceType.gpu
    return status().path == "metal" if choice != "metal" else True


def either(kernel: Callable[[], Result], twin: Callable[[], Result]) -> Result:
    """What a kernel gives, or its twin where kernels are off or the device refuses this one.

    A refusal is warned of once; where kernels were asked for by name, it is an error.

    Raises:
        KernelError: the device refuses it.
    """
    return served(kernel, twin) if enabled() else twin()


def served(kernel: Callable[[], Result], twin: Callable[[], Result]) -> Result:
    """:func:`either` where kernels are on."""
    try:
        return kernel()
    except KernelError as error:
        if os.environ.get(VARIABLE, "auto") != "auto":
            raise
        _warn(f"{error}; using the slower reference in plain MLX")
        return twin()


def attention_supported(dtypes: set[mx.Dtype], key_dim: int, value_dim: int) -> bool:
    """Whether there are attention kernels for these types and head sizes; if not, warns once."""
    if len(dtypes) == 1 and key_dim in HEAD_SIZES and value_dim in HEAD_SIZES and dtypes <= _TYPES:
        return True
    if len(dtypes) != 1 or not dtypes <= set(TYPES):
        names = " with ".join(sorted(str(dtype).removeprefix("mlx.core.") for dtype in dtypes))
        _warn(f"no attention kernel for {names}; using the slower reference in plain MLX")
        return False
    if key_dim not in HEAD_SIZES or value_dim not in HEAD_SIZES:
        _warn(
            f"no attention kernel for heads of {key_dim} (keys) and {value_dim} (values), only for "
            f"{', '.join(map(str, HEAD_SIZES))}; using the slower reference in plain MLX"
        )
        return False
    return True


@functools.cache
def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=2)
