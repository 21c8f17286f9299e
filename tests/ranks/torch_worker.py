"""One of several processes that hold a tiny model together on torch: torch_worker.py FOLDER MODEL CASES."""

from __future__ import annotations

import pickle
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from cuda import tiny
from transformers import AutoConfig, AutoModelForCausalLM

import mlx_kvret
from mlx_kvret.cuda_backend.cache import cache_argument
from ranks import cases

SIZES = {"num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": 32, "vocab_size": cases.WORDS}


def save(folder: Path) -> None:
    """A folder with a tiny model of random weights."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **tiny.SIZES | SIZES | {"hidden_size": 48})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def work(folder: Path, source: Path, names: list[str] | None = None, **how: Any) -> dict[str, Any]:
    model = AutoModelForCausalLM.from_pretrained(source, **how).eval().requires_grad_(False)
    mlx_kvret.attach(model, tiny.checkpoint(model, model.config.num_hidden_layers))

    def forward(tokens: list[int], cache: Any) -> np.ndarray:
        with torch.no_grad():
            return model(torch.tensor([tokens]), **cache_argument(model, cache)).logits[0].numpy()

    return cases.everything(model, forward, folder, list(cases.CASES) if names is None else names)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    found = work(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:] or None, tp_plan="auto")
    rank = torch.distributed.get_rank()
    (Path(sys.argv[1]) / f"{rank}.pickle").write_bytes(pickle.dumps(found))
    torch.distributed.destroy_process_group()
