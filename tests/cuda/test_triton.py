"""The kernels' tests run in a process whose triton interprets from the start; here they are also compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is for Linux only; CI installs it")

from mlx_kvret.cuda_backend.kernels import decode_attention, moving, prefill_attention, select  # noqa: E402

from .test_kernels import random_view  # noqa: E402

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="an interpreted kernel is not compiled"
)

ENTRIES = ["p_query", "p_pool_key", "p_pool_value", "p_key", "p_value", "p_sinks"]
TYPES = dict.fromkeys(ENTRIES, "*bf16") | {
    "p_table": "*i32", "p_offsets": "*i32", "p_slabs": "*i64", "p_length": "*i64", "p_max": "*fp32",
    "p_sum": "*fp32", "p_part": "*fp32", "p_high": "*i64", "p_low": "*i64", "p_segment": "*i32",
    "p_prefix": "*i64", "p_counts": "*i32", "p_wanted": "*i32", "p_slots": "*i64", "p_keep": "*i1",
    "scale": "fp32", "softcap": "fp32",
}  # fmt: skip
# the shapes of Qwen3-4B
SHAPES = {
    "KV_HEADS": 8, "GROUP": 4, "KEY": 128, "VALUE": 128, "WIDTH": 32,
    "ROWS": 16, "BLOCK": 64, "BLOCK_KEY": 128, "BLOCK_VALUE": 128, "IN_LOW": True,
}  # fmt: skip
CASES: list[tuple[Any, dict[str, Any]]] = [
    (decode_attention.decode_attention_fwd_kernel, {"p_out": "*fp32"}),
    (decode_attention.decode_attention_merge_kernel, {"p_out": "*bf16"}),
    (prefill_attention.prefill_attention_fwd_kernel, {"p_out": "*bf16"}),
    (select.rank_histogram_kernel, {}),
    (select.rank_digit_kernel, {}),
    (moving.fill_kernel, {}),
]


@pytest.mark.parametrize(("capability", "flag"), [(80, True), (90, False)])
@pytest.mark.parametrize(("kernel", "types"), CASES, ids=[case[0].__name__ for case in CASES])
def test_kernels_compile_for_gpus(kernel: Any, types: dict[str, str], capability: int, flag: bool) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {n: SHAPES.get(n, flag) for n in kernel.arg_names if n.isupper()}
    signature = {n: (TYPES | types).get(n, "i32") for n in kernel.arg_names}
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, signature, constants)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert made.asm["cubin"]
    assert made.metadata.shared <= (163 if capability == 80 else 227) * 1024


def test_a_pool_that_grows_compiles_nothing_again(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[Any]] = {}

    class Recorded:
        """Notes what a call would be compiled for."""

        def __init__(self, kernel: Any) -> None:
            self._kernel = kernel

        def __getitem__(self, grid: Any) -> Any:
            return self._called

        def _called(self, *args: Any, **options: Any) -> None:
            given = dict(zip(self._kernel.arg_names, args, strict=False)) | options
            free = {param.name for param in self._kernel.params if param.do_not_specialize}
            traits = {
                name: (value == 1, value % 16 == 0)
                if type(value) is int and not name.isupper()
                else getattr(value, "dtype", value)
                for name, value in given.items()
                if name not in free
            }
            seen.setdefault(self._kernel.__name__, []).append(traits)

    for name in ("decode_attention_fwd_kernel", "decode_attention_merge_kernel"):
        monkeypatch.setattr(decode_attention, name, Recorded(getattr(decode_attention, name)))
    # pools of any size, and any number of tokens; layers, too, only differ in what is not looked at
    for capacity, tokens in ((16, 1), (60, 2), (500, 3), (1024, 1)):
        view = random_view(1, 2, 40, 16, 16, torch.float32, capacity)
        decode_attention.decode_attention(torch.randn(1, 4, tokens, 16), view, 0.3)
    assert len(seen) == 2 and all(len(made) == 4 for made in seen.values())
    assert all(traits == made[0] for made in seen.values() for traits in made)


def test_kernels_equal_their_twins() -> None:
    command = [sys.executable, "-m", "pytest", "-rs", str(Path(__file__).with_name("test_kernels.py"))]
    run = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0 and "SKIPPED" not in run.stdout, run.stdout
