"""Proves custom Metal kernels of MLX on a CPU: captures the generated source, compiles it with clang,
executes it with exact barrier and simdgroup semantics, and checks it in four passes. See README.md.

    metal_host.check(call, twin, tol)         four passes over call(), compared with twin()
    metal_host.count(call)                    memory traffic of the kernels call() launches
    metal_host.assert_close(got, twin, tol)   the same comparison, for results without a kernel
    metal_host.installed()                    mx.fast.metal_kernel makes emulated kernels inside this block
"""

from .checking import assert_close, check, count
from .counters import BufferTraffic, LaunchTraffic, Traffic
from .emulator import EMULATED, installed
from .errors import KernelError, ToolchainError

__all__ = [
    "EMULATED",
    "BufferTraffic",
    "KernelError",
    "LaunchTraffic",
    "ToolchainError",
    "Traffic",
    "assert_close",
    "check",
    "count",
    "installed",
]
