"""Streams that a program leaves open when it ends say nothing about it."""

import subprocess
import sys

import pytest

PROGRAM = """
import sys

import mlx_kvret

model, tokenizer = mlx_kvret.load("demo", backend=sys.argv[1])
prompt, room = "remember Stella salmon", {"budget": 32}
open_streams = [
    mlx_kvret.stream_generate(model, tokenizer, prompt, **room),
    mlx_kvret.stream_batch(model, tokenizer, [prompt, "recall Stella"], **room),
]
if sys.argv[1] == "mlx":
    import mlx_lm

    cache = mlx_kvret.make_cache(model, **room)
    open_streams.append(mlx_lm.stream_generate(model, tokenizer, prompt, prompt_cache=cache))
for stream in open_streams:
    next(stream)
print("left")
"""


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_nothing_is_said(backend):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM, backend], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "left\n"), done.stderr
    assert "Exception" not in done.stderr and "Error" not in done.stderr
