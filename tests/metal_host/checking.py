"""`check`: the four passes over one call, each compared with the naive twin."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np

from .counters import Traffic
from .emulator import EMULATED, Mode, executing, installed
from .errors import KernelError
from .launch import Launch

Outputs = mx.array | Sequence[mx.array]
PASSES = {
    # The types pass comes with the first call of every source, before anything is executed.
    "asan": [Mode("asan")],
    "tsan": [Mode("tsan", 0), Mode("tsan", 1)],
    # Unwritten memory holds NaN or large numbers of either sign; the order of threads must not matter.
    "run": [Mode("run", 0, poison=0xFF), Mode("run", 1, poison=0x7B), Mode("run", 7, poison=0xC1)],
}


def check(
    call: Callable[[], Outputs],
    twin: Callable[[], Outputs],
    tol: float = 0.0,
    passes: Sequence[str] = tuple(PASSES),
) -> None:
    """Run `call()` in every pass and compare what it returns with `twin()`.

    tol: floats must satisfy |got - wanted| <= tol·(1 + |wanted|), NaN equal to NaN; integers are exact.
    Raises KernelError, whose `found_by` names the pass (types, asan, tsan, run). Where Metal exists, `call`
    simply runs on the GPU.
    """
    wanted = _arrays(twin())
    if not EMULATED:
        _compare("metal", _arrays(call()), wanted, tol)
        return
    for name in passes:
        for mode in PASSES[name]:
            got, _ = _execute(call, replace(mode, prepare=tuple(passes)))
            if name == "run":  # last, since the sanitizers can often say why a result is wrong
                _compare(name, got, wanted, tol)


def count(call: Callable[[], Outputs]) -> Traffic:
    """Traffic, barriers and simdgroup functions of all kernels that `call()` launches; emulated only."""
    if not EMULATED:
        raise RuntimeError(
            "traffic is counted by the emulator; here Metal runs the kernels (metal_host.EMULATED is False)"
        )
    return Traffic.of(_execute(call, Mode("tsan"))[1])


def assert_close(got: Outputs, wanted: Outputs, tol: float = 0.0) -> None:
    """The comparison that `check` makes, for results that no kernel is needed for."""
    _compare("run", _arrays(got), _arrays(wanted), tol)


def _execute(call: Callable[[], Outputs], mode: Mode) -> tuple[list[mx.array], list[Launch]]:
    launches: list[Launch] = []
    with installed(), executing(replace(mode, launches=launches)):
        got = _arrays(call())
    if not launches:
        raise KernelError("run", "call", "launched no kernel, so there is nothing to prove")
    return got, launches


def _arrays(outputs: Outputs) -> list[mx.array]:
    return [outputs] if isinstance(outputs, mx.array) else list(outputs)


def _compare(found_by: str, got: list[mx.array], wanted: list[mx.array], tol: float) -> None:
    if len(got) != len(wanted):
        raise KernelError(found_by, "call", f"{len(got)} outputs, the twin has {len(wanted)}")
    for i, (a, b) in enumerate(zip(got, wanted, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            raise KernelError(
                found_by, f"output {i}", f"{a.shape} {a.dtype}, the twin's is {b.shape} {b.dtype}"
            )
        x, y = _as_numpy(a), _as_numpy(b)
        if np.issubdtype(x.dtype, np.floating):
            with np.errstate(invalid="ignore"):
                near = (np.abs(x - y) <= tol * (1 + np.abs(y))) & np.isfinite(y)
                good = near | (x == y) | (np.isnan(x) & np.isnan(y))
        else:
            good = x == y
        if not good.all():
            at = tuple(int(j) for j in np.argwhere(~good)[0])
            share = f"{int((~good).sum())} of {good.size} elements"
            raise KernelError(
                found_by, f"output {i}", f"{share} differ from the twin; at {at}: {x[at]}, twin {y[at]}"
            )


def _as_numpy(array: mx.array) -> np.ndarray:
    if mx.issubdtype(array.dtype, mx.floating):
        return np.array(array.astype(mx.float32), np.float64)
    return np.array(array)
