"""Takes the place of `mx.fast.metal_kernel`: a call is captured, built once per source, and executed."""

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from .build import Build
from .capture import capture
from .errors import KernelError
from .launch import Launch, Memory, run, run_under_asan

EMULATED = not mx.metal.is_available()
"""The one switch: where Metal exists, everything here steps aside and the real kernels run."""

BITS = {
    1: (mx.uint8, np.uint8),
    2: (mx.uint16, np.uint16),
    4: (mx.uint32, np.uint32),
    8: (mx.uint64, np.uint64),
}


@dataclass(frozen=True)
class Mode:
    """How kernels are executed, and where a record of each launch goes."""

    variant: str = "run"  # run, asan, tsan
    schedule: int = 0
    poison: int = 0xFF
    prepare: tuple[str, ...] = ()  # variants to build with the first call of a source
    launches: list[Launch] | None = field(default=None, compare=False)


_mode: ContextVar[Mode] = ContextVar("metal_host_mode")
_plain = Mode()
_builds: dict[str, Build] = {}


@contextlib.contextmanager
def executing(mode: Mode) -> Iterator[None]:
    """Execute emulated kernels in this mode."""
    token = _mode.set(mode)
    try:
        yield
    finally:
        _mode.reset(token)


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """Let `mx.fast.metal_kernel` make emulated kernels.

    They stay emulated after the block; kernels made before it are real ones. `mx.compile` is off inside,
    since a kernel that runs in Python can't be traced.
    """
    if not EMULATED or isinstance(mx.fast.metal_kernel, _Factory):
        yield
        return
    mx.fast.metal_kernel = _Factory(mx.fast.metal_kernel)
    mx.disable_compile()
    try:
        yield
    finally:
        mx.fast.metal_kernel = mx.fast.metal_kernel.real
        mx.enable_compile()


class _Factory:
    def __init__(self, real: Any) -> None:
        self.real = real

    def __call__(
        self, name: str, input_names: Sequence[str], output_names: Sequence[str], *args: Any, **kw: Any
    ):
        return EmulatedKernel(
            self.real(name, input_names, output_names, *args, **kw), input_names, output_names
        )


class EmulatedKernel:
    """Called like the object `mx.fast.metal_kernel` returns."""

    def __init__(self, real: Any, input_names: Sequence[str], output_names: Sequence[str]) -> None:
        self.real, self.input_names, self.output_names = real, list(input_names), list(output_names)
        self.builds: dict[tuple, Build] = {}

    def __call__(
        self,
        *,
        inputs: Sequence[Any],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        template: Sequence[tuple[str, Any]] | None = None,
        init_value: float | None = None,
        verbose: bool = False,
        stream: Any = None,
    ) -> list[mx.array]:
        arrays = [x if isinstance(x, mx.array) else mx.array(x) for x in inputs]
        build = self._build(arrays, output_shapes, output_dtypes, grid, threadgroup, template)
        if verbose:
            print(build.kernel.source)
        mode = _mode.get(_plain)
        memory: dict[str, Memory] = {}
        for name, array in zip(self.input_names, arrays, strict=True):
            data = as_bits(mx.contiguous(array) if build.kernel.row_contiguous else array)
            memory[name] = Memory(name, data)
            memory[f"{name}_shape"] = Memory(f"{name}_shape", np.array(data.shape, np.int32))
            strides = np.array([s // data.itemsize for s in data.strides], np.int64)
            memory[f"{name}_strides"] = Memory(f"{name}_strides", strides)
            memory[f"{name}_ndim"] = Memory(f"{name}_ndim", np.array(data.ndim, np.int32))
        for name, shape, dtype in zip(self.output_names, output_shapes, output_dtypes, strict=True):
            data = _fresh_output(shape, dtype, init_value, mode.poison)
            memory[name] = Memory(name, data, writable=True, initialised=init_value is not None)
        order = [memory[b.name] for b in build.kernel.buffers]
        job = Launch(build, order, tuple(grid), tuple(threadgroup), mode.schedule, mode.poison)
        if mode.variant == "asan":
            run_under_asan(job)
        else:
            run(job, traced=mode.variant == "tsan")
        if mode.launches is not None:
            mode.launches.append(job)
        return [from_bits(memory[n].data, d) for n, d in zip(self.output_names, output_dtypes, strict=True)]

    def _build(self, arrays, output_shapes, output_dtypes, grid, threadgroup, template) -> Build:
        # MLX's source depends on types, and on size: 0-d is a reference, fewer than 8 elements `constant`.
        kinds = tuple((a.dtype, a.ndim == 0, a.size < 8) for a in arrays)
        key = (kinds, tuple(output_dtypes), tuple((n, str(v)) for n, v in template or ()))
        if key not in self.builds:
            shape_only = [mx.zeros(a.shape, a.dtype) for a in arrays]
            call = {
                "output_shapes": output_shapes,
                "output_dtypes": output_dtypes,
                "template": template or [],
            }
            kernel = capture(self.real, shape_only, grid=grid, threadgroup=threadgroup, **call)
            build = self.builds[key] = _builds.setdefault(kernel.source, Build(kernel))
            build.check_types()
            build.prepare(_mode.get(_plain).prepare)
        return self.builds[key]


def as_bits(array: mx.array) -> np.ndarray:
    """The array's memory as unsigned integers; strides are kept."""
    if array.dtype.size not in BITS or array.dtype == mx.complex64:
        raise KernelError("types", "emulator", f"arrays of {array.dtype} are not supported")
    bits = BITS[array.dtype.size][0]
    if array.ndim == 0:
        return np.asarray(array.reshape(1).view(bits)).reshape(())
    return np.asarray(array.view(bits))


def from_bits(data: np.ndarray, dtype: mx.Dtype) -> mx.array:
    return mx.array(data.reshape(-1)).view(dtype).reshape(data.shape)


def _fresh_output(shape: Sequence[int], dtype: mx.Dtype, init_value: float | None, poison: int) -> np.ndarray:
    """MLX leaves outputs uninitialised unless the call gives a value."""
    data = np.empty(tuple(shape), BITS[dtype.size][1])
    if init_value is None:
        data.reshape(-1).view(np.uint8)[:] = poison
    else:
        data[...] = as_bits(mx.full((1,), init_value, dtype))[0]
    return data
