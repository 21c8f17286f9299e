"""What Triton would compile for a launch, found out without a GPU: launches are noted, not carried out."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

TYPES = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32",
    torch.int64: "*i64", torch.uint8: "*u8", torch.bool: "*i1",
}  # fmt: skip
LIMIT = {80: 163 * 1024, 90: 227 * 1024}  # bytes of shared memory that a program may have


@dataclass(frozen=True)
class Made:
    """What ptxas says of a kernel: registers of a thread, bytes spilled (stored, loaded), shared memory."""

    registers: int
    spills: tuple[int, int]
    shared: int
    ptx: str


@dataclass(frozen=True)
class Launch:
    """A kernel's launch: ``types`` of its arguments, those ``even`` that 16 divides, and ``constants``."""

    kernel: Any
    grid: tuple[int, ...]
    types: tuple[tuple[str, str], ...]
    even: tuple[str, ...]
    constants: tuple[tuple[str, Any], ...]
    options: tuple[tuple[str, int], ...]

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)

    @classmethod
    def of(cls, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], given: dict[str, Any]) -> Launch:
        options = tuple((name, given.pop(name)) for name in ("num_warps", "num_stages") if name in given)
        values = dict(zip(kernel.arg_names, args, strict=False)) | given
        types, even, constants = dict[str, str](), [], dict[str, Any]()
        for param in kernel.params:
            name, value = param.name, values[param.name]
            special = not param.do_not_specialize
            if param.is_constexpr or value is None or (special and type(value) is int and value == 1):
                types[name], constants[name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                types[name] = TYPES[value.dtype]
                even += [name] if value.data_ptr() % 16 == 0 else []
            else:
                types[name] = "fp32" if isinstance(value, float) else "i32"
                even += [name] if special and type(value) is int and value % 16 == 0 else []
        return cls(kernel, grid, tuple(types.items()), tuple(even), tuple(constants.items()), options)

    def compiled(self, capability: int) -> Made:
        """Compile it for a GPU of a compute capability."""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.backends.nvidia.compiler import get_ptxas
        from triton.compiler import ASTSource

        attributes = {
            (place,): [["tt.divisibility", 16]]
            for place, name in enumerate(self.kernel.arg_names)
            if name in self.even
        }
        source = ASTSource(self.kernel, dict(self.types), dict(self.constants), attributes)
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(self.options))
        with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
            file.write(made.asm["ptx"])
            file.flush()
            target = re.search(r"\.target (\S+?)[,\s]", made.asm["ptx"])
            assert target is not None
            command = [get_ptxas(capability).path, "-v", f"-arch={target[1]}", file.name, "-o", "/dev/null"]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        used = re.search(r"Used (\d+) registers", said)
        spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
        assert used is not None and spilled is not None, said
        spills = int(spilled[1]), int(spilled[2])
        return Made(int(used[1]), spills, int(made.metadata.shared), made.asm["ptx"])


class _Noted:
    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self._kernel, self._launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **given: self._launches.append(Launch.of(self._kernel, grid, args, given))


@contextmanager
def noted(*modules: ModuleType) -> Iterator[list[Launch]]:
    """The launches of kernels that these modules define."""
    found: list[Launch] = []
    kernels = [
        (module, name, value)
        for module in modules
        for name, value in vars(module).items()
        if name.endswith("_kernel") and hasattr(value, "params")
    ]
    for module, name, kernel in kernels:
        setattr(module, name, _Noted(kernel, found))
    try:
        yield found
    finally:
        for module, name, kernel in kernels:
            setattr(module, name, kernel)


@dataclass(frozen=True)
class Shape:
    """Heads of a model's attention."""

    kv_heads: int
    group: int
    dim: int


MODELS = {
    "Qwen3-4B": Shape(8, 4, 128), "Qwen3-30B-A3B": Shape(4, 8, 128), "Llama-70B": Shape(8, 8, 128)
}  # fmt: skip


def launches(
    shape: Shape, kv_bits: Any, dtype: torch.dtype = torch.bfloat16, rows: int = 4, tokens: int = 1
) -> list[Launch]:
    """All kernels of a step of ``tokens`` (for many rows, of one each), of a chunk and of a compaction."""
    from mlx_kvret.core.bits import packings
    from mlx_kvret.core.config import EvictionConfig
    from mlx_kvret.cuda_backend.kernels import decode_attention, moving, prefill_attention, select
    from mlx_kvret.cuda_backend.pool import Pool
    from mlx_kvret.cuda_backend.view import Chunks, ChunkView, LayerView, Places

    cpu, heads, dim, wide = torch.device("cpu"), shape.kv_heads, shape.dim, 64
    pool = Pool(rows, 1, 2 * heads, cpu, packings(kv_bits, dim, dim))
    window = torch.zeros(rows, heads, wide, dim, dtype=dtype)
    pool.grow(32, window, window)
    places = Places(pool, torch.tensor([list(range(rows))] + [[7] * rows] * 5), cpu)
    many = LayerView(pool, 0, 1, window, window, places)
    one = LayerView(pool, 0, 1, window[:1, :, :50], window[:1, :, :50])
    count = heads * shape.group
    config = EvictionConfig(budget=8, buffer=1, min_per_head=1)
    with noted(decode_attention, moving, prefill_attention, select) as found:
        if tokens > 1:
            decode_attention.decode_attention(torch.zeros(1, count, tokens, dim, dtype=dtype), one, 0.1)
            return found
        decode_attention.decode_attention(torch.zeros(rows, count, 1, dim, dtype=dtype), many, 0.1)
        prefill_attention.prefill_attention(torch.zeros(1, count, 40, dim, dtype=dtype), one, 0.1)
        chunks = Chunks([(row, 8 * row, 8, 8, 0, row) for row in range(rows)], cpu)
        several = ChunkView(pool, 0, *(window[:1, :, :1].expand(-1, -1, 8 * rows, -1),) * 2, chunks)
        prefill_attention.prefill_attention(torch.zeros(rows, count, 8, dim, dtype=dtype), several, 0.1)
        new = window[:, :, :1]
        moving.append(new, new, places.slabs, places.length, window, window)
        newest = window[:1, :, :8].expand(2, -1, -1, -1)
        slots = torch.zeros(16 * heads, dtype=torch.int64)
        moving.fill(pool, slots, slots == 0, newest, newest)
        entries = torch.zeros(1, 200)
        select.select_triton(entries, entries.long(), entries.long(), 9, config, 2 * heads, 2 * heads)
    # a kernel for each two variants, of many launches
    return list({(one.name, one.constants): one for one in found}.values())
