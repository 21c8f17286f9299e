"""Gates trained with pictures on torch: records, packing, and a decoder that is given what the tower made."""

from __future__ import annotations

import inspect
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import mlx_kvret
from mlx_kvret.cli import main
from mlx_kvret.core.config import GateConfig
from mlx_kvret.core.picture_prompts import spoken_by
from mlx_kvret.cuda_backend.gates import RetentionGates
from mlx_kvret.cuda_backend.loading import load_model, read_tokenizer
from mlx_kvret.cuda_backend.seeing import taken
from mlx_kvret.cuda_backend.training.pictures import Seeing
from mlx_kvret.cuda_backend.training.processes import Single
from mlx_kvret.cuda_backend.training.step import gradient
from mlx_kvret.cuda_backend.training.student import Student
from mlx_kvret.errors import DataError
from mlx_kvret.training import pictures
from mlx_kvret.training.config import TrainConfig
from mlx_kvret.training.documents import Document, document
from mlx_kvret.training.packing import Packer
from mlx_kvret.training.pictures import Shown, spread
from mlx_kvret.training.records import Records

from .folders_torch import folder
from .records import photo, said, standing
from .tiny_torch import IMAGE

NEAR = 2e-6


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    names = ("qwen2_5_vl", "qwen3_vl", "glm4v", "llava", "idefics3", "internvl", "gemma3", "gemma4")
    return {name: folder(name, tmp_path_factory.mktemp(name)) for name in names}


def opened(path: Path) -> tuple[Any, Any, Seeing]:
    model, processor = load_model(path), read_tokenizer(path)
    seeing = Seeing.of(model, processor)
    assert seeing is not None
    return model, spoken_by(processor), seeing


def documents(album: Path, tokenizer: Any, seeing: Seeing, loss: Any = "all") -> list[Document]:
    records = Records([album])
    return [document(records.read(n), tokenizer, loss, seeing) for n in range(len(records))]


FAMILIES = ("qwen2_5_vl", "qwen3_vl", "glm4v", "llava", "idefics3", "internvl", "gemma3", "gemma4")


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_documents_are_as_each_alone_in_the_stock_model(
    name: str, folders: dict[str, Path], album: Path
) -> None:
    model, tokenizer, seeing = opened(folders[name])
    whole = documents(album, tokenizer, seeing)
    alone = []
    with torch.no_grad():
        for one in whole:
            given = taken(model, {"input_ids": one.ids[None], **one.pixels})
            alone.append(model(input_ids=given.ids, **given.given, use_cache=False).logits[0])
    records = Records([album])
    length = 1024 if name in ("llava", "internvl", "gemma4") else 48
    packer = Packer(records, lambda n: whole[n], length, 2, seed=3, epochs=1)
    student, found = Student(model, seeing), dict[int, torch.Tensor]()
    calls = _counted(model)
    while (batch := packer.batch()) is not None:
        ids, starts = torch.from_numpy(batch.ids), torch.from_numpy(batch.starts)
        seen, before = student.see(ids, starts, batch, range(len(ids))), len(calls)
        hidden = student.teach(ids, starts, seen).hidden
        assert len(calls) == before and len(calls) <= 3
        for number, row, own in standing(batch, whole):
            found[number] = student.logits(hidden[row, own])
    assert len(found) == len(whole)
    for number, expected in enumerate(alone):
        assert float((found[number] - expected).abs().max() / expected.abs().max()) < NEAR
    # the tower has seen each document once
    assert len(calls) == 3
    student.detach()


