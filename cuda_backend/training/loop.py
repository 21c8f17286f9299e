"""The training loop: from a base model and data to a gate checkpoint."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers

from mlx_kvret import demo
from mlx_kvret.core.checkpoint import save_gates
from mlx_kvret.core.config import GateConfig
from mlx_kvret.core.files import whole_file
from mlx_kvret.core.fingerprint import fingerprint
from mlx_kvret.errors import ConfigError, DataError, TrainingError
from mlx_kvret.hub import resolve
from mlx_kvret.training.config import TrainConfig
from mlx_kvret.training.documents import Document, document
from mlx_kvret.training.packing import Batch, Packer, Position
from mlx_kvret.training.records import Records
from mlx_kvret.training.report import Losses, Report
from mlx_kvret.training.schedule import rate

from ..gates import RetentionGates, to_arrays
from . import base, state
from .processes import Processes, join
from .profile import profile
from .step import gradient
from .student import Student

GATES, LOG, PROFILE = "gates", "log.csv", "profile.json"


@dataclass(frozen=True)
class RunOptions:
    """How a run is carried out; nothing here changes its result beyond rounding.

    ``micro_batch`` sequences go through the model at once; every ``save_every`` steps a checkpoint is
    written; with ``recompute`` layers are recomputed in the backward pass: slower, in far less memory.
    """

    folder: Path
    resume: bool = False
    device: str = "auto"
    micro_batch: int = 1
    save_every: int = 100
    recompute: bool = True

    def __post_init__(self) -> None:
        for name in ("micro_batch", "save_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected at least 1")


def train(model: str | Path, records: Records, config: TrainConfig, options: RunOptions) -> Path | None:
    """Train gates for a base model; returns the folder of the finished gate checkpoint.

    Of several processes the first one writes; the others return None. ``model`` is a folder, a hub id, or
    ``"demo"`` for the model shipped with the package.

    The run's folder holds ``training.pt`` (the last checkpoint), ``log.csv``, ``profile.json`` and, once the
    run is over, ``gates``. A run that was killed goes on with ``resume`` from its last checkpoint, to weights
    that are bit by bit those of an uninterrupted run where the device computes reproducibly (a CPU does).

    Raises:
        KVRetError: see :mod:`mlx_kvret.errors`.
    """
    source = demo.MODEL if str(model) == "demo" else resolve(model)
    description = base.read_config(source)
    config.check_model(description)
    processes = join(options.device)
    name = source.name if source == Path(model).expanduser() else str(model)
    run = Run(name, source, description, records, config, options, processes)
    run.go()
    return options.folder / GATES if run.main else None


class Run:
    """A run in one process."""

    def __init__(
        self,
        name: str,
        source: Path,
        description: dict[str, Any],
        records: Records,
        config: TrainConfig,
        options: RunOptions,
        processes: Processes,
    ):
        self.config, self.options, self.processes = config, options, processes
        self.records, self.main = records, processes.index == 0
        # what a resumed run must share with the one that wrote the checkpoint
        self.identity = config.to_dict() | {"base": fingerprint(description), "data": records.identity}
        if self.main:
            self._check_folder()
        saved = state.load(options.folder, self.identity) if options.resume else None
        loaded, self.tokenizer = base.load(source, config.dtype, processes.device)
        self.student = Student(loaded)
        if options.recompute:
            self.student.checkpoint_layers()
        shape = (self.student.layers, self.student.kv_heads, self.student.hidden_size)
        self.gate_config: GateConfig = config.gates(*shape, description, name)
        torch.manual_seed(config.seed)
        self.gates = RetentionGates(self.gate_config).to(processes.device)
        self.optimizer = torch.optim.AdamW(self.gates.parameters(), weight_decay=config.weight_decay)
        alone = not self.student.packs
        self.packer = Packer(
            records, self._read, config.length, config.batch, config.seed, config.epochs, alone
        )
        self.step = self.tokens = 0
        self.losses: Losses | None = None
        parameters = sum(p.numel() for p in self.gates.parameters())
        self.memory = base.Memory.of(loaded, shape[0] * shape[1], parameters, config.width, options.recompute)
        self.memory.require(config.length * min(options.micro_batch, config.batch), processes.device)
        if saved is not None:
            self._restore(saved)

    def _check_folder(self) -> None:
        folder = self.options.folder
        if self.options.resume or not folder.exists():
            return
        if not folder.is_dir() or any(folder.iterdir()):
            raise ConfigError(
                f"{folder} exists already; go on with --resume if it holds a run, or choose another folder"
            )

    def _read(self, index: int) -> Document | None:
        try:
            return document(self.records.read(index), self.tokenizer, self.config.loss)
        except DataError as error:
            self.records.complain(error)
            return None

    def go(self) -> None:
        """Train to the end, from the checkpoint if the run is resumed."""
        folder = self.options.folder
        if self.main:
            folder.mkdir(parents=True, exist_ok=True)
            state.sweep(folder)
            if not self.options.resume:
                self._save()
        if (folder / GATES).exists():
            return
        self._loop()
        if self.main:
            self._finish()

    def _loop(self) -> None:
        with Report(self.options.folder / LOG, self.step, self.main) as report:
            while True:
                before, position = self._progress(), self.packer.position
                if before >= 1 or (batch := self.packer.batch()) is None:
                    break
                after = self._progress(1)
                self._step(batch, before, after, report, position)
                if self.main and self.step % self.options.save_every == 0:
                    self._save()

    def _progress(self, ahead: int = 0) -> float:
        if self.config.steps:
            return (self.step + ahead) / self.config.steps
        return self.packer.progress()

    def _step(self, batch: Batch, before: float, after: float, report: Report, position: Position) -> None:
        config = self.config
        try:
            losses = gradient(
                self.student, self.gates, batch, config, self.processes, self.options.micro_batch
            )
        except RuntimeError as error:
            if not base.out_of_memory(error):
                raise
            free = base.free_bytes(self.processes.device) or 0
            raise TrainingError(
                f"step {self.step + 1} does not fit on {self.processes.device}; {self.memory.advice(free)}"
            ) from error
        norm = float(torch.nn.utils.clip_grad_norm_(self.gates.parameters(), config.clip))
        if not (losses.finite and math.isfinite(norm)):
            self._stop(losses, norm, batch, position)
        learning_rate = config.learning_rate * rate((before + after) / 2, config.warmup)
        self.optimizer.param_groups[0]["lr"] = learning_rate
        self.optimizer.step()
        self.step, self.tokens, self.losses = self.step + 1, self.tokens + batch.tokens, losses
        report.step(self.step, after, losses, learning_rate, norm, batch)

    def _stop(self, losses: Losses, norm: float, batch: Batch, position: Position) -> None:
        names = list(dict.fromkeys(batch.where))
        some = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        raise TrainingError(
            f"step {self.step + 1} gave no finite result (KL {losses.kl}, cross-entropy "
            f"{losses.cross_entropy}, capacity {losses.capacity}, gradient norm {norm}) on {some} (epoch "
            f"{position.epoch}, record {position.record}); {self.options.folder / state.NAME} is from before "
            "it; look at that data, or train with a lower --learning-rate or --dtype float32"
        )

    def _save(self) -> None:
        state.save(
            self.options.folder,
            {
                "run": self.identity,
                "step": self.step,
                "tokens": self.tokens,
                "losses": None if self.losses is None else vars(self.losses),
                "position": list(self.packer.position),
                "gates": self.gates.state_dict(),
                "optimizer": self.optimizer.state_dict(),
            },
        )

    def _restore(self, saved: dict[str, Any]) -> None:
        self.step, self.tokens = saved["step"], saved["tokens"]
        self.losses = Losses(**saved["losses"]) if saved["losses"] else None
        self.packer.position = Position(*saved["position"])
        self.gates.load_state_dict(saved["gates"])
        self.optimizer.load_state_dict(saved["optimizer"])
        state.set_random_state(saved["random"])

    def _finish(self) -> None:
        """Profile the gates on the first batch of the data, then write them."""
        folder = self.options.folder
        self._save()
        self.packer.position = Position()
        if batch := self.packer.batch():
            rows = list(range(min(self.options.micro_batch, len(batch.ids))))
            measured = profile(self.student, self.gates, batch, rows, self.processes.device)
            with whole_file(folder / PROFILE) as scratch:
                scratch.chmod(0o644)
                scratch.write_text(json.dumps(measured) + "\n")
        save_gates(folder / GATES, self.gate_config, to_arrays(self.gates), self._provenance())

    def _provenance(self) -> dict[str, Any]:
        return {
            "trained_with": {
                "mlx-kvret": version("mlx-kvret"),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "settings": self.config.to_dict(),
            "data": self.records.identity,
            "skipped_records": len(self.records.skipped),
            "steps": self.step,
            "tokens": self.tokens,
            "last_losses": None if self.losses is None else vars(self.losses),
        }
