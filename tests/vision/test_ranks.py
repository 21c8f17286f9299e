"""Models that see are refused where several ranks hold them, whoever has split them."""

from __future__ import annotations

import mlx.nn as nn
import pytest
import torch
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForImageTextToText

import mlx_kvret
from mlx_kvret.errors import UnsupportedModelError

from .tiny_torch import tiny_model

WORDS = "sees pictures is not bounded where several ranks hold it; load all of it in one process"


class Group:
    """The first of two ranks."""

    def rank(self):
        return 0

    def size(self):
        return 2


@pytest.fixture
def two(monkeypatch):
    """torch takes this process for the first of two, which exchange nothing."""
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3"])
def test_transformers_has_split_it(two, tmp_path, name):
    distributed = pytest.importorskip("transformers.distributed")
    tiny_model(name).save_pretrained(tmp_path)
    how = distributed.DistributedConfig(tp_plan="auto", tp_size=2)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path, distributed_config=how)
    before = type(model), model.config._attn_implementation
    with pytest.raises(UnsupportedModelError, match=WORDS):
        mlx_kvret.attach(model)
    assert (type(model), model.config._attn_implementation) == before and "_kvret" not in vars(model)


@pytest.mark.parametrize("how", ["heads", "layers"])
def test_mlx_vlm_has_split_it(folder, how):
    model, _ = mlx_kvret.load(folder, None, backend="mlx")
    mlx_kvret.detach(model)
    stack = model.language_model.model
    if how == "heads":
        # what their ``shard`` puts in place of a projection
        split = nn.AllToShardedLinear(64, 64, bias=False)
        split.group = Group()
        stack.layers[0].self_attn.q_proj = split
    else:
        stack.pipeline_size = 2
    for part in (model, model.language_model):
        with pytest.raises(UnsupportedModelError, match=WORDS):
            mlx_kvret.attach(part)


def test_loading_refuses_at_once(folder):
    with pytest.raises(mlx_kvret.errors.ConfigError, match="a model that sees pictures does not work with"):
        mlx_kvret.load(folder, None, backend="mlx", parallel="tensor")
