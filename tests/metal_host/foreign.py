"""Loads modules of other packages with their Metal kernels emulated."""

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import mlx.core as mx

from .emulator import EMULATED, installed


@contextlib.contextmanager
def pretended_gpu() -> Iterator[None]:
    """Python code that asks whether Metal is there is told so. Arrays stay on the CPU."""
    if not EMULATED:
        yield
        return
    honest = mx.metal.is_available, mx.default_device
    mx.metal.is_available, mx.default_device = (lambda: True), (lambda: mx.gpu)
    try:
        yield
    finally:
        mx.metal.is_available, mx.default_device = honest


@contextlib.contextmanager
def _amended(amend: Callable[[str], str]) -> Iterator[None]:
    make = mx.fast.metal_kernel
    mx.fast.metal_kernel = lambda source, **kw: make(source=amend(source), **kw)
    try:
        yield
    finally:
        mx.fast.metal_kernel = make


def with_emulated_kernels(name: str, amend: Callable[[str], str] | None = None) -> ModuleType:
    """A private copy of a module whose kernels are emulated; the module itself where Metal exists.

    amend: changes the source of every kernel the copy makes.
    """
    module = importlib.import_module(name)
    if not EMULATED:
        return module
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    with installed(), pretended_gpu(), _amended(amend or str):
        spec.loader.exec_module(copy)
    assert sys.modules[name] is module
    return copy
