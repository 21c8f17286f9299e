"""A base that two processes share: losses, gates and checkpoints are those of one, each with half of it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranks.processes import HERE, gloo
from ranks.processes import run as run_ranks
from vision.folders_torch import folder as vision_folder

from mlx_kvret.core.checkpoint import load_gates
from mlx_kvret.cuda_backend.training.engine import train
from mlx_kvret.demo import MODEL
from mlx_kvret.errors import ConfigError, UnsupportedFeatureError
from mlx_kvret.training.config import TrainConfig
from mlx_kvret.training.log import read_log
from mlx_kvret.training.records import Records
from mlx_kvret.training.run import RunOptions

from . import shard_worker
from .chats import write_chats

pytest.importorskip("accelerate")

SETTINGS: dict[str, Any] = {
    "width": 16, "bias": 4.0, "budget": 4, "length": 64, "batch": 5, "loss": "assistant",
    "learning_rate": 1e-2, "steps": 3,
}  # fmt: skip
# as accelerate says it
FSDP = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_SHARDING_STRATEGY": "FULL_SHARD",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}  # fmt: skip
# rows are summed in another order; AdamW's first steps turn the sign of a gradient near 0 into a whole step
NEAR = 2e-5


WORKER = str(HERE.parent / "training" / "shard_worker.py")


def two(folder: Path, cases: list[dict[str, Any]], limit: float = 200) -> list[Any]:
    """Run cases in two processes; a worker's return and what it said."""
    (folder / "cases.json").write_text(json.dumps(cases))
    return run_ranks([WORKER, str(folder)], gloo(2, folder), limit)


def album(folder: Path) -> Path:
    """Records of text and of pictures, unevenly spread over the rows of a batch."""
    from vision.records import photo, said

    photo(0, 84, 56).save(folder / "a.png")
    rows = [{"messages": said("<image> w20 <image>", "w30 w31"), "images": ["a.png", "a.png"]}]
    rows += [{"messages": said(f"w{20 + n} w24 w25 w27 w28 w21 w20", f"w{35 + n}")} for n in range(4)]
    path = folder / "album.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two processes and of one."""
    folder = tmp_path_factory.mktemp("two")
    chats = str(write_chats(folder / "chats.jsonl", 12, 64))
    text = {"model": str(MODEL), "data": chats, "config": SETTINGS}
    pictures = {
        "model": str(vision_folder("qwen3_vl", folder / "qwen3_vl")),
        "data": str(album(folder)),
        "config": SETTINGS | {"length": 40, "batch": 3},
    }
    # its first layer has no gates, so nothing flows back through it; head and embeddings are one
    windows = pictures | {"model": str(vision_folder("gemma3", folder / "gemma3"))}
    text_only = folder / "text.jsonl"
    text_only.write_text("".join((folder / "album.jsonl").read_text().splitlines(True)[1:]))
    made = [
        text | {"name": "text", "options": {"micro_batch": 2}},
        text | {"name": "resumed", "options": {"micro_batch": 2, "resume": True}},
        text | {"name": "refused", "environment": FSDP | {"FSDP_OFFLOAD_PARAMS": "true"}},
        text | {"name": "mute", "second": str(mute(folder / "no-tokenizer"))},
        pictures
        | {"name": "pictures", "options": {"recompute": False}, "shard": False, "environment": FSDP},
        windows | {"name": "windows", "data": str(text_only)},
        text | {"name": "dies", "dies": 2, "options": {"micro_batch": 2}},
    ]  # fmt: skip
    stopped(folder, made[1])
    first, second = two(folder, made)
    assert (first.returncode, second.returncode) == (4, 3), first.stderr + second.stderr
    shutil.copytree(folder / "dies", folder / "dies-alone")
    one(folder, [alone(case) for case in made if case["name"] in ("text", "pictures", "windows")])
    one(folder, [alone(made[-1]) | {"options": {"micro_batch": 2, "resume": True}}])
    return folder


def mute(folder: Path) -> Path:
    """The demo's model without its tokenizer."""
    return Path(shutil.copytree(MODEL, folder, ignore=shutil.ignore_patterns("tokenizer*")))


def stopped(folder: Path, case: dict[str, Any]) -> None:
    """A run in one process that ends after two steps, with its checkpoint."""
    how = shard_worker.options(folder, case | {"options": {"micro_batch": 2}})
    with pytest.MonkeyPatch.context() as patch:

        def stop(
            self: Any, batch: Any, slack: float, stock: Any = shard_worker.engine.Engine.gradient
        ) -> Any:
            if (folder / case["name"] / "log.csv").read_text().count("\n") == 3:
                raise KeyboardInterrupt
            return stock(self, batch, slack)

        patch.setattr(shard_worker.engine.Engine, "gradient", stop)
        with pytest.raises(KeyboardInterrupt):
            train(case["model"], Records([case["data"]]), TrainConfig(**case["config"]), how)


