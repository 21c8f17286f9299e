"""Gates trained with pictures on MLX: the same batches as on torch give the same losses and gradients."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from mlx.utils import tree_flatten

import mlx_kvret
from mlx_kvret.cli import main
from mlx_kvret.core.checkpoint import load_gates
from mlx_kvret.core.config import GateConfig
from mlx_kvret.cuda_backend.gates import RetentionGates as TorchGates
from mlx_kvret.cuda_backend.gates import to_arrays
from mlx_kvret.cuda_backend.training import engine as torch_engine
from mlx_kvret.cuda_backend.training.processes import Single
from mlx_kvret.cuda_backend.training.step import gradient as torch_gradient
from mlx_kvret.cuda_backend.training.student import Student as TorchStudent
from mlx_kvret.errors import DataError
from mlx_kvret.mlx_backend.gates import RetentionGates
from mlx_kvret.mlx_backend.seeing import Seen, taken
from mlx_kvret.mlx_backend.training.engine import _opened, train
from mlx_kvret.mlx_backend.training.step import gradient
from mlx_kvret.mlx_backend.training.student import Student
from mlx_kvret.mlx_backend.vision import forgetful, logits_of
from mlx_kvret.training.config import TrainConfig
from mlx_kvret.training.documents import Document
from mlx_kvret.training.packing import Batch, Packer
from mlx_kvret.training.records import Records
from mlx_kvret.training.run import Base, RunOptions
from vision import folders_mlx
from vision.folders_torch import folder
from vision.records import photo, standing
from vision.test_training_torch import documents, opened
from vision.tiny_torch import IMAGE

pytest.importorskip("mlx_vlm")

# float32 on both sides: sums of some hundred terms in another order
NEAR = 1e-6


def as_published(path: Path, to: Path) -> Path:
    """A Qwen2.5-VL folder with the config that its makers publish, its text settings on top."""
    shutil.copytree(path, to)
    config = json.loads((to / "config.json").read_text())
    text = config["text_config"]
    rope = {"rope_theta": text["rope_parameters"]["rope_theta"]}
    rope |= {"rope_scaling": text["rope_parameters"] | {"type": "default"}}
    flat = {name: value for name, value in text.items() if name not in ("model_type", "dtype")}
    (to / "config.json").write_text(json.dumps(flat | config | rope))
    return to


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Folders for torch and for MLX, with the same weights."""
    made = tmp_path_factory.mktemp("folders")
    found = {name: (folder(name, made / name), made / name) for name in ("qwen2_5_vl", "qwen3_vl")}
    own = found["qwen2_5_vl"][0]
    return found | {"qwen2_5_vl": (own, as_published(own, made / "published"))}


def both_gates(student: Student) -> tuple[RetentionGates, TorchGates]:
    """The same random gates in both backends."""
    torch.manual_seed(3)
    shape = student.layers, student.kv_heads, student.hidden_size
    config = GateConfig("rg10", *shape, width=16, bias_init=2.0, shared_projection=True)
    theirs, ours = TorchGates(config), RetentionGates(config)
    ours.load_weights([(name, mx.array(x)) for name, x in to_arrays(theirs).items()])
    return ours, theirs


@pytest.mark.parametrize(("name", "length"), [("qwen2_5_vl", 48), ("qwen3_vl", 48), ("qwen3_vl", 14)])
def test_losses_and_gradients_are_those_of_torch(
    name: str, length: int, folders: dict[str, tuple[Path, Path]], album: Path
) -> None:
    for_torch, for_mlx = folders[name]
    model, tokenizer, seeing = _opened(Base.find(for_mlx), pictures=True)
    base, their_tokenizer, their_seeing = opened(for_torch)
    assert seeing is not None
    mine = documents(album, tokenizer, seeing)  # type: ignore[arg-type]
    theirs = documents(album, their_tokenizer, their_seeing)
    for one, other in zip(mine, theirs, strict=True):
        assert one.ids.tolist() == other.ids.tolist()
        assert one.spans == other.spans
        assert (one.learn == other.learn).all()
    student, stock = Student(model, True, seeing), TorchStudent(base, their_seeing)
    gates, torch_gates = both_gates(student)
    assert student.packs
    config = TrainConfig(budget=5, length=length, capacity_weight=0.7, batch=2)
    records = Records([album])
    packers = [
        Packer(records, lambda n, own=own: own[n], length, 2, seed=3, epochs=1) for own in (mine, theirs)
    ]
    cut = shown = 0
    while (batch := packers[0].batch()) is not None:
        other = packers[1].batch()
        assert other is not None
        cut, shown = cut + batch.cut, shown + len(batch.shown)
        expected = torch_gradient(stock, torch_gates, other, config, Single("cpu"), 1)
        for micro_batch in (1, 2):
            losses, found = gradient(student, gates, batch, config, micro_batch)
            for column in ("kl", "cross_entropy", "capacity", "soft_size"):
                assert getattr(losses, column) == pytest.approx(getattr(expected, column), rel=1e-5, abs=1e-6)
            flat: Any = dict(tree_flatten(found))
            for weight, tensor in torch_gates.named_parameters():
                assert tensor.grad is not None
                assert np.abs(np.array(flat[weight]) - tensor.grad.numpy()).max() < NEAR, weight
            largest = max(float(tensor.grad.abs().max()) for tensor in torch_gates.parameters())
            assert largest > 1e3 * NEAR
    assert shown >= 3
    assert (cut > 0) == (length == 14)
    student.detach()
    stock.detach()


