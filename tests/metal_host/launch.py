"""Executes a built kernel on buffers in memory: here, or under the address sanitizer in another process."""

import ctypes
import functools
import os
import re
import shutil
import struct
import subprocess
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .build import Build, asan_program, runtime_library
from .errors import KernelError

TIMEOUT = 120  # seconds for one launch under the address sanitizer: a kernel that hangs is found there


class _Buffer(ctypes.Structure):
    """msl_buffer in shim/runtime/abi.h."""

    COUNTS = (
        "loaded",
        "stored",
        "loaded_per_threadgroup",
        "stored_per_threadgroup",
        "loaded_distinct",
        "stored_distinct",
    )
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("data", ctypes.c_void_p),
        ("size", ctypes.c_size_t),
        ("element_size", ctypes.c_uint),
        ("writable", ctypes.c_uint),
        ("initialised", ctypes.c_uint),
        *((count, ctypes.c_ulonglong) for count in COUNTS),
    ]


class _Launch(ctypes.Structure):
    """msl_launch in shim/runtime/abi.h."""

    _fields_ = [
        ("kernel", ctypes.c_void_p),
        ("buffers", ctypes.POINTER(_Buffer)),
        ("loaded_by_threadgroup", ctypes.c_void_p),
        ("buffer_count", ctypes.c_uint),
        ("grid", ctypes.c_uint * 3),
        ("threadgroup", ctypes.c_uint * 3),
        ("schedule", ctypes.c_uint),
        ("poison", ctypes.c_uint),
        ("traced", ctypes.c_uint),
        ("threadgroup_memory", ctypes.c_uint),
        ("barriers", ctypes.c_ulonglong),
        ("simdgroup_barriers", ctypes.c_ulonglong),
        ("simdgroup_ops", ctypes.c_ulonglong),
        ("fault", ctypes.c_size_t),
        ("error", ctypes.c_char * 1024),
    ]


@dataclass
class Memory:
    """A buffer as the kernel sees it.

    `data` may be strided; `writable` marks outputs, `initialised` what may be read before it is written.
    """

    name: str
    data: np.ndarray
    writable: bool = False
    initialised: bool = True

    @property
    def span(self) -> int:
        """Bytes from the first element to the end of the last."""
        if self.data.size == 0:
            return 0
        steps = zip(self.data.shape, self.data.strides, strict=True)
        return sum((n - 1) * stride for n, stride in steps) + self.data.itemsize

    @property
    def address(self) -> int:
        return self.data.__array_interface__["data"][0]


@dataclass
class Launch:
    """One dispatch: its buffers in the order of the signature, its grid and threadgroup in threads."""

    build: Build
    memory: list[Memory]
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    schedule: int = 0
    poison: int = 0xFF
    result: _Launch = field(default_factory=_Launch)
    counts: list[_Buffer] = field(default_factory=list)
    loaded_by_threadgroup: np.ndarray | None = None

    @property
    def threadgroups(self) -> int:
        sizes = zip(self.grid, self.threadgroup, strict=True)
        return int(np.prod([-(-n // max(1, min(t, n))) for n, t in sizes]))


_lock = threading.Lock()


@functools.cache
def _runtime() -> ctypes.CDLL:
    return ctypes.CDLL(str(runtime_library()), mode=ctypes.RTLD_GLOBAL)


@functools.cache
def _entry(library: Path) -> int:
    _runtime()
    function = ctypes.CDLL(str(library)).msl_kernel_entry
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def run(job: Launch, traced: bool = False) -> None:
    """Execute in this process; `traced` checks every access and fills the counts."""
    name = "tsan" if traced else "run"
    library = job.build.library(name)
    buffers = (_Buffer * len(job.memory))(
        *(
            _Buffer(m.name.encode(), m.address, m.span, m.data.itemsize, m.writable, m.initialised)
            for m in job.memory
        )
    )
    launch = job.result = _Launch(kernel=_entry(library), buffers=buffers, buffer_count=len(job.memory))
    launch.grid, launch.threadgroup = job.grid, job.threadgroup
    launch.schedule, launch.poison, launch.traced = job.schedule, job.poison, traced
    if traced:
        job.loaded_by_threadgroup = np.zeros((job.threadgroups, len(job.memory)), np.uint64)
        launch.loaded_by_threadgroup = job.loaded_by_threadgroup.ctypes.data
    with _lock:
        failed = _runtime().msl_run(ctypes.byref(launch))
    job.counts = list(buffers)
    if failed:
        message = launch.error.decode(errors="replace") + _source_line(library, launch.fault)
        raise KernelError(name if launch.fault else "run", job.build.kernel.name, message)


def _source_line(library: Path, offset: int) -> str:
    """` at kernel.metal:12` for an offset in a library, when addr2line can tell."""
    tool = shutil.which("addr2line") or shutil.which("llvm-symbolizer-19")
    if not offset or tool is None:
        return ""
    done = subprocess.run([tool, "-i", "-e", str(library), hex(offset - 1)], capture_output=True, text=True)
    lines = re.findall(r"(?:kernel|header)\.metal:\d+", done.stdout)
    return f" at {' from '.join(dict.fromkeys(lines))}" if lines else ""


def run_under_asan(job: Launch) -> None:
    """Execute in a process of its own, each buffer a heap block of its exact size."""
    with tempfile.NamedTemporaryFile(prefix="metal_host-", dir=_fast_folder()) as file:
        file.write(struct.pack("<9I", len(job.memory), *job.grid, *job.threadgroup, job.schedule, job.poison))
        file.write(struct.pack(f"<{len(job.memory)}Q", *(m.span for m in job.memory)))
        start = file.tell()
        for m in job.memory:
            file.write(ctypes.string_at(m.address, m.span))
        file.flush()
        _sanitized(job, file.name)
        file.seek(start)
        for m in job.memory:
            data = file.read(m.span)
            if m.writable:
                ctypes.memmove(m.address, data, m.span)


def _sanitized(job: Launch, path: str) -> None:
    options = {
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:redzone=512",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=0",
    }
    command = [str(asan_program()), str(job.build.library("asan")), path]
    name = job.build.kernel.name
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, **options}, timeout=TIMEOUT
        )
    except subprocess.TimeoutExpired:
        raise KernelError("asan", name, f"did not end within {TIMEOUT} s") from None
    if done.returncode == 3:  # the scheduler's own findings: barriers, simdgroup functions, limits
        raise KernelError("run", name, done.stderr.strip())
    if done.returncode:
        raise KernelError("asan", name, _essence(done.stderr) or f"died with status {done.returncode}")


def _essence(report: str) -> str:
    """What a sanitizer found and where in the Metal source."""
    found = re.search(r"AddressSanitizer: \S+|[^\n]*runtime error: [^\n]*", report)
    access = re.search(r"^(?:READ|WRITE) of size \d+", report, re.MULTILINE)
    frame = re.search(r"\((\S+\.asan\.so)\+0x([0-9a-f]+)\)", report)
    parts = [found.group(0)] if found else [report.strip()[:2000]]
    if access:
        parts.append(access.group(0))
    line = re.search(r"(?:kernel|header)\.metal:\d+", report)
    if line is None and frame:
        parts.append(_source_line(Path(frame.group(1)), int(frame.group(2), 16) + 1).strip())
    elif line and line.group(0) not in parts[0]:
        parts.append(f"at {line.group(0)}")
    return ", ".join(parts)


def _fast_folder() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
