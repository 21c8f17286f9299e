"""mlx-lm's prompt files from elsewhere: what is in them is checked before any of it is an index."""

import json

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache
from tiny import forward, gated, pieces, prompt

import mlx_kvret
from mlx_kvret.errors import CheckpointError, KVRetError, ModelMismatchError

MODELS = {name: gated(name) for name in ("qwen3", "gemma3_text")}
# arrays of the first competing layer by their place in the file; the second one is its own recent keys
HEADER, KEYS, LOG_BETA, POOL_KEYS, RETENTION, POSITION, OWNER = 0, 1, 3, 4, 6, 7, 8


@pytest.fixture(scope="module", params=MODELS)
def saved(request, tmp_path_factory):
    model, path = MODELS[request.param], str(tmp_path_factory.mktemp("prompt") / "prompt.safetensors")
    cache = mlx_kvret.make_cache(model, 12, buffer=5)
    for part in pieces(prompt(44), [16, 16, 9, 3]):
        forward(model, part, cache)
    save_prompt_cache(path, cache)
    first = next(i for i, entry in enumerate(cache) if type(entry).__name__ == "BoundedKVCache")
    return model, path, first


def opened(model, path):
    return mlx_kvret.mlx_backend.hooks.checked_cache(model, load_prompt_cache(path))


def changed(saved, target, edit, sealed=False):
    """The file with ``edit(arrays, header, first)`` made; unless ``sealed`` without its checksum."""
    _, path, first = saved
    arrays, metadata = mx.load(path, return_metadata=True)
    name = f"{first}.{HEADER}"
    header = json.loads("".join(map(chr, arrays[name].tolist())))
    assert header["checksum"].startswith("sha256:")
    if not sealed:
        del header["checksum"]
    header = edit(arrays, header, first) or header
    text = header if isinstance(header, str) else json.dumps(header)
    arrays[name] = mx.array([ord(c) for c in text])
    mx.save_safetensors(target, arrays, metadata)


def array(place, index, value):
    """Write one value into an array."""

    def edit(arrays, header, first):
        new = np.array(arrays[f"{first}.{place}"])
        new.reshape(-1)[index] = value
        arrays[f"{first}.{place}"] = mx.array(new)

    return edit


def shape(place, cut):
    def edit(arrays, header, first):
        arrays[f"{first}.{place}"] = mx.contiguous(cut(arrays[f"{first}.{place}"]))

    return edit


def text(**fields):
    return lambda arrays, header, first: header | fields


EDITS = {
    "owner far outside": array(OWNER, 0, 10**9),
    "owner outside": array(OWNER, 0, 10**5),
    "owner below": array(OWNER, 0, -5),
    "owner of the spill slot": array(OWNER, -1, 0),
    "owner of all": shape(OWNER, mx.zeros_like),
    "position outside": array(POSITION, 0, 10**9),
    "position below": array(POSITION, 0, -1),
    "position twice": shape(POSITION, mx.zeros_like),
    "retention": array(RETENTION, 0, np.nan),
    "retention above 0": array(RETENTION, 0, 0.5),
    "keys": array(POOL_KEYS, 0, np.nan),
    "new keys": array(KEYS, 0, np.inf),
    "log β": array(LOG_BETA, 0, 1.0),
    "owner of another type": shape(OWNER, lambda a: a.astype(mx.float32)),
    "keys of another type": shape(POOL_KEYS, lambda a: a.astype(mx.int8)),
    "keys of two types": shape(POOL_KEYS, lambda a: a.astype(mx.float16)),
    "fewer owners": shape(OWNER, lambda a: a[:-1]),
    "fewer keys": shape(POOL_KEYS, lambda a: a[1:]),
    "narrow keys": shape(POOL_KEYS, lambda a: a[:, :1]),
    "fewer new keys": shape(KEYS, lambda a: a[:, :, 1:]),
    "new keys of fewer heads": shape(KEYS, lambda a: a[:, :1]),
    "no heads": shape(LOG_BETA, lambda a: a[:0]),
    "no header": lambda *_: "[]",
    "a number": lambda *_: "3",
    "deep": lambda *_: "[" * 3000,
    "not JSON": lambda *_: '{"format": "kvret-prompt-cache 1", "seen": NaN}',
    "unknown field": text(more=1),
    "layer": text(layer=1),
    "layer far": text(layer=10**9),
    "capacity": text(capacity=10**9),
    "capacity of another": text(capacity=13),
    "counts": text(counts=[10**9]),
    "counts of others": text(counts=[1]),
    "no counts": text(counts=None),
    "seen": text(seen=3),
    "seen far": text(seen=10**12),
    "seen is true": text(seen=True),
    "owner of the file": text(owner=["a"]),
    "no model": text(owner={"gates": "x"}),
    "other gates": text(owner={"model": "", "gates": "x"}),
    "no eviction": text(eviction=None),
    "policy": text(eviction={"policy": "full"}),
    "budget": text(eviction={"budget": 10**9, "buffer": 5}),
    "buffer": text(eviction={"budget": 12, "buffer": 10**30}),
    "shape": text(shape={"layers": 10**8}),
    "shape of another": lambda a, header, f: header | {"shape": header["shape"] | {"layers": 10**8}},
    "shape of texts": lambda a, header, f: header | {"shape": header["shape"] | {"layers": "2"}},
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_what_no_cache_can_hold_is_refused(saved, tmp_path, edit):
    path = str(tmp_path / "changed.safetensors")
    changed(saved, path, edit)
    with pytest.raises((CheckpointError, ModelMismatchError)):
        opened(saved[0], path)
    with pytest.raises(KVRetError):
        saved[0](mx.array([[1]]), cache=load_prompt_cache(path))


def test_any_other_value_is_noticed_by_the_checksum(saved, tmp_path):
    path = str(tmp_path / "changed.safetensors")
    for edit in (array(POOL_KEYS, 3, 0.25), array(KEYS, 1, 0.25), array(RETENTION, 2, -0.5), text(seen=45)):
        changed(saved, path, edit, sealed=True)
        with pytest.raises(CheckpointError, match="the prompt file is damaged or was changed"):
            opened(saved[0], path)


def test_a_file_without_a_checksum_is_read(saved, tmp_path):
    """Those of earlier releases."""
    model, whole, _ = saved
    path = str(tmp_path / "old.safetensors")
    changed(saved, path, lambda *_: None)
    one, other = opened(model, path), opened(model, whole)
    assert np.array_equal(forward(model, [5], one), forward(model, [5], other))


@pytest.mark.parametrize("value", [10**9, 10**5, -1, 9])
@pytest.mark.parametrize("place", range(2, 6), ids=["offset", "keep", "max_size", "index"])
def test_windows_of_other_layers_are_the_model_s(tmp_path, place, value):
    model, path = MODELS["gemma3_text"], str(tmp_path / "prompt.safetensors")
    cache = mlx_kvret.make_cache(model, 12, buffer=5)
    forward(model, prompt(41), cache)
    save_prompt_cache(path, cache)
    other = next(i for i, entry in enumerate(cache) if type(entry).__name__ == "RotatingKVCache")
    arrays, metadata = mx.load(path, return_metadata=True)
    arrays[f"{other}.{place}"] = mx.array(value)
    mx.save_safetensors(path, arrays, metadata)
    with pytest.raises(CheckpointError, match=f"layer {other}"):
        opened(model, path)
