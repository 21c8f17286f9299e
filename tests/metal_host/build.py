"""Compiles translated kernels and the runtime that executes them. Results are kept by content hash."""

import contextlib
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .capture import Capture
from .errors import KernelError, ToolchainError
from .translate import broken_rules, to_cpp

SHIM = Path(__file__).parent / "shim"
RUNTIME = SHIM / "runtime"
PACKAGES = "clang-19 libclang-rt-19-dev"
CACHE = Path(os.environ.get("METAL_HOST_CACHE") or Path(tempfile.gettempdir()) / f"metal_host-{os.getuid()}")

WARNINGS = (
    *("-Wno-everything", "-Werror=return-type"),
    *("-Wuninitialized", "-Wsometimes-uninitialized", "-Wconditional-uninitialized"),
)
KERNEL_FLAGS = (
    *("-std=c++17", "-nostdinc", "-fno-exceptions", "-fno-rtti", "-fPIC"),
    *WARNINGS,
    *("-ferror-limit=8", "-fno-caret-diagnostics"),
    # Literals are single precision and every operation rounds to its own type, as on the GPU.
    *("-Xclang", "-cl-single-precision-constant", "-ffp-contract=off"),
    *("-Xclang", "-ffloat16-excess-precision=none", "-Xclang", "-fbfloat16-excess-precision=none"),
    # An unwritten local holds NaN or a large number, so reading it shows in the result.
    "-ftrivial-auto-var-init=pattern",
)
VARIANTS: dict[str, tuple[str, ...]] = {
    "types": ("-DMSL_TYPES", "-fsyntax-only", "-Wimplicit-float-conversion"),
    "run": ("-O2", "-fmax-type-align=4"),  # MLX's arrays on a CPU are less aligned than Metal's
    "asan": (
        *("-O1", "-g1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all"),
        "-fsanitize=address,bounds,alignment,shift,integer-divide-by-zero,signed-integer-overflow",
    ),
    # Callbacks for every load and store; trace.cpp answers them instead of ThreadSanitizer's runtime.
    "tsan": (
        *("-O1", "-g1", "-DMSL_TRACED", "-fsanitize=thread", "-fno-slp-vectorize", "-fno-vectorize"),
        *("-mllvm", "-tsan-instrument-func-entry-exit=0", "-mllvm", "-tsan-instrument-read-before-write=1"),
    ),
}
# Everything a kernel needs is in the process already, but for compiler-rt's conversions to and from bfloat.
LINK_FLAGS = ("-shared", "-nostdlib", "-fno-sanitize-link-runtime")
RUNTIME_FLAGS = ("-std=c++17", "-O2", "-fPIC", "-Wall", "-Wextra", "-Werror")


@functools.cache
def compiler() -> list[str]:
    """The clang command, with instructions for half precision."""
    clang = os.environ.get("METAL_HOST_CXX") or shutil.which("clang++-19")
    if clang is None:
        raise ToolchainError(
            "metal_host executes Metal kernels on Linux with clang 19, and found no clang++-19.\n"
            f"On Debian or Ubuntu: apt-get install {PACKAGES}  (or set METAL_HOST_CXX to another clang >= 19)"
        )
    if os.uname().machine != "x86_64":
        raise ToolchainError(
            f"metal_host executes Metal kernels on x86-64 Linux; this is {os.uname().machine}"
        )
    return [clang, "-march=x86-64-v3"]


@functools.cache
def _fingerprint() -> str:
    """Of everything but the kernel that decides a build."""
    version = subprocess.run([*compiler(), "--version"], capture_output=True, text=True, check=True).stdout
    digest = hashlib.sha256(
        repr((version, compiler(), KERNEL_FLAGS, VARIANTS, LINK_FLAGS, RUNTIME_FLAGS)).encode()
    )
    sources = [
        Path(__file__),
        Path(__file__).with_name("translate.py"),
        *(p for p in SHIM.rglob("*") if p.is_file()),
    ]
    for path in sorted(sources):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def folder() -> Path:
    path = CACHE / _fingerprint()
    path.mkdir(parents=True, exist_ok=True)
    return path


