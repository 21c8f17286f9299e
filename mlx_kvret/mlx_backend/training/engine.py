"""Model, gates and optimizer of a training run on MLX."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from ...core.loading import required
from ...core.picture_prompts import spoken_by
from ...core.tensors import Tensor
from ...core.types import Floats
from ...core.vision import has_vision
from ...errors import ConfigError, TrainingError, UnsupportedFeatureError
from ...training.config import TrainConfig
from ...training.packing import Batch
from ...training.pictures import Sees
from ...training.profile import profile
from ...training.records import Records
from ...training.report import Losses
from ...training.run import Base, Run, RunOptions
from ..gates import DTYPES, RetentionGates, to_array, to_tensor
from ..loading import load_network, plain_tokenizer
from ..loading_vision import load_seeing, read_processor
from ..memory import free_bytes
from .attention import PackedMask
from .memory import memory_of
from .pictures import Seeing
from .soft_size import soft_size
from .step import gradient
from .student import Student

# AdamW's moments: MLX's names and those of a run's checkpoint
_MOMENTS = {"m": "mean", "v": "square"}


def train(model: str | Path, records: Records, config: TrainConfig, options: RunOptions) -> Path | None:
    """Train gates for a model of mlx-lm, also a quantised one, as :class:`mlx_kvret.training.run.Run` does.

    Returns the folder of the finished gate checkpoint.

    Raises:
        KVRetError: see :mod:`mlx_kvret.errors`.
    """
    if options.shard:
        raise UnsupportedFeatureError("MLX trains in one process; leave out --shard, or use --backend torch")
    base = Base.find(model)
    run = Run(base, records, config, options)
    return run.go(Engine(base, config, options, records.see))


class Engine:
    """Implements :class:`mlx_kvret.training.run.Engine`; with ``pictures`` a model that sees is opened whole.

    Raises:
        TrainingError: too little memory is free for a step.
        UnsupportedModelError: the model cannot be hooked.
    """

    def __init__(self, base: Base, config: TrainConfig, options: RunOptions, pictures: bool = False):
        _choose_device(options.device)
        self.config, self.options = config, options
        network, self.tokenizer, seeing = _opened(base, pictures)
        self.sees: Sees | None = seeing
        if config.dtype != "auto":
            network.set_dtype(DTYPES[config.dtype])
        mx.eval(network.parameters())
        self.student = Student(network, options.recompute, seeing)
        self.packs = self.student.packs
        shape = (self.student.layers, self.student.kv_heads, self.student.hidden_size)
        self.gate_config = config.gates(*shape, base.config, base.name)
        mx.random.seed(config.seed)
        self.gates = RetentionGates(self.gate_config)
        self.optimizer = optim.AdamW(
            config.learning_rate, weight_decay=config.weight_decay, bias_correction=True
        )
        self.optimizer.init(self.gates.trainable_parameters())
        mx.eval(self.gates.parameters(), self.optimizer.state)
        self.memory = memory_of(base.config, self.gate_config, self.student.dtype.size, options.recompute)
        rows = min(options.micro_batch, config.batch)
        self.memory.require(config.length * rows, free_bytes(), "this machine")
        self.versions = {name: version(name) for name in ("mlx", "mlx-lm", *_eyes(seeing))}

    def gradient(self, batch: Batch, slack: float) -> Losses:
        try:
            losses, self._gradient = gradient(
                self.student, self.gates, batch, self.config, self.options.micro_batch, slack
            )
        except RuntimeError as error:
            if "allocate" not in str(error):
                raise
            raise TrainingError(
                f"a step does not fit in memory; {self.memory.advice(free_bytes() or 0)}"
            ) from error
        return losses

    def clip(self, largest: float) -> float:
        self._gradient, norm = optim.clip_grad_norm(self._gradient, largest)
        return float(norm)

    def update(self, learning_rate: float) -> None:
        self.optimizer.learning_rate = learning_rate
        self.optimizer.update(self.gates, self._gradient)
        mx.eval(self.gates.parameters(), self.optimizer.state)

    def weights(self) -> dict[str, Floats]:
        return {name: np.array(weight) for name, weight in _flat(self.gates.trainable_parameters())}

    def state(self) -> dict[str, Tensor]:
        tensors = {f"gates.{name}": Tensor.of(weight) for name, weight in self.weights().items()}
        for name, array in _flat(self.optimizer.state):
            name, _, which = name.rpartition(".")
            if which in _MOMENTS:
                tensors[f"{_MOMENTS[which]}.{name}"] = to_tensor(array)
        # no generator: none is used once the gates have their first weights
        return tensors

    def restore(self, tensors: dict[str, Tensor], step: int) -> None:
        def named(kind: str, suffix: str = "") -> list[tuple[str, mx.array]]:
            found = ((name.partition("."), tensor) for name, tensor in tensors.items())
            return [(f"{name}{suffix}", to_array(tensor)) for (k, _, name), tensor in found if k == kind]

        self.gates.load_weights(named("gates"))
        if step:
            moments = [entry for mlx, name in _MOMENTS.items() for entry in named(name, f".{mlx}")]
            counters = {"step": mx.array(step, mx.uint64), "learning_rate": mx.array(0.0)}
            self.optimizer.state = tree_unflatten(moments) | counters

    def profile(self, batch: Batch) -> dict[str, Any]:
        rows = slice(0, self.options.micro_batch)
        ids, starts = mx.array(batch.ids[rows]), batch.starts[rows]
        seen = self.student.see(ids, starts, batch, range(len(starts)))
        log_beta = self.student.learn(ids, starts, self.gates, self.config.sinks, seen).log_beta
        assert log_beta is not None
        size = soft_size(log_beta, PackedMask(starts))
        return profile(np.array(log_beta), np.array(size), batch.position[rows], self.student.layers)


def _opened(base: Base, pictures: bool) -> tuple[nn.Module, Any, Seeing | None]:
    """A model, its tokenizer and, if there are ``pictures`` and it sees them, what makes inputs of them."""
    if not (pictures and has_vision(base.config)):
        return load_network(base.folder)[0], required(plain_tokenizer(base.folder), base.folder), None
    model = load_seeing(base.folder, base.config, lazy=False, strict=True, trusted=False)
    processor = read_processor(base.folder, model)
    return model, spoken_by(processor), Seeing.of(model, processor)


def _eyes(seeing: Seeing | None) -> tuple[str, ...]:
    """The package that a model which sees comes from."""
    return () if seeing is None else ("mlx-vlm",)


def _flat(tree: Any) -> list[tuple[str, mx.array]]:
    found: Any = tree_flatten(tree)
    return list(found)


def _choose_device(name: str) -> None:
    """``"auto"`` keeps MLX's own choice: the GPU of a Mac, else the CPU."""
    if name not in ("auto", "cpu", "gpu"):
        raise ConfigError(f"there is no device {name!r} for MLX; expected auto, cpu or gpu")
    if name != "auto":
        mx.set_default_device(mx.cpu if name == "cpu" else mx.gpu)
