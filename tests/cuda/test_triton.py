"""The kernels' tests run in a process whose triton interprets from the start; here they are also compiled."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is for Linux only; CI installs it")

from mlx_kvret.cuda_backend.kernels import decode_attention  # noqa: E402

from .launches import LIMIT, MODELS, Shape, launches, noted  # noqa: E402
from .views import random_view  # noqa: E402

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="an interpreted kernel is not compiled"
)

BITS: list[Any] = [None, 8, "k8v4", 4]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kv_bits", BITS)
def test_kernels_compile_for_gpus(kv_bits: Any, capability: int) -> None:
    made = launches(Shape(kv_heads=2, group=2, dim=32), kv_bits)
    names = {launch.name for launch in made}
    assert len(names) == 7 and len(made) == 12
    for launch in made:
        # what depends on bits has an argument for scales
        if kv_bits is None or dict(launch.constants).get("KEY_BITS", 16) != 16:
            assert launch.compiled(capability).shared <= LIMIT[capability]


@pytest.mark.parametrize("kv_bits", BITS)
def test_decoding_spills_no_registers(kv_bits: Any) -> None:
    decode = next(one for one in launches(MODELS["Qwen3-4B"], kv_bits) if "fwd" in one.name)
    made = decode.compiled(90)
    assert made.spills == (0, 0) and made.shared <= LIMIT[80]


def test_entries_move_sixteen_bytes_at_a_time() -> None:
    found = [
        one for one in launches(MODELS["Qwen3-4B"], None) if one.name in ("append_kernel", "fill_kernel")
    ]
    assert len(found) == 2
    for launch in found:
        moves = re.findall(
            r"(?:ld|st)\.global\S*?\.(v4\.b32|b16|v2\.b16|b32|v2\.b32)\b", launch.compiled(90).ptx
        )
        # slots and places are read one by one
        assert moves.count("v4.b32") == 4 and "b16" not in moves and "v2.b16" not in moves, (
            launch.name,
            moves,
        )


def test_a_pool_that_grows_compiles_nothing_again() -> None:
    found: dict[str, set[Any]] = {}
    # pools of any size, and any number of tokens; layers, too, only differ in what is not looked at
    for capacity, tokens in ((16, 1), (60, 2), (500, 3), (1024, 1)):
        view = random_view(1, 2, 40, 16, 16, torch.float32, capacity)
        with noted(decode_attention) as made:
            decode_attention.decode_attention(torch.randn(1, 4, tokens, 16), view, 0.3)
        for launch in made:
            found.setdefault(launch.name, set()).add((launch.types, launch.even, launch.constants))
    assert len(found) == 2 and all(len(variants) == 1 for variants in found.values())


def test_kernels_equal_their_twins() -> None:
    command = [sys.executable, "-m", "pytest", "-rs", str(Path(__file__).with_name("test_kernels.py"))]
    # on a GPU they run as they are
    how = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=os.environ | how, capture_output=True, text=True)
    assert run.returncode == 0 and "SKIPPED" not in run.stdout, run.stdout
