"""Every form of file that is read, a sound one of each, and what reading it gives.

``tensors`` of what was read must be those that were written wherever a checksum stands over them; ``rest`` is
everything else, in which a legal other value may stand.
"""

from __future__ import annotations

import functools
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mlx_kvret import demo
from mlx_kvret.core.checkpoint import save_gates
from mlx_kvret.core.tensors import Tensor

from .run_files import (
    load_log,
    load_records,
    load_results,
    load_samples,
    load_state,
    make_log,
    make_records,
    make_results,
    make_samples,
    make_state,
)
from .sound import CHAT, TOKENS, Content, Form, TheirRefusal, gates

# ---------------------------------------------------------------- gates


def make_gates(to: str, bits: int | None = None) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        from mlx_kvret.converters import convert

        sound = gates()
        save_gates(folder / "shared", sound.config, sound.tensors, sound.provenance)
        convert(folder / "shared", folder / "it", to, bits=bits, model=demo.MODEL if to == "trimkv" else None)
        for file in (folder / "it").iterdir():
            file.rename(folder / file.name)
        shutil.rmtree(folder / "shared")
        (folder / "it").rmdir()

    return make


def load_gates(folder: Path) -> Content:
    from mlx_kvret.converters import load_any

    found = load_any(folder)
    return Content.of(found.tensors, (found.config, found.provenance))


# ---------------------------------------------------------------- caches


@functools.cache
def mlx_model() -> Any:
    from mlx_backend.tiny import gated

    return gated("gemma3_text", vocab_size=32)


@functools.cache
def torch_model() -> Any:
    from cuda.tiny import checkpoint, tiny_model

    import mlx_kvret

    model = tiny_model("gemma3_text")
    return mlx_kvret.attach(model, checkpoint(model, 2))


def read(model: Any, cache: Any, ids: list[int]) -> np.ndarray:
    """Logits of the last token."""
    if hasattr(model, "set_attn_implementation"):
        import torch

        with torch.no_grad():
            return model(torch.tensor([ids]), past_key_values=cache).logits[0, -1].numpy()
    import mlx.core as mx

    return np.array(model(mx.array([ids]), cache=cache)[0, -1])


def went_on(model: Any, cache: Any) -> None:
    """Two more passes and a compaction with what was read: an index out of range would be met here."""
    for ids in ([1, 2, 3], [4]):
        if not np.isfinite(read(model, cache, ids)).all():
            raise AssertionError("the cache goes on with NaN")
    assert cache.entries and cache.kept_positions()


