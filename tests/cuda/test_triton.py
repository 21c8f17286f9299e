"""The kernels' tests run in a process whose triton interprets from the start; here they are also compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="Triton is for Linux only; CI installs it")

from mlx_kvret.cuda_backend.kernels import decode_attention, moving, prefill_attention, select  # noqa: E402

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
    "KV_HEADS": 8, "GROUP": 4, "TOKENS": 1, "KEY": 128, "VALUE": 128, "PIECES": 132,
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


def test_kernels_equal_their_twins() -> None:
    command = [sys.executable, "-m", "pytest", "-rs", str(Path(__file__).with_name("test_kernels.py"))]
    run = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0 and "SKIPPED" not in run.stdout, run.stdout
