"""A training run on any backend: from a base model and data to a gate checkpoint.

The backend brings an :class:`Engine`; the data, the schedule, checkpoints, the log and the result are here.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from ..core.checkpoint import save_gates
from ..core.config import GateConfig
from ..core.files import sweep, whole_file
from ..core.fingerprint import fingerprint
from ..core.model_folder import model_config
from ..core.options import whole
from ..core.tensors import Tensor
from ..core.types import Floats
from ..errors import CheckpointError, ConfigError, DataError, TrainingError
from ..hub import resolve
from ..zoo.names import BASES
from . import state
from .config import TrainConfig
from .documents import Document, document
from .packing import Batch, Packer, Position
from .pictures import Sees
from .records import Records
from .report import Losses, Report
from .schedule import rate
from .watch import Watch

GATES, LOG, PROFILE = "gates", "log.csv", "profile.json"


@dataclass(frozen=True)
class RunOptions:
    """How a run is carried out; nothing here changes its result beyond rounding.

    ``micro_batch`` sequences go through the model at once; every ``save_every`` steps a checkpoint is
    written; with ``recompute`` layers are recomputed in the backward pass: slower, in far less memory. With
    ``shard`` each of several processes holds a share of the base's weights.
    """

    folder: Path
    resume: bool = False
    device: str = "auto"
    micro_batch: int = 1
    save_every: int = 100
    recompute: bool = True
    shard: bool = False

    def __post_init__(self) -> None:
        for name in ("micro_batch", "save_every"):
            whole(name, getattr(self, name), 1)


@dataclass(frozen=True)
class Base:
    """A base model: the name to remember it by, its folder, and its ``config.json``."""

    name: str
    folder: Path
    config: dict[str, Any]

    @classmethod
    def find(cls, model: str | Path) -> Base:
        """``model`` is a folder, a hub id, or a name known here (``"demo"``, ``"smollm2"``)."""
        folder = resolve(model)
        local = folder == Path(model).expanduser()
        name = BASES.get(str(model), folder.name if local else str(model))
        return cls(name, folder, model_config(folder))


class Engine(Protocol):
    """Base model, gates and optimizer on one backend.

    ``packs``: documents in one row do not see each other. ``sees`` takes pictures, if the model does.
    ``versions`` are those of the backend's packages.
    """

    tokenizer: Any
    gate_config: GateConfig
    packs: bool
    sees: Sees | None
    versions: dict[str, str]

    def gradient(self, batch: Batch, slack: float) -> Losses:
        """Work out the gradient of a whole batch, and keep it; ``slack`` is the capacity loss's."""

    def clip(self, largest: float) -> float:
        """Scale the gradient so that its norm is at most ``largest``; returns the norm before."""

    def update(self, learning_rate: float) -> None:
        """One step of AdamW with the gradient."""

    def weights(self) -> dict[str, Floats]:
        """The gates under their names in a gate checkpoint."""

    def state(self) -> dict[str, Tensor]:
        """All that changes in training, named as in :mod:`.state`."""

    def restore(self, tensors: dict[str, Tensor], step: int) -> None:
        """The state after so many steps. Moments are missing before the first."""

    def profile(self, batch: Batch) -> dict[str, Any]:
        """:func:`.profile.profile` of the first micro-batch."""


