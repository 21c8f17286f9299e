"""Files of training and evaluation, a sound one of each form, and what reading it gives."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mlx_kvret import demo
from mlx_kvret.core.tensors import Tensor

from .sound import CHAT, Content, gates

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