@pytest.mark.parametrize("name", ["gemma3", "gemma4", "qwen3_vl"])
def test_packing_changes_neither_losses_nor_gradients(
    name: str, folders: dict[str, Path], album: Path
) -> None:
    model, tokenizer, seeing = opened(folders[name])
    whole, student = documents(album, tokenizer, seeing), Student(model, seeing)
    torch.manual_seed(3)
    shape = student.layers, student.kv_heads, student.hidden_size
    gates = RetentionGates(GateConfig("rg10", *shape, width=16, bias_init=1.0, shared_projection=True))
    config = TrainConfig(budget=5, length=512, batch=4)
    found = []
    for alone, micro_batch, recompute in ((True, 1, False), (False, 2, True)):
        if recompute:
            student.checkpoint_layers()
        packer = Packer(Records([album]), lambda n: whole[n], 512, 4, seed=3, epochs=1, alone=alone)
        batch = packer.batch()
        assert batch is not None
        assert len(batch.where) == 4
        assert bool((batch.position[1:] < 0).all()) != alone
        losses = gradient(student, gates, batch, config, Single("cpu"), micro_batch)
        found.append(
            (losses, [weight.grad.clone() for weight in gates.parameters() if weight.grad is not None])
        )
    (one, apart), (other, packed) = found
    for column in ("kl", "cross_entropy", "capacity", "soft_size"):
        assert getattr(one, column) == pytest.approx(getattr(other, column), rel=1e-5, abs=1e-7)
    largest = max(float(weight.abs().max()) for weight in apart)
    # terms of about 1, in another order, whose sum is the gradient
    assert largest > 1e-3
    for left, right in zip(apart, packed, strict=True):
        assert float((left - right).abs().max()) < 1e-6
    student.detach()


def _counted(model: Any) -> list[int]:
    calls: list[int] = []
    stock = model.base_model.get_image_features

    def counted(*args: Any, **given: Any) -> Any:
        calls.append(1)
        return stock(*args, **given)

    counted.__signature__ = inspect.signature(stock)  # type: ignore[attr-defined]
    vars(model.base_model)["get_image_features"] = counted
    return calls


def test_what_is_learnt_and_no_picture_is_cut(folders: dict[str, Path], album: Path) -> None:
    _, tokenizer, seeing = opened(folders["qwen3_vl"])
    everything, answers = (documents(album, tokenizer, seeing, loss) for loss in ("all", "assistant"))
    for whole, one in zip(everything, answers, strict=True):
        shown = whole.ids == IMAGE
        assert (whole.learn == ~shown).all() and not one.learn[shown].any()
    assert [[b - a for a, b in one.spans] for one in everything] == [[6], [9], [], [6, 6]]
    assert [one.ids[one.learn].tolist() for one in answers] == [[30, 31], [32, 33, 34], [35], [36, 37]]
    long = everything[3]
    records = Records([album])
    for length in range(8, len(long.ids) + 1):
        packer = Packer(records, lambda _: long, length, 1, seed=0, epochs=1)
        pieces = packer._cut(long)
        assert pieces[0].start == 0 and all(a.stop == b.start for a, b in itertools.pairwise(pieces))
        for a, b in long.spans:
            assert any(piece.start <= a and b <= piece.stop for piece in pieces)
        batch = packer.batch()
        assert batch is not None
        for at, token in enumerate(batch.ids[0, 1:]):
            assert not (batch.learn[0, at] and token == IMAGE)


def test_a_document_in_pieces_gives_each_its_own_pictures(folders: dict[str, Path], album: Path) -> None:
    model, tokenizer, seeing = opened(folders["qwen3_vl"])
    long = documents(album, tokenizer, seeing)[3]
    packer = Packer(Records([album]), lambda _: long, 12, 1, seed=0, epochs=1)
    student, parts = Student(model, seeing), []
    while len(parts) < len(packer._cut(long)):
        batch = packer.batch()
        assert batch is not None
        ids, starts = torch.from_numpy(batch.ids), torch.from_numpy(batch.starts)
        seen = student.see(ids, starts, batch, [0])
        parts.append((batch.ids[0], None if seen is None else seen.given["inputs_embeds"][0]))
    given = taken(model, {"input_ids": long.ids[None], **long.pixels})
    whole = seeing.inputs(given.ids, torch.zeros_like(given.ids), [_all_of(long)]).given["inputs_embeds"][0]
    begin = 0
    for ids, embeds in parts:
        if embeds is not None:
            assert torch.equal(embeds, whole[begin : begin + len(ids)])
        begin += len(ids)
    student.detach()


