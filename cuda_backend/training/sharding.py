"""A base model of which every process holds a share of the weights: FSDP2, set up by transformers' loader.

The loader reads this process's slices only. A layer's weights are gathered when it runs, forward and
backward, and let go after; what is no layer (embeddings, head, tower) is there whole for one round of
micro-batches. Gathering is for all processes at once, so all must run the layers equally often: see
:func:`.processes.rounds`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from mlx_kvret.core.model_folder import model_config
from mlx_kvret.errors import ConfigError, UnsupportedFeatureError, UnsupportedModelError
from mlx_kvret.training.run import RunOptions

from ..loading import load_model

# what `accelerate launch --use_fsdp` says in the environment, and the values that ask for what is done here
_ACCELERATE = "ACCELERATE_USE_FSDP"
_DONE = {
    "FSDP_SHARDING_STRATEGY": ("FULL_SHARD", "1"),
    "FSDP_RESHARD_AFTER_FORWARD": ("TRUE", "FULL_SHARD"),
    "FSDP_OFFLOAD_PARAMS": ("FALSE",),
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": ("FALSE",),
    "FSDP_IGNORED_MODULES": (),
}
# with it transformers leaves the weights of all processes but the first empty, for accelerate to fill
_FIRST_ONLY = "FSDP_CPU_RAM_EFFICIENT_LOADING"


def wanted(options: RunOptions, count: int, device: torch.device) -> bool:
    """Whether ``count`` processes shard the base: ``--shard``, or accelerate was told to use FSDP.

    Raises:
        ConfigError: there is one process, or the other processes' devices cannot be what was asked for.
        UnsupportedFeatureError: accelerate was told what is not done here.
    """
    told = os.environ.get(_ACCELERATE, "").lower() in ("true", "1")
    if told:
        os.environ[_FIRST_ONLY] = "false"
        _check_settings(options)
    if not (told or options.shard):
        return False
    if count == 1:
        raise ConfigError(
            "weights are sharded over several processes, and there is one; start them with `accelerate "
            "launch --num_processes 2 ...` or `torchrun --nproc-per-node 2 ...`, or leave out --shard"
        )
    there = torch.accelerator.current_accelerator()
    if there is not None and there.type != device.type:
        raise ConfigError(
            f"weights are sharded over the devices of type {there.type} that are there, and --device is "
            f"{device.type}; leave out --device, or hide them (CUDA_VISIBLE_DEVICES=)"
        )
    return True


def _check_settings(options: RunOptions) -> None:
    for name, values in _DONE.items():
        found = os.environ.get(name, "")
        if found and found.upper() not in values:
            expected = " or ".join(values).lower() or "nothing"
            raise UnsupportedFeatureError(
                f"accelerate's configuration has {name.lower()}: {found}, which training of gates does not "
                f"do; expected {expected}"
            )
    if os.environ.get("FSDP_ACTIVATION_CHECKPOINTING", "").lower() == "true" and not options.recompute:
        raise ConfigError(
            "accelerate's configuration has fsdp_activation_checkpointing: true, and there is "
            "--no-recompute; leave out one of them"
        )


def sharded_over(count: int) -> Any:
    """What has transformers' loader shard a model over so many processes.

    Raises:
        UnsupportedFeatureError: this transformers cannot.
    """
    try:
        from transformers.distributed import DistributedConfig

        return DistributedConfig(fsdp_size=count)
    except (ImportError, TypeError) as error:
        raise UnsupportedFeatureError(
            "this transformers cannot shard a model; install transformers 5.18 or later"
        ) from error


def load_sharded(folder: Path, dtype: str, sharding: Any) -> PreTrainedModel:
    """This process's share of a model; ``sharding`` as of :func:`sharded_over`.

    Raises:
        UnsupportedModelError: transformers does not know how to shard it layer by layer.
    """
    # of a model that sees it says which parts of the plan are another part's
    log = logging.getLogger("transformers.distributed.mixin")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        model = load_model(folder, dtype=dtype, distributed_config=sharding)
    except UnsupportedModelError as error:
        if "fsdp_plan" not in str(error):
            raise
        raise _unplanned(folder) from error
    finally:
        log.setLevel(level)
    layers = [m for m in model.get_decoder().modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers or not all(isinstance(layer, FSDPModule) for layer in layers):
        raise _unplanned(folder)
    return model


def _unplanned(folder: Path) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"transformers has no plan to shard {model_config(folder).get('model_type')} models layer by layer; "
        "train without --shard, or another model"
    )


class Shards:
    """The sharded modules of a model that are no layers; none of a model that one process holds whole."""

    def __init__(self, model: PreTrainedModel):
        self._model = model
        layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
        inside: set[nn.Module] = {part for layer in layers for part in layer.modules()}
        self._outer: list[Any] = [m for m in model.modules() if isinstance(m, FSDPModule) and m not in inside]
        for module in self._outer:
            # how often each is called differs between processes, so no call may gather or let go
            module.set_reshard_after_forward(False, recurse=False)
            module.set_reshard_after_backward(False, recurse=False)

    def __bool__(self) -> bool:
        return bool(self._outer)

    @property
    def gathered(self) -> int:
        """Bytes that lie here in a step beside this process's share: all that is no layer, and two layers.

        Of a layer there are its weights and, for a moment, what they were gathered in.
        """
        if not self._outer:
            return 0
        inner = [m for m in self._model.modules() if isinstance(m, FSDPModule) and m not in self._outer]
        layers = [sum(weight.nbytes for weight in layer.parameters()) for layer in inner]
        return sum(weight.nbytes for weight in self._model.parameters()) - sum(layers) + 2 * max(layers)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Within it the modules have all of their weights; all processes enter it together."""
        for module in self._outer:
            module.unshard()
        try:
            yield
        finally:
            self.close()

    def close(self) -> None:
        """Let go of the other processes' shares."""
        for module in self._outer:
            module.reshard()
