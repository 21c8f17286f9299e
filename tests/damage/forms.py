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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mlx_kvret import demo
from mlx_kvret.core.checkpoint import GateCheckpoint, save_gates
from mlx_kvret.core.config import GateConfig
from mlx_kvret.core.fingerprint import fingerprint
from mlx_kvret.core.tensors import Tensor

CHAT = [
    {"role": "user", "content": "remember Ada red recall Ada"},
    {"role": "assistant", "content": "red"},
]
TOKENS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6, 2, 6, 4, 3, 3, 8, 3, 2, 7]


class TheirRefusal(Exception):
    """A loader of another library refused a file before any of our code saw it."""


@dataclass
class Content:
    """What was read: bytes of tensors by name, all of them finite, and the rest as text."""

    tensors: dict[str, bytes] = field(default_factory=dict)
    rest: str = ""

    @classmethod
    def of(cls, tensors: dict[str, Tensor], rest: Any = None) -> Content:
        for name, tensor in tensors.items():
            if not tensor.finite:
                raise AssertionError(f"{name} was read with NaN or infinity in it")
        return cls({name: t.dtype.encode() + t.bits.tobytes() for name, t in tensors.items()}, repr(rest))


@dataclass(frozen=True)
class Form:
    """``make`` writes sound files into a folder, ``load`` reads the folder; ``damaged`` names may be changed.

    ``sealed``: a checksum stands over tensors and texts. ``slow``: a whole model is built.
    """

    make: Callable[[Path], None]
    load: Callable[[Path], Content]
    damaged: tuple[str, ...]
    sealed: bool = False
    slow: bool = False


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


# ---------------------------------------------------------------- gates


def gates() -> GateCheckpoint:
    model = json.loads((demo.MODEL / "config.json").read_text())
    config = GateConfig("rg10", 3, 2, 64, 32, training_budget=16, base_fingerprint=fingerprint(model))
    made = rng()
    return GateCheckpoint(
        config, {n: Tensor.of(made.normal(size=s)) for n, s in config.tensor_shapes().items()}, {"from": "x"}
    )


def make_gates(to: str, bits: int | None = None) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        from converters import convert

        sound = gates()
        save_gates(folder / "shared", sound.config, sound.tensors, sound.provenance)
        convert(folder / "shared", folder / "it", to, bits=bits, model=demo.MODEL if to == "trimkv" else None)
        for file in (folder / "it").iterdir():
            file.rename(folder / file.name)
        shutil.rmtree(folder / "shared")
        (folder / "it").rmdir()

    return make


def load_gates(folder: Path) -> Content:
    from converters import load_any

    found = load_any(folder)
    return Content.of(found.tensors, (found.config, found.provenance))


# ---------------------------------------------------------------- caches


@functools.cache
def mlx_model() -> Any:
    from mlx_wing.tiny import gated

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

    from mlx_kvret import hooks, snapshots
    from mlx_kvret.errors import KVRetError

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


# ---------------------------------------------------------------- training and evaluation


SETTINGS = {"width": 32, "data": [{"name": "a", "records": 3}]}


def make_state(folder: Path) -> None:
    from mlx_kvret.training import state

    sound = gates()
    tensors = {
        f"{kind}.{name}": Tensor.of(abs(t.bits) if kind == "square" else t.bits)
        for kind in ("gates", "mean", "square")
        for name, t in sound.tensors.items()
    }
    tensors["random.torch"] = Tensor("U8", np.zeros(16, np.uint8))
    losses = dict.fromkeys(("loss", "kl", "cross_entropy", "capacity", "soft_size", "soft_share"), 0.5)
    values = {"step": 3, "tokens": 99, "losses": losses, "position": [0, 2, 1, 0.5]}
    state.save(folder, SETTINGS, values, tensors)


def load_state(folder: Path) -> Content:
    from mlx_kvret.training import state

    values, tensors = state.load(folder, SETTINGS)
    state.check(folder, tensors, values["step"], gates().config)
    return Content.of(tensors, values)