def _all_of(long: Document) -> Shown:
    return Shown(0, 0, long.ids, long.spans, long.pixels, 0, 0, long.ids)


def test_training_by_the_command_line_and_its_gates(
    folders: dict[str, Path], album: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = [
        "train",
        str(folders["qwen3_vl"]),
        "--data",
        str(album),
        "--output",
        str(run),
        "--backend",
        "torch",
    ]
    command += ["--length", "40", "--budget", "6", "--width", "8", "--steps", "3", "--loss", "assistant"]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    losses = (run / "log.csv").read_text().splitlines()
    assert len(losses) == 4
    model, processor = mlx_kvret.load(folders["qwen3_vl"], run / "gates", backend="torch")
    cache = mlx_kvret.make_cache(model, budget=4, buffer=1)
    answer = mlx_kvret.generate(
        model, processor, "w5 <image> w6", images=[photo(1)], cache=cache, max_tokens=4
    )
    assert answer and cache.entries <= 5 * 6


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"messages": said("<image> w20", "w30"), "images": []}, None),
        ({"messages": said("<image> w20", "w30"), "images": ["a.png", "a.png"]}, "2 images and 1 places"),
        ({"messages": said("w20", "w30"), "images": ["a.png"]}, "1 images and 0 places"),
        ({"messages": said([{"type": "image"}], "w30")}, "0 images and 1 places"),
        ({"messages": said("<image>", "w30"), "images": ["gone.png"]}, "there is no file .*gone.png"),
        ({"messages": said("<image>", "w30"), "images": "a.png"}, "expected a list of files"),
        ({"messages": said([{"type": "video", "video": "a.mp4"}], "w30")}, "neither text nor image"),
        ({"messages": said("<image>", "w30"), "images": ["http://a.org/a.png"]}, "nothing is fetched"),
        (
            {"messages": said([{"type": "image", "image": {"file": "a.png"}}], "w30")},
            "message 0 holds.*give a url",
        ),
        ({"messages": said([{"type": "image", "image": "a.png"}], "w30")}, None),
        ({"messages": said([{"type": "image", "image_url": {"url": "a.png"}}], "w30")}, None),
        ({"messages": said([{"type": "image", "index": 0}], "w30"), "images": [{"path": "a.png"}]}, None),
        ({"messages": said("<image>", "w30"), "images": ["file:%61.png"]}, None),
    ],
)
def test_records_that_cannot_be_right_are_refused(row: Any, match: str | None, tmp_path: Path) -> None:
    photo(1).save(tmp_path / "a.png")
    path = tmp_path / "records.jsonl"
    path.write_text(json.dumps(row))
    if match is None:
        record = Records([path]).read(0)
        assert len(pictures.opened(record.images, record.folder, record.where)) == ("png" in str(row))
        return
    with pytest.raises(DataError, match=match):
        Records([path])


def test_models_that_cannot_learn_from_pictures_say_so(folders: dict[str, Path], album: Path) -> None:
    _, tokenizer, seeing = opened(folders["qwen3_vl"])
    record = Records([album]).read(0)
    with pytest.raises(DataError, match="reads text only"):
        document(record, tokenizer, "all", None)
    (album.parent / "pictures" / "0.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="no picture that can be read"):
        document(record, tokenizer, "all", seeing)


def test_marks_become_many_tokens() -> None:
    learn = np.array([0, 0, 1, 1, 0, 1], bool)
    marks = frozenset({9})
    found = spread(learn, [1, 9, 2, 3, 9, 4], [1, 9, 9, 9, 2, 3, 9, 9, 4], marks, "x")
    assert found.tolist() == [False, False, False, False, True, True, False, False, True]
    with pytest.raises(DataError, match="changes the text beside its pictures"):
        spread(learn, [1, 9, 2, 3, 9, 4], [1, 9, 9, 9, 2, 5, 9, 9, 4], marks, "x")
