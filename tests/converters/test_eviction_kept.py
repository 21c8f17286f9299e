"""How gates want to be used survives every conversion; released gates compete as they were trained to."""

import dataclasses
import json

import pytest
from released import CONFIG, config, read, state, write

from mlx_kvret.converters import convert, load_any
from mlx_kvret.core.checkpoint import save_gates
from mlx_kvret.core.config import EvictionDefaults
from mlx_kvret.errors import CheckpointError

WISHES = EvictionDefaults(sinks=4, threshold=1e-6, scope="layer", smallest_budget=32)


@pytest.mark.parametrize(
    ("kind", "more", "scope"),
    [
        ("rg10", {}, "global"),
        ("rg", {}, "head"),
        ("rg10", {"global_capacity": False}, "head"),
        ("rg", {"global_capacity": True}, "global"),
    ],
)
def test_released_gates_compete_as_trained(tmp_path, kind, more, scope):
    folder = write(tmp_path / "released", config(kind) | more, state(kind))
    assert load_any(folder).config.eviction == EvictionDefaults(scope=scope)


@pytest.mark.parametrize("kind", ["rg10", "rg"])
def test_released_gates_without_the_field(tmp_path, kind):
    plain = config(kind)
    del plain["global_capacity"]
    found = load_any(write(tmp_path / "released", plain, state(kind))).config.eviction
    assert found == EvictionDefaults(scope="global" if kind == "rg10" else "head")


@pytest.mark.parametrize("wishes", [WISHES, None, EvictionDefaults(scope="head")])
@pytest.mark.parametrize("forms", [("shared", "mlx", "shared"), ("torch", "shared"), ("trimkv", "shared")])
def test_every_form_keeps_the_wishes(tmp_path, wishes, forms):
    source = load_any(write(tmp_path / "released", config(), state()))
    own = dataclasses.replace(source.config, eviction=wishes)
    save_gates(tmp_path / "0", own, source.tensors, source.provenance)
    for step, form in enumerate(forms):
        convert(tmp_path / str(step), tmp_path / str(step + 1), form)
        assert load_any(tmp_path / str(step + 1)).config == own


@pytest.mark.parametrize("wishes", [WISHES, None])
def test_gates_of_our_own_as_a_trimkv_folder(tmp_path, wishes):
    source = load_any(write(tmp_path / "released", config(), state()))
    save_gates(tmp_path / "own", dataclasses.replace(source.config, eviction=wishes), source.tensors)
    convert(tmp_path / "own", tmp_path / "theirs", "trimkv", model=tmp_path / "released")
    assert load_any(tmp_path / "theirs").config.eviction == wishes


def test_a_released_folder_comes_back_as_it_was(tmp_path):
    folder = write(tmp_path / "released", config("rg"), state("rg"))
    convert(folder, tmp_path / "ours", "shared")
    convert(tmp_path / "ours", tmp_path / "back", "trimkv")
    assert read(tmp_path / "back")[0] == read(folder)[0]


def test_damaged_wishes_are_refused(tmp_path):
    folder = write(tmp_path / "released", config(kvret_eviction={"sinks": -1}), state())
    with pytest.raises(CheckpointError, match="the gates' sinks is -1"):
        load_any(folder)
    (folder / CONFIG).write_text(json.dumps(config(kvret_eviction=7)))
    with pytest.raises(CheckpointError, match="eviction defaults is a int"):
        load_any(folder)
