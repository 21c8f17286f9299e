"""MLX's streams are a thread's own: whatever is made, loaded or copied in one thread works in another."""

import copy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import mlx_lm
import mlx_lm.models.cache as mlx_cache
import pytest
from tiny import gated, prompt, tiny

import mlx_kvret
from mlx_kvret import demo

SMALL = {"budget": 12, "buffer": 8}
POLICIES = ["learned", "recent", "keydiff", "full"]


def apart(function, *args):
    """A function's result, from a thread that lives no longer than the call."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *args).result()


def answer(model, cache):
    return mlx_kvret.generate(model, None, [1, 2, 3], cache=cache, max_tokens=12)


def read(model, policy, chunk=50):
    """A cache that has read 50 tokens, of which nobody has looked at anything."""
    cache, ids = mlx_kvret.make_cache(model, policy=policy, **SMALL), prompt(50)
    for start in range(0, 50, chunk):
        model(mx.array([ids[start : start + chunk]]), cache=cache)
    return cache


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["qwen3", "gemma3_text", "deepseek_v3"])
def test_a_cache_goes_from_thread_to_thread(name, policy):
    model = gated(name)
    expected = answer(model, read(model, policy))
    assert apart(answer, model, read(model, policy)) == expected
    assert answer(model, apart(read, model, policy)) == expected
    assert answer(model, apart(copy.deepcopy, read(model, policy))) == expected
    assert apart(answer, model, copy.deepcopy(apart(read, model, policy))) == expected
    cache = mlx_kvret.make_cache(model, policy=policy, **SMALL)
    apart(lambda: mx.eval(model(mx.array([prompt(50)]), cache=cache)))
    assert answer(model, cache) == expected
    seen = apart(lambda: (cache.entries, cache.nbytes, len(cache.kept_positions()), cache.seen))
    assert seen == (cache.entries, cache.nbytes, len(cache.kept_positions()), 65)


@pytest.mark.parametrize("chunk", [1, 4, 9])
def test_few_tokens_at_a_time(chunk):
    model = gated()
    expected = answer(model, read(model, "learned", chunk))
    assert answer(model, apart(read, model, "learned", chunk)) == expected


@pytest.mark.parametrize("name", ["qwen3", "gemma3_text"])
def test_saved_caches_are_loaded_in_any_thread(tmp_path, name):
    model = gated(name)
    ours, theirs = tmp_path / "ours.safetensors", str(tmp_path / "theirs.safetensors")
    mlx_kvret.save_cache(model, apart(read, model, "learned"), ours)
    mlx_cache.save_prompt_cache(theirs, apart(read, model, "learned"))
    expected = answer(model, read(model, "learned"))
    assert answer(model, apart(lambda: mlx_kvret.load_cache(model, ours)[0])) == expected
    if name == "qwen3":  # mlx-lm leaves a sliding layer's arrays to whoever reads them
        assert answer(model, apart(mlx_cache.load_prompt_cache, theirs)) == expected


def test_models_are_loaded_attached_and_copied_in_any_thread():
    expected = mlx_kvret.generate(*mlx_kvret.load("demo"), prompt(40), max_tokens=8, **SMALL)
    model, tokenizer = apart(mlx_kvret.load, "demo")
    assert mlx_kvret.generate(model, tokenizer, prompt(40), max_tokens=8, **SMALL) == expected
    twin = apart(copy.deepcopy, model)
    assert mlx_kvret.generate(twin, tokenizer, prompt(40), max_tokens=8, **SMALL) == expected
    stock, _ = apart(mlx_lm.load, str(demo.MODEL))
    apart(lambda: mlx_kvret.attach(stock, demo.GATES, **SMALL))
    assert mlx_kvret.generate(stock, tokenizer, prompt(40), max_tokens=8) == expected


def test_arrays_that_a_model_has_beside_its_weights_are_computed():
    scaled = {"rope_scaling": {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0,
              "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}  # fmt: skip
    model = apart(lambda: mlx_kvret.attach(tiny("llama", **scaled)))
    assert any(
        name.startswith("_") for m in model.modules() for name, v in m.items() if isinstance(v, mx.array)
    )
    assert mlx_kvret.generate(model, None, prompt(40), max_tokens=3, policy="recent", **SMALL)


AT_ONCE = """
import os, sys, threading
from concurrent.futures import ThreadPoolExecutor

sys.path[:0] = sys.argv[1:]
from test_threads import answer, gated, read

model = gated()
expected, barrier = answer(model, read(model, "learned")), threading.Barrier(4)

def run(_):
    barrier.wait()
    return [answer(model, read(model, "learned")) == expected for _ in range(3)]

with ThreadPoolExecutor(4) as pool:
    print(list(pool.map(run, range(4))), flush=True)
os._exit(0)  # MLX 0.32 does not come to an end once several threads have computed at a time
"""


def test_several_threads_generate_at_once_each_with_its_cache():
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", AT_ONCE, here, here.parent], capture_output=True, text=True, timeout=200
    )
    assert done.stdout.strip() == str([[True] * 3] * 4), done.stderr[-2000:]
