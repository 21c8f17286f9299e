"""A model ready to be evaluated: engines, gates and tokenizer, from names and folders."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.checkpoint import GateCheckpoint
from ..core.fingerprint import fingerprint
from ..core.model_folder import model_config
from ..core.options import whole
from ..core.tensors import tensors_id
from ..errors import ConfigError, MissingDependencyError
from ..hub import resolve
from .chunks import Pace
from .engine import Engine, PublicEngine
from .methods import REFERENCES, Method

BACKENDS = ("auto", "mlx", "cuda", "torch", "reference")
DTYPES = ("auto", "float32", "bfloat16")


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
    chunk: int | None = None,
    buffer: int | None = None,
    batch: int = 1,
    look: bool = False,
    dtype: str = "auto",
) -> Bench:
    """Load a model and its gates for these methods.

    Args:
        model: folder, hub id, or a name known here (``"demo"``).
        gates: ``FOLDER`` or ``LABEL=FOLDER``; labels ``a/0``, ``a/1`` are training seeds of one kind ``a``.
            Without any those that are known for the model.
        backend: of :func:`mlx_kvret.load`, or ``"reference"`` for all methods. Methods that look at attention
            get the reference engine beside any backend.
        chunk, buffer: tokens read at a time (M/2 unless given), and B (M/8 unless given).
        batch: texts read side by side, by the reference engine and, where they are only scored, on torch.
        look: a reference engine is needed for other reasons as well.
        dtype: of the model's weights and cache; ``"auto"`` is what its files hold.

    Raises:
        ModelMismatchError: gates of another model.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"backend is {backend!r}; expected one of {', '.join(BACKENDS)}")
    if dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    whole("batch", batch, 1)
    Pace(chunk, buffer)
    config = model_config(resolve(model))
    found = load_gate_sets(model, gates, config) if any(method.learned for method in methods) else {}
    engines: list[Engine] = []
    tokenizer: Any = None
    watched = look or backend == "reference" or any(method.policy in REFERENCES for method in methods)
    for checkpoint in found.values():
        # before gigabytes of weights are read
        checkpoint.check_model(config)
    if backend != "reference":
        network, tokenizer = _load(model, backend, dtype)
        engines.append(PublicEngine(network, tokenizer, chunk, buffer, batch))
    if watched:
        engine = _reference(model, chunk, buffer, batch, dtype)
        tokenizer = tokenizer or engine.processor
        engines.append(engine)
    settings: dict[str, Any] = {"model": str(model), "fingerprint": fingerprint(config), "dtype": dtype}
    settings |= {"chunk": chunk, "buffer": buffer}
    return Bench(engines, tokenizer, found, settings)


def load_gate_sets(
    model: str | Path, gates: Sequence[str], config: dict[str, Any]
) -> dict[str, GateCheckpoint]:
    """Gate checkpoints by label; without any given those that are known for the model, if there are.

    Raises:
        ConfigError: two of the same label.
        CheckpointError: not gates.
    """
    from mlx_kvret.converters import load_any

    from ..zoo import auto, identity

    if not gates:
        known = auto.choose(identity.of_folder(resolve(model), config, str(model)))
        return {} if known is None else {known[0]: load_any(known[1])}
    found: dict[str, GateCheckpoint] = {}
    for text in gates:
        label, given, folder = text.rpartition("=")
        label = label if given else Path(folder).name
        if label in found:
            raise ConfigError(f"two sets of gates are called {label!r}; name them: --gates LABEL=FOLDER")
        found[label] = load_any(resolve(folder, "gates"))
    return found


def _load(model: str | Path, backend: str, dtype: str) -> tuple[Any, Any]:
    """A model without gates and its tokenizer."""
    from ..api import attach, choose_backend, detach, load

    if choose_backend(backend) != "mlx":
        return load(model, None, backend=backend, dtype=dtype)  # type: ignore[arg-type]
    network, tokenizer = load(model, None, backend="mlx")
    if dtype != "auto":
        import mlx.core as mx

        # what a cache takes is measured when it is hooked
        detach(network).set_dtype(getattr(mx, dtype))
        attach(network, None)
    return network, tokenizer


def _reference(model: str | Path, chunk: int | None, buffer: int | None, batch: int, dtype: str) -> Any:
    if missing := [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]:
        raise MissingDependencyError(
            f"the reference engine needs {' and '.join(missing)}; run `pip install 'mlx-kvret[torch]'`"
        )
    import torch

    from mlx_kvret.cuda_backend.loading import load_model, read_tokenizer

    from .reference import ReferenceEngine

    folder = resolve(model)
    network: Any = load_model(folder, dtype=dtype)
    tokenizer = read_tokenizer(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return ReferenceEngine(network.to(device), tokenizer, chunk, buffer, batch)
