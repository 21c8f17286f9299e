"""The same gates in fewer bits, and on a model in 4 bits: what they keep, and what it costs, on MLX."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx_kvret
from mlx_kvret.converters import convert
from mlx_kvret.core.config import GateConfig
from mlx_kvret.evaluation import Method, PublicEngine, Sample, Turn
from mlx_kvret.evaluation.gate_agreement import agreement
from mlx_kvret.evaluation.gate_inputs import attention_inputs
from mlx_kvret.evaluation.methods import budget_tokens

NATS, SHARE = "nats", "entries kept as by the gates as they are"


@dataclass(frozen=True)
class Form:
    """Gates in some form on a model in some form."""

    name: str
    gates: Path
    model: Path


def forms(gates: Path, model: Path, work: Path) -> list[Form]:
    """Every form, written below ``work`` where it is not there yet."""
    eight, brain, four = work / "gates-8bit", work / "gates-bfloat16", work / "model-4bit"
    if not eight.exists():
        convert(gates, eight, "mlx", bits=8)
    if not brain.exists():
        convert(gates, brain, "shared", dtype="bfloat16")
    if not four.exists():
        _quantise(model, four)
    return [
        Form("as they are", gates, model),
        Form("in bfloat16", brain, model),
        Form("in 8 bits", eight, model),
        Form("on the model in 4 bits", gates, four),
        Form("in 8 bits on the model in 4 bits", eight, four),
    ]


def _quantise(model: Path, target: Path) -> None:
    from mlx_lm.convert import convert as quantise

    scratch = target.with_name(f"{target.name}-unfinished")
    shutil.rmtree(scratch, ignore_errors=True)
    quantise(str(model), str(scratch), quantize=True, q_bits=4, q_group_size=64)
    scratch.rename(target)


def open_network(folder: Path) -> Any:
    """A model in float32 without gates; weights in 4 bits are multiplied out.

    A CPU takes a second a token for MLX's quantised products; the weights are the same.
    """
    import mlx.core as mx
    from mlx_lm.utils import dequantize_model

    network, tokenizer = mlx_kvret.load(folder, None, backend="mlx")
    mlx_kvret.detach(network).set_dtype(mx.float32)
    return mlx_kvret.attach(dequantize_model(network), None), tokenizer


class Recorded:
    """Gates that score what another model saw of the same text."""

    def __init__(self, gates: Any, inputs: dict[int, Any]) -> None:
        self.gates, self.inputs = gates, inputs
        self.config: GateConfig = gates.config

    def log_beta(self, layer: int, x: Any) -> Any:
        return self.gates.log_beta(layer, self.inputs[layer])


class Measure:
    """What one form of gates keeps and costs on one model; ``pieces`` are token ids, ``base`` the form that
    it is compared with (None for itself)."""

    def __init__(
        self, network: Any, checkpoint: Any, pieces: Sequence[tuple[int, ...]], base: Measure | None
    ) -> None:
        from mlx_kvret.mlx_backend.gates import from_checkpoint

        self.engine, self.pieces, self.base = PublicEngine(network, None), pieces, base or self
        self.engine.use_gates(checkpoint)
        self.gates = from_checkpoint(checkpoint)
        self.inputs = [attention_inputs(network, self.gates, list(ids)) for ids in pieces]

    def __call__(self, method: Method, budget: str) -> dict[str, list[float]]:
        length = len(self.pieces[0])
        tokens = 1 if method.full else budget_tokens(budget, length)
        samples = [Sample((Turn(ids, scored=True),)) for ids in self.pieces]
        scores = [outcome.score for outcome in self.engine.run(samples, method, tokens)]
        return {NATS: scores, SHARE: [1.0] * len(scores) if method.full else self._shares(tokens)}

    def _shares(self, tokens: int) -> list[float]:
        pairs = zip(self.base.inputs, self.inputs, strict=True)
        found = [
            agreement(self.base.gates, Recorded(self.gates, ours), theirs.items(), "")
            for theirs, ours in pairs
        ]
        return [one.shares[tokens] for one in found]