class Run:
    """A run in one process; of several, the ``main`` one writes.

    Its folder holds the last checkpoint (:mod:`.state`), ``log.csv``, ``profile.json`` and, once the run is
    over, ``gates``. A run that was killed goes on from its last checkpoint, to weights that are bit by bit
    those of an uninterrupted run where the device computes reproducibly (a CPU does).

    Raises:
        ConfigError: the folder is in use, or holds no run with these settings to be resumed.
        CheckpointError: its checkpoint is damaged.
    """

    def __init__(
        self, base: Base, records: Records, config: TrainConfig, options: RunOptions, main: bool = True
    ):
        config.check_model(base.config)
        self.config, self.options, self.records, self.main = config, options, records, main
        # what a resumed run must share with the one that wrote the checkpoint
        self.identity = config.to_dict() | {"base": fingerprint(base.config), "data": records.identity}
        if main:
            self._check_folder()
        self._saved = state.load(options.folder, self.identity) if options.resume else None
        self.step = self.tokens = 0
        self.losses: Losses | None = None

    def _check_folder(self) -> None:
        folder = self.options.folder
        if self.options.resume or not folder.exists():
            return
        if not folder.is_dir() or any(folder.iterdir()):
            raise ConfigError(
                f"{folder} exists already; go on with --resume if it holds a run, or choose another folder"
            )

    def go(self, engine: Engine) -> Path | None:
        """Train to the end; returns the folder of the finished gates, None in all but the main process.

        Raises:
            KVRetError: see :mod:`mlx_kvret.errors`.
        """
        config, folder = self.config, self.options.folder
        self.engine = engine
        self.packer = Packer(
            self.records,
            self._read,
            config.length,
            config.batch,
            config.seed,
            config.epochs,
            alone=not engine.packs,
        )
        if self._saved:
            self._restore(*self._saved)
        if self.main:
            folder.mkdir(parents=True, exist_ok=True)
            sweep(folder)
            if not self._saved:
                self._save()
        if not (folder / GATES).exists():
            self._loop()
            self._finish()
        return folder / GATES if self.main else None

    def _read(self, index: int) -> Document | None:
        try:
            record, engine = self.records.read(index), self.engine
            made = document(record, engine.tokenizer, self.config.loss, engine.sees)
            longest = max((b - a for a, b in made.spans), default=0)
            if longest > self.config.length:
                raise DataError(
                    f"{made.where} has a picture of {longest} tokens, and sequences have "
                    f"{self.config.length}; raise --length, or make the picture smaller"
                )
            return made
        except DataError as error:
            self.records.complain(error)
            return None

    def _loop(self) -> None:
        watch = Watch(self.config)
        with Report(self.options.folder / LOG, self.step, self.main) as report:
            while True:
                before, position = self._progress(), self.packer.position
                if before >= 1 or (batch := self.packer.batch()) is None:
                    break
                after = self._progress(1)
                norm = self._step(batch, before, after, report, position)
                assert self.losses is not None
                for warning in watch.step(self.losses, norm, batch, after):
                    report.warn(warning)
                if self.main and self.step % self.options.save_every == 0:
                    self._save()
            for warning in watch.end():
                report.warn(warning)

    def _progress(self, ahead: int = 0) -> float:
        if self.config.steps:
            return (self.step + ahead) / self.config.steps
        return self.packer.progress()

    def _step(self, batch: Batch, before: float, after: float, report: Report, position: Position) -> float:
        """Learn from a batch; returns the norm of the gradient."""
        config = self.config
        losses = self.engine.gradient(batch, config.slack(before))
        norm = self.engine.clip(config.clip)
        if not (losses.finite and math.isfinite(norm)):
            self._stop(losses, norm, batch, position)
        learning_rate = config.learning_rate * rate((before + after) / 2, config.warmup, self.step)
        self.engine.update(learning_rate)
        self.step, self.tokens, self.losses = self.step + 1, self.tokens + batch.tokens, losses
        report.step(self.step, after, losses, learning_rate, norm, batch)
        return norm

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
        values = {
            "step": self.step,
            "tokens": self.tokens,
            "losses": None if self.losses is None else vars(self.losses),
            "position": list(self.packer.position),
            "gates": self.engine.gate_config.to_dict(),
        }
        state.save(self.options.folder, self.identity, values, self.engine.state())

    def _restore(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.step, self.tokens = values["step"], values["tokens"]
        self.losses = Losses(**values["losses"]) if values["losses"] else None
        self.packer.position = Position(*values["position"])
        if self.packer.position.record > len(self.records):
            raise CheckpointError(f"{self.options.folder / state.NAME} is damaged (record); start elsewhere")
        state.check(self.options.folder, tensors, self.step, self.engine.gate_config)
        self.engine.restore(tensors, self.step)

    def _finish(self) -> None:
        """Profile the gates on the first batch of the data, then write them."""
        folder = self.options.folder
        if self.main:
            self._save()
        self.packer.position = Position()
        # in all processes, which may hold the model together
        measured = self.engine.profile(batch) if (batch := self.packer.batch()) else None
        if not self.main:
            return
        if measured:
            with whole_file(folder / PROFILE) as scratch:
                scratch.write_text(json.dumps(measured) + "\n")
        told = {
            "trained_with": {"mlx-kvret": version("mlx-kvret")} | self.engine.versions,
            "settings": self.config.to_dict(),
            "data": self.records.identity,
            "skipped_records": len(self.records.skipped),
            "steps": self.step,
            "tokens": self.tokens,
            "last_losses": None if self.losses is None else vars(self.losses),
        }
        save_gates(folder / GATES, self.engine.gate_config, self.engine.weights(), told)


def export(folder: Path, destination: Path) -> int:
    """Write the gates of a run's last checkpoint to a folder, while the run goes on; returns their step.

    Raises:
        ConfigError: there is no run, or the destination cannot be written.
        CheckpointError: the run's checkpoint is damaged.
    """
    settings, values, tensors = state.read(folder)
    config = GateConfig.from_dict(values.get("gates", {}))
    own = {
        name.removeprefix("gates."): tensor for name, tensor in tensors.items() if name.startswith("gates.")
    }
    told = {name: values.get(name) for name in ("tokens", "losses")}
    told |= {"settings": settings, "steps": values["step"], "unfinished": True}
    save_gates(destination, config, own, told)
    return int(values["step"])
