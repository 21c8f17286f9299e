"""Reference engine: any transformers model whose attention all goes through the registry, many texts at once.

The model is stock. Its attention function is replaced by one that keeps the entries of all layers itself, so
that every policy can see keys, gates and attention. Plain where the backends are fast, and their oracle.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from ..core.checkpoint import GateCheckpoint
from ..core.fitting import fit_gates
from ..core.picture_prompts import tokenizer_of
from ..errors import ConfigError, UnsupportedModelError
from .chunks import Pace
from .engine import Outcome
from .methods import Method
from .prefix import ROOM, Prefix
from .reading import Reading
from .samples import Sample, batches
from .sight import Sights

IMPLEMENTATION = "kvret_reference"
_UNKNOWN = ("softcap", "s_aux", "position_bias", "sliding_window")


class ReferenceEngine:
    """Implements :class:`~mlx_kvret.evaluation.engine.Engine`.

    ``batch`` samples of equal shape are read side by side. Their beginning, before anything is evicted, is
    read once for all methods that are run at a budget in turn. The attention function of ``model`` is changed
    for good.

    Raises:
        UnsupportedModelError: some layers do not cache every token.
    """

    name = "reference"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any = None,
        chunk: int | None = None,
        buffer: int | None = None,
        batch: int = 1,
    ) -> None:
        from mlx_kvret.cuda_backend.hooks import shape_of
        from mlx_kvret.cuda_backend.modules import attention_modules, competing_layers

        self.model, self.processor = model.eval().requires_grad_(False), tokenizer
        self.tokenizer = tokenizer_of(tokenizer)
        self.pace, self.batch = Pace(chunk, buffer), batch
        self.gates: Any = None
        self.reading: Reading | None = None
        self.sights = Sights(model, tokenizer)
        self._shared: Any = None
        self._prefixes: list[tuple[list[Sample], Prefix]] = []
        modules = attention_modules(model)
        if competing_layers(model) != sorted(modules):
            raise UnsupportedModelError(
                f"{type(model).__name__} has layers that do not cache every token; the reference engine runs "
                "models with global attention only, use another backend"
            )
        self._shape = shape_of(model)
        model.set_attn_implementation(IMPLEMENTATION)
        if getattr(model.config, "vision_config", None) is not None:
            # the part that sees caches nothing
            model.set_attn_implementation({"vision_config": "sdpa"})
        for layer, index in enumerate(sorted(modules)):
            vars(modules[index])["_kvret_reference"] = (self, layer)
            modules[index].register_forward_pre_hook(self._observe, with_kwargs=True)

    def use_gates(self, gates: GateCheckpoint | nn.Module | None) -> None:
        """Score with other gates from now on: a checkpoint, or a module with ``log_beta(layer, x)``.

        Raises:
            ModelMismatchError: a checkpoint for another model.
        """
        if isinstance(gates, GateCheckpoint):
            from mlx_kvret.cuda_backend.gates import from_checkpoint

            gates.check_model(self.model.config.to_dict())
            fit_gates(gates.config, self._shape, range(self._shape.layers), self._shape.layers)
            gates = from_checkpoint(gates).to(self.model.device)
        self.gates = gates

    def runs(self, method: Method) -> bool:
        return True

    def run(self, samples: Sequence[Sample], method: Method, budget: int) -> list[Outcome]:
        outcomes: dict[int, Outcome] = {}
        for places in batches(samples, self.batch):
            here = [samples[i] for i in places]
            prefix = None if method.full else self._prefix(samples, here, budget)
            outcomes |= zip(places, self.open(here, method, budget, prefix).run(), strict=True)
        return [outcomes[i] for i in range(len(samples))]

    def open(
        self, samples: Sequence[Sample], method: Method, budget: int, prefix: Prefix | None = None
    ) -> Reading:
        """Samples of one shape, about to be read."""
        if method.learned and self.gates is None:
            raise ConfigError(f"method {method.name} needs gates; give some, or drop it")
        if method.full:
            return Reading(self, samples, method, None, self.pace.chunk(None))
        # gates of an experiment may be any module with log_beta
        config = method.eviction(budget, self.pace.buffer(budget), getattr(self.gates, "config", None))
        return Reading(self, samples, method, config, self.pace.chunk(budget), prefix)

    def _prefix(self, every: Sequence[Sample], here: Sequence[Sample], budget: int) -> Prefix | None:
        """What some samples begin with until entries go for the first time, if there is room to hold it."""
        chunk, tokens = self.pace.chunk(budget), self.pace.first_compaction(here[0].shape[0][0], budget)
        if tokens is None:
            return None
        if self._shared != (run := (chunk, tokens, list(every))):
            self._shared, self._prefixes = run, []
        for known, prefix in self._prefixes:
            if known == here:
                return prefix
        if sum(prefix.nbytes for _, prefix in self._prefixes) > ROOM:
            return None
        self._prefixes.append((list(here), Prefix(self, here, chunk, tokens)))
        return self._prefixes[-1][1]

    def _observe(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        assert self.reading is not None
        self.reading.inputs = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    if wrong := [name for name in _UNKNOWN if others.get(name) is not None]:
        raise UnsupportedModelError(
            f"{type(module).__name__} uses {', '.join(wrong)} in attention, which the reference engine does "
            "not follow; use another backend"
        )
    engine, layer = vars(module)["_kvret_reference"]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return engine.reading.attend(layer, query, key, value, scale).transpose(1, 2), None


def _no_mask(**_: Any) -> None:
    return None


AttentionInterface.register(IMPLEMENTATION, _attend)
AttentionMaskInterface.register(IMPLEMENTATION, _no_mask)
