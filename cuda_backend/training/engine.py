"""Model, gates and optimizer of a training run on torch."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mlx_kvret.core.picture_prompts import spoken_by
from mlx_kvret.core.tensors import Tensor
from mlx_kvret.core.types import Floats
from mlx_kvret.errors import CheckpointError, TrainingError
from mlx_kvret.training.config import TrainConfig
from mlx_kvret.training.packing import Batch
from mlx_kvret.training.pictures import Sees
from mlx_kvret.training.profile import profile
from mlx_kvret.training.records import Records
from mlx_kvret.training.report import Losses
from mlx_kvret.training.run import Base, Run, RunOptions

from ..gates import RetentionGates, to_arrays
from ..kernels.soft_size import soft_size
from ..memory import free_bytes, out_of_memory
from ..ranks import connected
from . import base
from .pictures import Seeing
from .processes import Processes, join
from .sharding import sharded_over, wanted
from .step import gradient
from .student import Student

# AdamW's moments: torch's names and those of a run's checkpoint
_MOMENTS = {"exp_avg": "mean", "exp_avg_sq": "square"}


def train(model: str | Path, records: Records, config: TrainConfig, options: RunOptions) -> Path | None:
    """Train gates for a model of transformers, as :class:`mlx_kvret.training.run.Run` does.

    Returns the folder of the finished gate checkpoint; of several processes all but the first return None.

    Raises:
        KVRetError: see :mod:`mlx_kvret.errors`.
    """
    found = Base.find(model)
    base.refuse_quantised(found)
    processes = join(options.device)
    run = processes.agreed(lambda: Run(found, records, config, options, processes.index == 0))
    engine = processes.agreed(lambda: Engine(found, config, options, processes))
    with connected():
        return run.go(engine)


class Engine:
    """Implements :class:`mlx_kvret.training.run.Engine`.

    Raises:
        TrainingError: too little memory is free for a step.
        UnsupportedModelError: the model cannot be opened or hooked.
    """

    def __init__(self, found: Base, config: TrainConfig, options: RunOptions, processes: Processes):
        self.config, self.options, self.processes = config, options, processes
        # what one process alone may refuse, before the probe gathers weights from all
        loaded, processor = processes.agreed(lambda: _opened(found, config, options, processes))
        self.tokenizer, seeing = spoken_by(processor), Seeing.of(loaded, processor)
        self.sees: Sees | None = seeing
        self.student = Student(loaded, seeing)
        self.packs = self.student.packs
        if options.recompute:
            self.student.checkpoint_layers()
        shape = (self.student.layers, self.student.kv_heads, self.student.hidden_size)
        self.gate_config = config.gates(*shape, found.config, found.name)
        torch.manual_seed(config.seed)
        self.gates = RetentionGates(self.gate_config).to(processes.device)
        self.optimizer = torch.optim.AdamW(self.gates.parameters(), weight_decay=config.weight_decay)
        self.versions = {name: version(name) for name in ("torch", "transformers")}
        parameters = sum(p.numel() for p in self.gates.parameters())
        self.memory = base.memory_of(self.student, parameters, config.width, options.recompute)
        rows = min(options.micro_batch, config.batch)
        self.memory.require(config.length * rows, free_bytes(processes.device), str(processes.device))

    def gradient(self, batch: Batch, slack: float) -> Losses:
        rows = self.options.micro_batch
        try:
            return gradient(self.student, self.gates, batch, self.config, self.processes, rows, slack)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            device = self.processes.device
            advice = self.memory.advice(free_bytes(device) or 0)
            raise TrainingError(f"a step does not fit on {device}; {advice}") from error

    def clip(self, largest: float) -> float:
        return float(torch.nn.utils.clip_grad_norm_(self.gates.parameters(), largest))

    def update(self, learning_rate: float) -> None:
        self.optimizer.param_groups[0]["lr"] = learning_rate
        self.optimizer.step()

    def weights(self) -> dict[str, Floats]:
        return to_arrays(self.gates)

    def state(self) -> dict[str, Tensor]:
        tensors = {f"gates.{name}": Tensor.of(weight) for name, weight in self.weights().items()}
        for name, weight in self.gates.named_parameters():
            for torch_name, moment in self.optimizer.state[weight].items():
                if kind := _MOMENTS.get(torch_name):
                    tensors[f"{kind}.{name}"] = Tensor.of(moment.cpu().numpy())
        return tensors | {
            f"random.{name}": Tensor("U8", state.numpy()) for name, state in _generators().items()
        }

    def restore(self, tensors: dict[str, Tensor], step: int) -> None:
        def stored(kind: str, name: str, like: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(tensors[f"{kind}.{name}"].float32()).to(like)

        for name, weight in self.gates.named_parameters():
            weight.data = stored("gates", name, weight)
            if step:
                moments = {mine: stored(kind, name, weight) for mine, kind in _MOMENTS.items()}
                self.optimizer.state[weight] = {"step": torch.tensor(float(step)), **moments}
        now = _generators()
        states = {name: tensors.get(f"random.{name}") for name in now}
        if any(state and state.shape != tuple(now[name].shape) for name, state in states.items()):
            raise CheckpointError(
                "the checkpoint holds the state of another release's random generator; resume with the torch "
                "it was written by"
            )
        try:
            if cpu := states.pop("torch"):
                torch.set_rng_state(torch.from_numpy(cpu.bits.copy()))
            for index, own in enumerate(states.values()):
                if own:
                    torch.cuda.set_rng_state(torch.from_numpy(own.bits.copy()), index)
        except RuntimeError as error:
            raise CheckpointError(
                f"the checkpoint holds no state of a random generator ({error}); start again elsewhere"
            ) from error

    def profile(self, batch: Batch) -> dict[str, Any]:
        rows, device = slice(0, self.options.micro_batch), self.processes.device
        ids, starts = (
            torch.from_numpy(np.ascontiguousarray(x[rows])).to(device) for x in (batch.ids, batch.starts)
        )
        with torch.no_grad(), self.student.shards.whole():
            seen = self.student.see(ids, starts, batch, range(len(ids)))
            log_beta = self.student.learn(ids, starts, self.gates, self.config.sinks, seen).log_beta
            assert log_beta is not None
            size = soft_size(log_beta, starts)
        return profile(log_beta.cpu().numpy(), size.cpu().numpy(), batch.position[rows], self.student.layers)


def _opened(found: Base, config: TrainConfig, options: RunOptions, processes: Processes) -> tuple[Any, Any]:
    """The base model, or this process's share of it, and its tokenizer."""
    count, device = processes.count, processes.device
    sharding = sharded_over(count) if wanted(options, count, device) else None
    return base.load(found.folder, config.dtype, device, sharding)


def _generators() -> dict[str, torch.Tensor]:
    """States of torch's generators."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"torch": torch.get_rng_state()} | {f"cuda{index}": state for index, state in enumerate(cuda)}
