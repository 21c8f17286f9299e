"""One of two processes that train with a base they share: shard_worker.py FOLDER, which holds cases.json.

Without a rank it is one process alone, which takes the cases of alone.json.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import distributed

from mlx_kvret.cuda_backend.training import engine
from mlx_kvret.errors import KVRetError
from mlx_kvret.training.config import TrainConfig
from mlx_kvret.training.packing import Batch
from mlx_kvret.training.records import Records
from mlx_kvret.training.report import Losses
from mlx_kvret.training.run import RunOptions


def held() -> int:
    """Bytes of all tensors in this process; a file's storage counts as far as tensors reach in it."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    reach = dict[int, tuple[int, int]]()
    for tensor in (getattr(thing, "_local_tensor", thing) for thing in found):
        storage, size = tensor.untyped_storage(), tensor.element_size()
        first = tensor.storage_offset() * size
        last = min(first + tensor.numel() * size, storage.nbytes())
        low, high = reach.get(storage.data_ptr(), (first, last))
        reach[storage.data_ptr()] = min(low, first), max(high, last)
    return sum(high - low for low, high in reach.values())


class Watched(engine.Engine):
    """Notes what weights of the base lie in this process, and may die in a step."""

    dies: int | None = None
    seen: ClassVar[dict[str, int]] = {}

    def gradient(self, batch: Batch, slack: float) -> Losses:
        losses = super().gradient(batch, slack)
        self.seen["base"] = sum(weight.nbytes for weight in self.student.model.parameters())
        self.seen["held"] = held()
        shards = self.student.shards
        with shards.whole():
            self.seen["outer"] = held() - self.seen["held"]
        layer = self.student.model.get_decoder().layers[0]
        self.seen["layer"] = sum(weight.nbytes for weight in layer.parameters())
        self.seen["gathered"] = shards.gathered
        self.seen["fixed"] = self.memory.fixed
        if self.dies is not None:
            Watched.dies = self.dies - 1
            if self.dies == 0:
                os._exit(3)
        return losses


def options(folder: Path, case: dict[str, Any]) -> RunOptions:
    """How a case is run, in one process as in two."""
    return RunOptions(folder / case["name"], device="cpu", save_every=2, **case.get("options", {}))


def go(folder: Path, case: dict[str, Any], shard: bool = True) -> dict[str, int]:
    """A case's run, from its start or checkpoint; what lay in this process after its last step."""
    config, records = TrainConfig(**case["config"]), Records([case["data"]])
    Watched.seen = {}
    how = replace(options(folder, case), shard=shard)
    engine.Engine, stock = Watched, engine.Engine  # type: ignore[misc]
    try:
        model = case.get("second", case["model"]) if os.environ.get("RANK") == "1" else case["model"]
        engine.train(model, records, config, how)
    finally:
        engine.Engine = stock  # type: ignore[misc]
    return Watched.seen


def main(folder: Path) -> None:
    rank = os.environ.get("RANK", "alone")
    for case in json.loads((folder / ("alone.json" if rank == "alone" else "cases.json")).read_text()):
        for name, value in case.get("environment", {}).items():
            os.environ[name] = value
        Watched.dies = case.get("dies") if rank == "1" else None
        try:
            found: Any = go(folder, case, case.get("shard", True))
        except KVRetError as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        for name in case.get("environment", {}):
            os.environ.pop(name, None)
        (folder / f"{case['name']}.{rank}.json").write_text(json.dumps(found))
        if "error" in found and "gone" in found["error"]:
            os._exit(4)
    if rank != "alone":
        distributed.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]))