def alone(case: dict[str, Any]) -> dict[str, Any]:
    """The case for one process, which shares with none."""
    return case | {"name": f"{case['name']}-alone", "shard": False, "environment": {}, "dies": None}


def one(folder: Path, cases: list[dict[str, Any]]) -> None:
    """Run cases in a process of their own, which holds nothing else."""
    (folder / "alone.json").write_text(json.dumps(cases))
    subprocess.run([sys.executable, WORKER, str(folder)], check=True)


def compare(one: Path, other: Path) -> None:
    """The same losses in every step, and the same gates."""
    for name, tensor in load_gates(one / "gates").tensors.items():
        found = load_gates(other / "gates").tensors[name].float32()
        assert np.allclose(found, tensor.float32(), atol=NEAR), name
    logs = [read_log(run / "log.csv") for run in (one, other)]
    assert len(logs[0]) == len(logs[1]) == 3
    for mine, theirs in zip(*logs, strict=True):
        for column in ("loss", "kl", "cross_entropy", "soft_size", "gradient_norm"):
            # sums in another order, over gates that are NEAR after a step; KL is itself as small as 1e-4
            assert mine[column] == pytest.approx(theirs[column], rel=1e-4, abs=1e-6), column


@pytest.mark.parametrize("name", ["text", "pictures", "windows"])
def test_two_processes_equal_one_at_half_of_the_weights(name: str, cases: Path) -> None:
    compare(cases / f"{name}-alone", cases / name)
    whole = json.loads((cases / f"{name}-alone.alone.json").read_text())
    for rank in (0, 1):
        own = json.loads((cases / f"{name}.{rank}.json").read_text())
        assert own["base"] == whole["base"]
        saved = whole["held"] - own["held"]
        assert 0.45 * whole["base"] < saved < 0.51 * whole["base"]
        # what a step gathers counts as needed; a few bytes beyond the last weight are nobody's
        assert own["fixed"] - whole["fixed"] == own["gathered"]
        assert 0.999 * (own["gathered"] - 2 * own["layer"]) < own["outer"] < own["gathered"]


def test_two_processes_go_on_with_what_one_began(cases: Path) -> None:
    compare(cases / "text", cases / "resumed")


def test_what_accelerate_asks_for_in_vain(cases: Path) -> None:
    for rank in (0, 1):
        error = json.loads((cases / f"refused.{rank}.json").read_text())["error"]
        assert error.startswith("UnsupportedFeatureError: accelerate's configuration has fsdp_offload_params")
    assert not (cases / "refused" / "gates").exists()


def test_what_one_process_cannot_open_ends_both(cases: Path) -> None:
    errors = [json.loads((cases / f"mute.{rank}.json").read_text())["error"] for rank in (0, 1)]
    assert errors[0].startswith("RankError: rank 1 refuses"), errors
    assert "no-tokenizer" in errors[1]


def test_one_that_dies_ends_the_other_and_one_alone_goes_on(cases: Path) -> None:
    error = json.loads((cases / "dies.0.json").read_text())["error"]
    assert ": another rank is gone or late" in error, error
    assert not (cases / "dies" / "gates").exists()
    compare(cases / "text", cases / "dies-alone")


def test_sharding_is_for_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = Records([write_chats(tmp_path / "chats.jsonl", 2, 64)])
    config, how = TrainConfig(**SETTINGS), RunOptions(tmp_path / "run", device="cpu", shard=True)
    with pytest.raises(ConfigError, match="there is one; start them with `accelerate launch"):
        train(MODEL, records, config, how)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_ACTIVATION_CHECKPOINTING", "true")
    with pytest.raises(ConfigError, match="fsdp_activation_checkpointing: true, and there is --no-recompute"):
        train(MODEL, records, config, RunOptions(tmp_path / "run", device="cpu", recompute=False))
    monkeypatch.setenv("FSDP_SHARDING_STRATEGY", "HYBRID_SHARD")
    with pytest.raises(UnsupportedFeatureError, match=r"HYBRID_SHARD, .*; expected full_shard or 1"):
        train(MODEL, records, config, RunOptions(tmp_path / "run", device="cpu"))
    from mlx_kvret.mlx_backend.training import engine as mlx

    with pytest.raises(UnsupportedFeatureError, match="MLX trains in one process"):
        mlx.train(MODEL, records, config, how)
