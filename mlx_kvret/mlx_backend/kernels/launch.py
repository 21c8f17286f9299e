"""Metal sources of this folder as kernels: built by MLX once per set of template arguments."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from importlib import resources
from typing import Any

import mlx.core as mx
import numpy as np

from ...errors import KernelError

Template = dict[str, Any]


@functools.cache
def _source(file: str) -> str:
    return resources.files(__package__).joinpath(file).read_text("utf-8")


@functools.cache
def constant(*values: float, dtype: mx.Dtype = mx.int32) -> mx.array:
    """A small array of host numbers, made once."""
    return mx.array(values, dtype)


def rows(numbers: Any) -> mx.array:
    """Host numbers of each row (R, ...) on the device, with spare rows to make at least 8 numbers.

    MLX hands smaller arrays over in another way, for which it builds a kernel anew.
    """
    numbers = np.asarray(numbers)
    spare = -(-(8 - numbers.size) // max(1, numbers[:1].size))
    if spare > 0:
        numbers = np.concatenate([numbers, np.zeros((spare, *numbers.shape[1:]), numbers.dtype)])
    return mx.array(numbers)


class Kernel:
    """``<name>.metal``, the body of a kernel, after the functions of ``header``.

    Inputs may have any strides if ``strided``; else MLX copies what is not row-contiguous.
    """

    def __init__(
        self,
        name: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        header: str | None = None,
        strided: bool = False,
        atomic: bool = False,
    ) -> None:
        self.name, self.header = name, header
        self._how: dict[str, Any] = {
            "input_names": list(inputs),
            "output_names": list(outputs),
            "ensure_row_contiguous": not strided,
            "atomic_outputs": atomic,
        }
        self._made: dict[Callable[..., Any], Any] = {}
        self._built: set[tuple[Any, ...]] = set()
        self._refused: dict[tuple[Any, ...], KernelError] = {}

    def __call__(
        self,
        inputs: Sequence[mx.array],
        outputs: Sequence[tuple[Sequence[int], mx.Dtype]],
        grid: tuple[int, int, int],
        threadgroup: int,
        init_value: float | None = None,
        **template: Any,
    ) -> list[mx.array]:
        """Launch once. Arguments as of :meth:`prepared`, raises as a :class:`Launch`."""
        return self.prepared(outputs, grid, threadgroup, init_value, **template)(list(inputs))

    def prepared(
        self,
        outputs: Sequence[tuple[Sequence[int], mx.Dtype]],
        grid: tuple[int, int, int],
        threadgroup: int,
        init_value: float | None = None,
        **template: Any,
    ) -> Launch:
        """``grid`` threadgroups of ``threadgroup`` threads; shapes and types of the ``outputs``."""
        how = {
            "template": list(template.items()),
            "grid": (grid[0] * threadgroup, grid[1], grid[2]),
            "threadgroup": (threadgroup, 1, 1),
            "output_shapes": [shape for shape, _ in outputs],
            "output_dtypes": [dtype for _, dtype in outputs],
            "init_value": init_value,
        }
        return Launch(self, how)

    def first(self, inputs: Sequence[mx.array], how: Template) -> list[mx.array]:
        """A launch that may be the first of its kind, which is built and evaluated then."""
        factory, template = mx.fast.metal_kernel, dict(how["template"])
        variant = (factory, *how["template"], *(a.dtype for a in inputs))
        if variant in self._refused:
            # not built anew each time
            raise self._refused[variant]
        try:
            made: list[mx.array] = self.made(factory)(inputs=list(inputs), **how)
            # MLX builds when it evaluates, far from here: a source that fails is better found now
            if variant not in self._built and _evaluated(made):
                self._built.add(variant)
        except (RuntimeError, ValueError) as error:
            types = [_name(a.dtype) for a in inputs]
            failure = self._failure(error, dict.fromkeys(types), template)
            if isinstance(failure, KernelError):
                self._refused[variant] = failure
            raise failure from error
        return made

    def made(self, factory: Callable[..., Any]) -> Callable[..., Any]:
        """The kernel as made by MLX, or by what stands in for it."""
        if factory not in self._made:
            header = _source(self.header) if self.header else ""
            self._made[factory] = factory(
                name=f"kvret_{self.name}", source=_source(f"{self.name}.metal"), header=header, **self._how
            )
        return self._made[factory]

    def _failure(self, error: Exception, types: Iterable[str], template: Template) -> Exception:
        text = str(error)
        if "No Metal back-end" in text:
            return KernelError(
                f"the kernel {self.name} needs Metal and this MLX has none; set MLX_KVRET_KERNELS=reference"
            )
        if "metal library" in text or "Unable to load" in text or "Unable to build" in text:
            how = ", ".join([*types, *(f"{name}={value}" for name, value in template.items())])
            return KernelError(
                f"Metal cannot build mlx_kvret/mlx_backend/kernels/{self.name}.metal for {how}; "
                f"set MLX_KVRET_KERNELS=reference to go on without it. {text}"
            )
        if "thread" in text.lower() and "group" in text.lower():
            return KernelError(
                f"the device does not run the kernel {self.name} ({text}); set MLX_KVRET_KERNELS=reference "
                "to go on without it"
            )
        return error


class Launch:
    """A kernel with all that stays the same from call to call, so that a call costs the host little."""

    def __init__(self, kernel: Kernel, how: Template) -> None:
        self.kernel, self._how = kernel, how
        self._factory: Callable[..., Any] | None = None
        self._made: Callable[..., Any] | None = None

    def __call__(self, inputs: list[mx.array]) -> list[mx.array]:
        """The outputs for inputs of the same types in every call.

        Raises:
            KernelError: MLX cannot build the source for these types and sizes, its device does not take so
                large threadgroups, or it has no Metal.
        """
        if self._made is not None and self._factory is mx.fast.metal_kernel:
            found: list[mx.array] = self._made(inputs=inputs, **self._how)
            return found
        found = self.kernel.first(inputs, self._how)
        self._factory = mx.fast.metal_kernel
        self._made = self.kernel.made(mx.fast.metal_kernel)
        return found


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


def _evaluated(arrays: list[mx.array]) -> bool:
    """Evaluate, unless inside a trace, where nothing can be."""
    try:
        mx.eval(arrays)
    except ValueError as error:
        if "function transformation" not in str(error):
            raise
        return False
    return True
