"""Texts by the model itself: as long as asked for, repeatable, and written on after a kill."""

import json

import pytest
from transformers import AutoTokenizer

from mlx_kvret.demo import MODEL
from mlx_kvret.errors import ConfigError, UnsupportedFeatureError
from mlx_kvret.training import own_words as module
from mlx_kvret.training.own_words import own_words, write_records
from mlx_kvret.training.records import Record, Records

LENGTH = 96
TOKENIZER = AutoTokenizer.from_pretrained(MODEL)
SEEDS = [Record("a", text="Stella likes salmon . " * 20), Record("b", text="Ivan likes copper . " * 20)]


def answer(asked):
    return [TOKENIZER.decode(one.ids[: one.most]) for one in asked]


def write(path, count=6, seeds=SEEDS, **options):
    return list(write_records(path, seeds, count, LENGTH, 0, TOKENIZER, answer, **options))


def test_records_are_read_back(tmp_path):
    assert write(tmp_path / "own.jsonl") == [0, 1, 2, 3, 4, 5, 6]
    records = Records([tmp_path / "own.jsonl"])
    assert len(records) == 6
    kinds = {"text" if records.read(i).text else "messages" for i in range(6)}
    assert kinds == {"text", "messages"} if TOKENIZER.chat_template else {"text"}
    for i in range(6):
        record = records.read(i)
        if record.text:
            assert len(TOKENIZER.encode(record.text)) <= LENGTH + 4
        else:
            assert [m["role"] for m in record.messages[:2]] == ["user", "assistant"]
            assert len(record.messages) % 2 == 0


def test_goes_on_behind_the_last_whole_line(tmp_path):
    write(tmp_path / "whole.jsonl")
    path = tmp_path / "own.jsonl"
    text = (tmp_path / "whole.jsonl").read_text()
    lines = text.splitlines(keepends=True)
    path.with_name("own.jsonl.part").write_text(lines[0] + lines[1] + lines[2][:9])
    assert write(path, resume=True) == [2, 3, 4, 5, 6]
    assert path.read_text() == text
    assert not path.with_name("own.jsonl.part").exists()


def test_nothing_is_left_to_write(tmp_path):
    write(tmp_path / "own.jsonl")
    (tmp_path / "own.jsonl").rename(tmp_path / "own.jsonl.part")
    assert write(tmp_path / "own.jsonl", resume=True) == [6]
    assert (tmp_path / "own.jsonl").exists()


def test_a_new_run_begins_anew(tmp_path):
    path = tmp_path / "own.jsonl"
    path.with_name("own.jsonl.part").write_text('{"text": "of another run"}\n')
    assert write(path) == [0, 1, 2, 3, 4, 5, 6]
    assert "of another run" not in path.read_text()


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_only_a_model_is_needed(tmp_path, backend):
    path = tmp_path / "own.jsonl"
    assert list(own_words("demo", backend, [], path, 2, 32, 0)) == [0, 1, 2]
    for line in path.read_text().splitlines():
        assert json.loads(line).keys() <= {"text", "messages"}
    with pytest.raises(ConfigError, match="exists already"):
        list(own_words("demo", backend, [], path, 2, 32, 0))


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_side_by_side_as_one_by_one(tmp_path, backend, monkeypatch):
    def refused(*_, **__):
        raise UnsupportedFeatureError("no rows")

    monkeypatch.setattr(module, "OPENERS", ("remember Ada amber", "the weary miller", "recall Ada"))
    list(own_words("demo", backend, [], tmp_path / "rows", 5, 48, 3))
    # a process that was killed in the middle, and a model of which rows are refused
    lines = (tmp_path / "rows").read_text().splitlines(keepends=True)
    (tmp_path / "alone.part").write_text(lines[0])
    monkeypatch.setattr(module, "generate_batch", refused)
    assert list(own_words("demo", backend, [], tmp_path / "alone", 5, 48, 3, resume=True)) == [1, 2, 3, 4, 5]
    assert (tmp_path / "alone").read_text() == "".join(lines)
    assert len(set(lines)) == 5


def test_as_many_ask_at_a_time_as_there_are_rows(tmp_path):
    asked = []

    def told(those):
        asked.append(len(those))
        return answer(those)

    list(write_records(tmp_path / "own", SEEDS, module.ROWS + 3, LENGTH, 0, TOKENIZER, told))
    assert asked[0] == module.ROWS and 3 in asked
