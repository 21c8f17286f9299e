"""One of several processes that hold tiny models together on MLX: python mlx_worker.py FOLDER SPLIT..."""

from __future__ import annotations

import pickle
import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import mlx.core as mx
from mlx_backend import tiny

import mlx_kvret
from ranks import cases

# by how a model is split: the file of mlx-lm, and what is changed of the tiny one
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "heads": (
        "llama",
        {"num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": 32, "intermediate_size": 96},
    ),
    "copies": ("deepseek_v3", {"num_attention_heads": 4, "num_key_value_heads": 4}),
    "layers": ("qwen2", {"num_hidden_layers": 5}),
}
SOME = ["global", "layer", "threshold", "ties over all heads"]
NAMES = {"heads": list(cases.CASES), "copies": SOME[:1], "layers": [*SOME, "random", "full", "modality"]}


def model_of(split: str, group: Any = None) -> Any:
    """A tiny model with random gates, split over the group."""
    name, changes = MODELS[split]
    changes = changes | {"vocab_size": cases.WORDS}
    gates = tiny.random_gates(tiny.shape_of(mlx_kvret.attach(tiny.tiny(name, **changes), gates=None)))
    model = tiny.tiny(name, **changes)
    if group is not None and split == "layers":
        model.model.pipeline(group)
    elif group is not None:
        model.shard(group)
    mx.eval(model.parameters())
    return mlx_kvret.attach(model, gates)


def work(split: str, folder: Path, group: Any = None, names: list[str] | None = None) -> Any:
    model = model_of(split, group)
    told = NAMES[split] if names is None else names
    return cases.everything(model, partial(tiny.forward, model), folder, told, split != "copies")


if __name__ == "__main__":
    together = mx.distributed.init(strict=True)
    for split in sys.argv[2:]:
        where = Path(sys.argv[1]) / split
        result = work(split, where, together)
        (where / f"{together.rank()}.pickle").write_bytes(pickle.dumps(result))
