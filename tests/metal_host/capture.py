"""What MLX would hand to Metal for a call of a custom kernel: the generated source, without any Metal.

Under `mx.export_function` a call is only traced, and the callback's entry of the primitive `CustomKernel`
holds the complete source, name included. It doesn't report `init_value`; the emulator has that from the call.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from .errors import KernelError

SIGNATURE = re.compile(r"\[\[kernel\]\] void (\w+)\((.*?)\) \{\n", re.DOTALL)
BUFFER = re.compile(r"^\s*(.+?)\s*([*&])\s*(\w+)\s*\[\[buffer\((\d+)\)\]\]", re.MULTILINE)
ATTRIBUTE = re.compile(r"^\s*(\w+)\s+(\w+)\s*\[\[(?!buffer)(\w+)\]\]", re.MULTILINE)
INSTANCE = re.compile(r"decltype\(([^;]*?)\)\s")


@dataclass(frozen=True)
class Buffer:
    """A buffer parameter: `type` as written (`const device half`), `reference` for a 0-d input."""

    type: str
    reference: bool
    name: str


@dataclass(frozen=True)
class Capture:
    """One generated kernel."""

    name: str
    source: str
    row_contiguous: bool

    @property
    def header(self) -> str:
        """Everything before the body: the user's header, the template and the signature."""
        return self.source[: self._signature.end()]

    @property
    def body(self) -> str:
        """The user's source, the closing brace and the instantiation."""
        return self.source[self._signature.end() :]

    @property
    def instance(self) -> str:
        """The function to call, with template arguments."""
        match = INSTANCE.search(self.body)
        return match.group(1) if match else self._signature.group(1)

    @property
    def buffers(self) -> list[Buffer]:
        return [Buffer(t, r == "&", n) for t, r, n, _ in BUFFER.findall(self._signature.group(2))]

    @property
    def attributes(self) -> list[tuple[str, str]]:
        """(type, name) of the attributes the body mentions, such as ("uint3", "thread_position_in_grid")."""
        return [(t, a) for t, _, a in ATTRIBUTE.findall(self._signature.group(2))]

    @property
    def _signature(self) -> re.Match[str]:
        match = SIGNATURE.search(self.source)
        if match is None:
            raise KernelError("types", self.name, f"MLX generated no readable signature:\n{self.source}")
        return match


def capture(kernel: Callable, inputs: Sequence[mx.array], **call: Any) -> Capture:
    """Trace `kernel(inputs=inputs, **call)`; only the inputs' shapes and types matter."""
    found: list[Capture] = []

    def look(entry: dict) -> None:
        if entry.get("type") == "primitive" and entry["name"] == "CustomKernel":
            name, source, *_rest = entry["arguments"]
            found.append(Capture(name, source, entry["arguments"][9]))

    mx.export_function(look, lambda *arrays: kernel(inputs=list(arrays), **call), *inputs)
    return found[0]