FAMILIES = ("qwen3_vl", "gemma3", "gemma4", "llava", "internvl_chat", "pixtral", "mistral3")


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_documents_are_as_each_alone_and_the_tower_looks_once(
    name: str, folders: dict[str, tuple[Path, Path]], album: Path, tmp_path: Path
) -> None:
    path = folders[name][1] if name in folders else folders_mlx.folder(name, tmp_path)
    model, tokenizer, seeing = _opened(Base.find(path), pictures=True)
    assert seeing is not None
    whole = documents(album, tokenizer, seeing)  # type: ignore[arg-type]
    if name == "gemma4":
        model.language_model.config.use_bidirectional_attention = "vision"
        whole = [typed(one) for one in whole]
    alone = []
    for one in whole:
        with forgetful(model.language_model):
            made = Seen(model, taken({"input_ids": one.ids, **one.pixels}))
            logits = made.model(made.ids, inputs_embeds=made.embeds, **made.given)
            alone.append(np.array(logits_of(logits)[0]))
    student, calls, stock = Student(model, True, seeing), list[int](), type(tower := eyes_of(model))

    class Counted(stock):  # type: ignore[misc, valid-type]
        def __call__(self, *args: Any, **given: Any) -> Any:
            calls.append(1)
            return super().__call__(*args, **given)

    tower.__class__ = Counted
    gates, _ = both_gates(student)
    found, config = [], TrainConfig(budget=5, length=512, batch=4)
    for apart, micro_batch in ((True, 1), (False, 4)):
        packer = Packer(Records([album]), lambda n: whole[n], 512, 4, seed=3, epochs=1, alone=apart)
        batch = packer.batch()
        assert batch is not None
        assert bool((batch.position[1:] < 0).all()) != apart
        calls.clear()
        losses, gradients = gradient(student, gates, batch, config, micro_batch)
        assert len(calls) == 3
        found.append((losses, dict(tree_flatten(gradients))))
        ids = mx.array(batch.ids)
        seen = student.see(ids, batch.starts, batch, range(4))
        assert (seen is not None and seen.ends is not None) == (name == "gemma4")
        hidden = student.teach(ids, batch.starts, seen).hidden
        compare(student, whole, alone, batch, hidden)
    (one, mine), (other, packed) = found
    for column in ("kl", "cross_entropy", "capacity", "soft_size"):
        assert getattr(one, column) == pytest.approx(getattr(other, column), rel=1e-5, abs=1e-6)
    for weight, value in mine.items():
        assert np.abs(np.array(value) - np.array(packed[weight])).max() < NEAR, weight
    student.detach()


def eyes_of(model: Any) -> Any:
    """A model's vision tower."""
    return getattr(model, "vision_tower", None) or model.vision_model


def typed(one: Document) -> Document:
    """With the types of tokens, by which Gemma 4 sees pictures whole; mlx-vlm's own processor gives none."""
    if not one.pixels:
        return one
    types = {"mm_token_type_ids": mx.array((one.ids == IMAGE).astype(np.int32))[None]}
    return replace(one, pixels={**one.pixels, **types})


def compare(
    student: Student, whole: list[Document], alone: list[np.ndarray], batch: Batch, hidden: mx.array
) -> None:
    """Each document's logits in the rows of a batch against its own alone."""
    found = list(standing(batch, whole))
    for number, row, own in found:
        logits = np.array(student.logits(hidden[row, own]))
        assert np.abs(logits - alone[number]).max() < 5e-6 * np.abs(alone[number]).max()
    assert len(found) == len(whole)


def test_training_by_the_command_line_and_its_gates(
    folders: dict[str, tuple[Path, Path]], album: Path, tmp_path: Path
) -> None:
    run, base = tmp_path / "run", folders["qwen3_vl"][1]
    command = ["train", str(base), "--data", str(album), "--output", str(run), "--backend", "mlx"]
    command += ["--length", "40", "--budget", "6", "--width", "8", "--steps", "2", "--loss", "assistant"]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    assert len((run / "log.csv").read_text().splitlines()) == 3
    for backend in ("mlx", "torch"):
        model, processor = mlx_kvret.load(base, run / "gates", backend=backend)
        cache = mlx_kvret.make_cache(model, budget=4, buffer=1)
        prompt = "w5 <image> w6"
        assert mlx_kvret.generate(model, processor, prompt, images=[photo(1)], cache=cache, max_tokens=4)
        assert cache.entries <= 5 * 6


def test_what_torch_began_goes_on_on_mlx_to_the_same_gates(
    folders: dict[str, tuple[Path, Path]], album: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(budget=6, length=40, width=8, steps=3)
    records, base = Records([album]), folders["qwen3_vl"][0]
    stock, steps = torch_engine.Engine.gradient, iter(range(9))

    def stopped(self: Any, *args: Any) -> Any:
        if next(steps) == 2:
            raise KeyboardInterrupt
        return stock(self, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch_engine.Engine, "gradient", stopped)
        torch_engine.train(base, records, config, RunOptions(tmp_path / "torch", device="cpu", save_every=2))
    shutil.copytree(tmp_path / "torch", tmp_path / "mlx")
    how = {"device": "cpu", "save_every": 2, "resume": True}
    for name, on in (("torch", torch_engine.train), ("mlx", train)):
        on(base, records, config, RunOptions(tmp_path / name, **how))
    one, other = (load_gates(tmp_path / name / "gates").tensors for name in ("torch", "mlx"))
    for name, tensor in one.items():
        assert np.abs(tensor.float32() - other[name].float32()).max() < 1e-5, name


def test_a_model_of_text_takes_no_pictures(album: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="reads text only; remove them, or train a vision-language model"):
        train(
            "demo", Records([album]), TrainConfig(budget=4, length=32, steps=1), RunOptions(tmp_path / "run")
        )
