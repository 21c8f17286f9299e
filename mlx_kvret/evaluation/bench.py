"""A model ready to be evaluated: engines, gates and tokenizer, from names and folders."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.checkpoint import GateCheckpoint
from ..core.fingerprint import fingerprint
from ..core.tensors import tensors_id
from ..errors import ConfigError, MissingDependencyError
from .engine import CHUNK, Engine, PublicEngine
from .methods import REFERENCES, Method

BACKENDS = ("auto", "mlx", "cuda", "torch", "reference")


@dataclass
class Bench:
    """``engines`` in order of preference; ``gates`` by label; ``settings`` of the results file."""

    engines: list[Engine]
    tokenizer: Any
    gates: dict[str, GateCheckpoint]
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def digests(self) -> dict[str, str]:
        return {label: tensors_id(found.tensors) for label, found in self.gates.items()}

    @property
    def reference(self) -> Any:
        """The engine that shows attention, or None."""
        return next((engine for engine in self.engines if engine.name == "reference"), None)


def open_bench(
    model: str | Path,
    methods: Sequence[Method],
    gates: Sequence[str] = (),
    backend: str = "auto",
    chunk: int = CHUNK,
    buffer: int | None = None,
    batch: int = 1,
    look: bool = False,
) -> Bench:
    """Load a model and its gates for these methods.

    Args:
        model: folder, hub id, or ``"demo"``, which brings gates.
        gates: ``FOLDER`` or ``LABEL=FOLDER``; labels ``a/0``, ``a/1`` are training seeds of one kind ``a``.
        backend: of :func:`mlx_kvret.load`, or ``"reference"`` for all methods. Methods that look at attention
            get the reference engine beside any backend.
        chunk, buffer: tokens read at a time, and B (M/8 unless given).
        batch: texts the reference engine reads side by side.
        look: a reference engine is needed for other reasons as well.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"backend is {backend!r}; expected one of {', '.join(BACKENDS)}")
    if chunk < 1 or batch < 1 or (buffer is not None and buffer < 0):
        raise ConfigError(f"chunk is {chunk}, batch {batch}, buffer {buffer}; expected at least 1, 1 and 0")
    found = load_gate_sets(model, gates) if any(method.learned for method in methods) else {}
    engines: list[Engine] = []
    tokenizer: Any = None
    looking = look or backend == "reference" or any(method.policy in REFERENCES for method in methods)
    if backend != "reference":
        from ..api import load

        network, tokenizer = load(model, backend=backend)  # type: ignore[arg-type]
        engines.append(PublicEngine(network, tokenizer, chunk, buffer))
    if looking:
        engine = _reference(model, chunk, buffer, batch)
        tokenizer = tokenizer or engine.tokenizer
        engines.append(engine)
    settings = {"model": str(model), "fingerprint": _fingerprint(model), "chunk": chunk, "buffer": buffer}
    return Bench(engines, tokenizer, found, settings)


def load_gate_sets(model: str | Path, gates: Sequence[str]) -> dict[str, GateCheckpoint]:
    """Gate checkpoints by label.

    Raises:
        ConfigError: two of the same label.
        CheckpointError: not gates.
    """
    from converters import load_any

    from .. import demo
    from ..hub import resolve

    if not gates and str(model) == "demo":
        return {"demo": load_any(demo.GATES)}
    found: dict[str, GateCheckpoint] = {}
    for text in gates:
        label, given, folder = text.rpartition("=")
        label = label if given else Path(folder).name
        if label in found:
            raise ConfigError(f"two sets of gates are called {label!r}; name them: --gates LABEL=FOLDER")
        found[label] = load_any(resolve(folder, "gates"))
    return found


def _folder(model: str | Path) -> Path:
    from .. import demo
    from ..hub import resolve

    return demo.MODEL if str(model) == "demo" else resolve(model)


def _fingerprint(model: str | Path) -> str:
    from ..core.checkpoint import read_json

    return fingerprint(read_json(_folder(model) / "config.json"))


def _reference(model: str | Path, chunk: int, buffer: int | None, batch: int) -> Any:
    if missing := [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]:
        raise MissingDependencyError(
            f"the reference engine needs {' and '.join(missing)}; run `pip install 'mlx-kvret[torch]'`"
        )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .reference import ReferenceEngine

    folder = _folder(model)
    network: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    has_tokenizer = any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json"))
    tokenizer = AutoTokenizer.from_pretrained(folder) if has_tokenizer else None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return ReferenceEngine(network.to(device), tokenizer, chunk, buffer, batch)