def make_snapshot(model: Callable[[], Any]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        import mlx_kvret

        cache = mlx_kvret.make_cache(model(), 6, buffer=3)
        for part in (TOKENS[:20], TOKENS[20:27], TOKENS[27:]):
            read(model(), cache, part)
        mlx_kvret.save_cache(model(), cache, folder / "it.safetensors", {"messages": json.dumps(CHAT)})

    return make


def load_snapshot(model: Callable[[], Any]) -> Callable[[Path], Content]:
    def load(folder: Path) -> Content:
        import mlx_kvret
        from mlx_kvret.core.tensors import read_file

        cache, _ = mlx_kvret.load_cache(model(), folder / "it.safetensors")
        went_on(model(), cache)
        return Content.of(*read_file(folder / "it.safetensors"))

    return load


def make_prompt_file(folder: Path) -> None:
    from mlx_lm.models.cache import save_prompt_cache

    import mlx_kvret

    cache = mlx_kvret.make_cache(mlx_model(), 6, buffer=3)
    for part in (TOKENS[:20], TOKENS[20:28]):
        read(mlx_model(), cache, part)
    save_prompt_cache(str(folder / "it.safetensors"), cache, {"note": "kept"})


def load_prompt_file(folder: Path) -> Content:
    from mlx_lm.models.cache import load_prompt_cache

    from mlx_kvret.errors import KVRetError
    from mlx_kvret.mlx_backend import hooks, snapshots

    try:
        layers = load_prompt_cache(str(folder / "it.safetensors"))
    except KVRetError:
        raise
    except Exception as error:
        if not _in_our_code(error):
            raise TheirRefusal(str(error)) from error
        raise
    cache = hooks.checked_cache(mlx_model(), layers)
    taken = snapshots.take(cache, {})
    content = Content.of(
        {"keys": taken.keys, "values": taken.values, "retention": Tensor.of(taken.retention)}, taken.eviction
    )
    content.tensors |= {"position": taken.position.tobytes(), "counts": taken.counts.tobytes()}
    went_on(mlx_model(), cache)
    return content


def _in_our_code(error: BaseException) -> bool:
    place, inside = error.__traceback__, False
    while place is not None:
        inside = inside or "/mlx_kvret/" in place.tb_frame.f_code.co_filename
        place = place.tb_next
    return inside


# ---------------------------------------------------------------- models


def make_model(*without: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        for file in demo.MODEL.iterdir():
            if file.name not in without:
                shutil.copy(file, folder / file.name)

    return make


TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def load_model(backend: str) -> Callable[[Path], Content]:
    def load(folder: Path) -> Content:
        import mlx_kvret

        model, _ = mlx_kvret.load(folder, backend=backend)  # type: ignore[arg-type]
        cache = mlx_kvret.make_cache(model, 8, policy="recent")
        logits = read(model, cache, [1, 2, 3])
        return Content({}, str(bool(np.isfinite(logits).all())))

    return load


def load_shape(folder: Path) -> Content:
    from mlx_kvret.cuda_backend.api import cache_shape

    return Content(rest=str(cache_shape(folder)[1]))


def load_tokenizer(backend: str) -> Callable[[Path], Content]:
    def load(folder: Path) -> Content:
        from mlx_kvret.core.prompts import prompt_ids

        if backend == "mlx":
            from mlx_kvret.mlx_backend.api import read_tokenizer

            found = read_tokenizer(folder, {})
        else:
            from mlx_kvret.cuda_backend.api import read_tokenizer

            found = read_tokenizer(folder)
        ids = prompt_ids(found, "remember Ada red", True)
        return Content(rest=repr((ids, prompt_ids(found, CHAT[:1], True))))

    return load


warnings.simplefilter("ignore")
FORMS: dict[str, Form] = {
    "gates shared": Form(make_gates("shared"), load_gates, ("kvret.json", "gates.safetensors"), True),
    "gates mlx": Form(make_gates("mlx", 8), load_gates, ("kvret.json", "gates.safetensors"), True),
    "gates torch": Form(make_gates("torch"), load_gates, ("kvret.json", "gates.safetensors"), True),
    "gates trimkv": Form(make_gates("trimkv"), load_gates, ("config.json", "trimkv_weights.pth"), True),
    "cache mlx": Form(make_snapshot(mlx_model), load_snapshot(mlx_model), ("it.safetensors",), True),
    "cache torch": Form(make_snapshot(torch_model), load_snapshot(torch_model), ("it.safetensors",), True),
    "prompt file": Form(make_prompt_file, load_prompt_file, ("it.safetensors",), True),
    "training state": Form(make_state, load_state, ("training.safetensors",), True),
    "training log": Form(make_log, load_log, ("log.csv",)),
    "training records": Form(make_records, load_records, ("it.jsonl",)),
    "results": Form(make_results, load_results, ("it.json",)),
    "longbench": Form(make_samples("longbench"), load_samples("longbench"), ("it.jsonl",)),
    "ruler": Form(make_samples("ruler"), load_samples("ruler"), ("it.jsonl",)),
    "longmemeval": Form(make_samples("longmemeval"), load_samples("longmemeval"), ("it.json",)),
    "model mlx": Form(make_model(*TOKENIZER), load_model("mlx"), ("config.json",), slow=True),
    "model torch": Form(make_model(*TOKENIZER), load_model("torch"), ("config.json",), slow=True),
    "weights mlx": Form(make_model(*TOKENIZER), load_model("mlx"), ("model.safetensors",), slow=True),
    "shape torch": Form(make_model(*TOKENIZER), load_shape, ("config.json",), slow=True),
    "tokenizer mlx": Form(make_model("model.safetensors"), load_tokenizer("mlx"), TOKENIZER),
    "tokenizer torch": Form(make_model("model.safetensors"), load_tokenizer("torch"), TOKENIZER),
}