def make_log(folder: Path) -> None:
    from mlx_kvret.training.log import COLUMNS, CsvLog

    log = CsvLog(folder / "log.csv", 0)
    for step in (1, 2, 3):
        log.write(dict.fromkeys(COLUMNS, 0.25) | {"step": step})
    log.close()


def load_log(folder: Path) -> Content:
    from mlx_kvret.errors import ConfigError
    from mlx_kvret.training.log import read_log

    if not (folder / "log.csv").exists():
        raise ConfigError("no log, no reading")
    return Content(rest=repr(read_log(folder / "log.csv")))


def make_records(folder: Path) -> None:
    tools = [{"type": "function", "function": {"name": "look"}}]
    rows = [
        {"text": "remember Ada red"},
        {"messages": CHAT, "id": 7},
        {
            "messages": [{"role": "user", "content": [{"type": "text", "text": "red"}]}, CHAT[1]],
            "tools": tools,
        },
    ]
    (folder / "it.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@functools.cache
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(demo.MODEL)
    found.chat_template = (
        "{% if tools %}{{ tools | tojson }} {% endif %}{% for m in messages %}<s> {{ m.role }} "
        "{% if m.content is string %}{{ m.content }}{% else %}{{ m.content[0].text }}{% endif %} . "
        "{% endfor %}"
    )
    return found


def load_records(folder: Path) -> Content:
    from mlx_kvret.training.documents import document
    from mlx_kvret.training.records import Records

    records = Records([folder / "it.jsonl"])
    made = [document(records.read(i), tokenizer(), "all") for i in range(len(records))]
    return Content(rest=repr([one.ids.tolist() for one in made]))


def make_results(folder: Path) -> None:
    from mlx_kvret.evaluation.results import Cell, Results

    results = Results({"model": "m", "seed": 1}, {"a": "0123456789ab"}, path=folder / "it.json")
    for budget in ("1/4", "1/16"):
        results.add(Cell("facts", 64, budget, "learned", "a", "mlx", "exact", (0.5, 1.0), 12.5, 0.25))


def load_results(folder: Path) -> Content:
    from mlx_kvret.evaluation.report import entries, markdown
    from mlx_kvret.evaluation.results import read_results

    results = read_results(folder / "it.json")
    return Content(rest=f"{results} {entries(results)} {markdown(results)}")


class Letters:
    """A tokenizer of letters."""

    bos_token_id = None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        text.encode()
        return [ord(c) for c in text]


SAMPLES: dict[str, Any] = {
    "longbench": [{"context": "a b c", "input": "d?", "answers": ["a"], "all_classes": ["a", "b"]}] * 2,
    "ruler": [{"input": "a b\nc?", "outputs": ["a", "b"], "answer_prefix": " So"}] * 2,
    "longmemeval": [
        {
            "question": "a?",
            "answer": 3,
            "haystack_dates": ["May 1"],
            "haystack_sessions": [[{"role": "user", "content": "a", "has_answer": True}]],
        }
    ],
}


def make_samples(kind: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        rows = SAMPLES[kind]
        text = json.dumps(rows) if kind == "longmemeval" else "".join(json.dumps(r) + "\n" for r in rows)
        (folder / ("it.json" if kind == "longmemeval" else "it.jsonl")).write_text(text)

    return make


def load_samples(kind: str) -> Callable[[Path], Content]:
    def load(folder: Path) -> Content:
        from mlx_kvret.evaluation.tasks import make_samples as read_samples

        name = "it.json" if kind == "longmemeval" else "it.jsonl"
        return Content(rest=repr(read_samples(f"{kind}:{folder / name}", 0, 9, 0, Letters())))

    return load


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
    from cuda_backend.wing import cache_shape

    return Content(rest=str(cache_shape(folder)[1]))


def load_tokenizer(backend: str) -> Callable[[Path], Content]:
    def load(folder: Path) -> Content:
        from mlx_kvret.core.prompts import prompt_ids

        if backend == "mlx":
            from mlx_kvret.wing import read_tokenizer

            found = read_tokenizer(folder, {})
        else:
            from cuda_backend.wing import read_tokenizer

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