def _command(
    arguments: Sequence[str], output: Path, source: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run clang, with `source` as its standard input; `output` appears whole or not at all."""
    scratch = output.with_name(f"{output.name}.{os.getpid()}.tmp")
    command = [*compiler(), *arguments, "-o", str(scratch)]
    done = subprocess.run(command, capture_output=True, text=True, input=source)
    if done.returncode == 0 and scratch.exists():
        os.replace(scratch, output)
    return done


def _runtime(name: str, *arguments: str) -> Path:
    output = folder() / name
    if not output.exists():
        done = _command([*RUNTIME_FLAGS, *arguments], output)
        if done.returncode:
            raise ToolchainError(
                f"metal_host could not build {name}. On Debian or Ubuntu: apt-get install {PACKAGES}\n"
                + done.stderr
            )
    return output


@functools.cache
def runtime_library() -> Path:
    """What executes kernels."""
    sources = ("grid.cpp", "scheduler.cpp", "trace.cpp", "fiber.cpp")
    return _runtime("libmetal_host.so", "-shared", *(str(RUNTIME / s) for s in sources))


@functools.cache
def asan_program() -> Path:
    """The process that loads kernels built for AddressSanitizer; the runtime itself stays uninstrumented."""
    parts = (str(RUNTIME / "asan_main.cpp"), str(runtime_library()), "-Wl,-rpath,$ORIGIN")
    return _runtime("asan_main", *parts, "-fsanitize=address,undefined", "-rdynamic")


@functools.cache
def _shim() -> Path:
    """A copy of the headers with the builds: clang refuses a precompiled header of files with a new date."""
    copy = folder() / "shim"
    if not copy.exists():
        with tempfile.TemporaryDirectory(dir=folder()) as scratch:
            shutil.copytree(SHIM, f"{scratch}/shim")
            with contextlib.suppress(OSError):  # another process was faster
                os.rename(f"{scratch}/shim", copy)
    return copy


def _kernel_flags() -> list[str]:
    return [*KERNEL_FLAGS, f"-I{_shim()}"]


@functools.cache
def _precompiled(variant: str) -> Path:
    """The shim's headers, parsed once per variant."""
    output = folder() / f"prelude.{variant}.pch"
    if not output.exists():
        flags = [f for f in VARIANTS[variant] if f != "-fsyntax-only"]
        done = _command(
            [*_kernel_flags(), *flags, "-x", "c++-header", str(_shim() / "mlx_prelude.h")], output
        )
        if done.returncode:
            raise ToolchainError(f"metal_host's shim does not compile ({variant}):\n{done.stderr}")
    return output


@functools.cache
def _builtins() -> str:
    query = [*compiler(), "-print-libgcc-file-name", "-rtlib=compiler-rt"]
    path = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    if not Path(path).exists():
        raise ToolchainError(f"{path} is missing. On Debian or Ubuntu: apt-get install {PACKAGES}")
    return path


class Build:
    """One captured kernel and its compiled variants."""

    def __init__(self, kernel: Capture) -> None:
        self.kernel = kernel
        self.key = hashlib.sha256(kernel.source.encode()).hexdigest()[:24]

    def check_types(self) -> None:
        """Raise KernelError unless the source keeps Metal's rules and types."""
        passed = folder() / f"{self.key}.types"
        if passed.exists():
            return
        findings = broken_rules(self.kernel)
        done = self._compile("types", folder() / f"{self.key}.nothing")
        for line in done.stderr.splitlines():
            # Metal converts implicitly between its floats, except to bfloat.
            harmless = "warning: implicit conversion" in line and "bf" not in line.split(" to ")[-1]
            own = line.startswith(("kernel.metal", "header.metal"))
            if ": error:" in line or (": warning:" in line and own and not harmless):
                findings.append(line)
        if findings or done.returncode:
            raise KernelError("types", self.kernel.name, "\n".join(findings or [done.stderr]))
        passed.touch()

    def library(self, variant: str) -> Path:
        output = folder() / f"{self.key}.{variant}.so"
        if not output.exists():
            done = self._compile(variant, output)
            if done.returncode:
                raise KernelError(
                    variant, self.kernel.name, f"does not compile for execution:\n{done.stderr}"
                )
        return output

    def prepare(self, variants: Sequence[str]) -> None:
        """Build several variants, two at a time."""
        with ThreadPoolExecutor(max_workers=2) as pool:
            list(pool.map(self.library, variants))

    def _compile(self, variant: str, output: Path) -> subprocess.CompletedProcess[str]:
        flags = [
            *_kernel_flags(),
            *VARIANTS[variant],
            "-include-pch",
            str(_precompiled(variant)),
            "-x",
            "c++",
            "-",
        ]
        if variant != "types":
            flags += [*LINK_FLAGS, "-x", "none", _builtins()]
        return _command(flags, output, to_cpp(self.kernel, types_only=variant == "types"))
