"""Reading training data, and naming what is wrong with it."""

import json

import pytest

from mlx_kvret.errors import ConfigError, DataError
from mlx_kvret.training import records as module
from mlx_kvret.training.records import Records


def write(path, *lines):
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    return path


GOOD = json.dumps({"text": "one"})


def test_all_sources_in_one_row(tmp_path):
    chat = {"messages": [{"role": "user", "content": "hé"}]}
    lines = write(tmp_path / "a.jsonl", GOOD, "", json.dumps(chat), json.dumps({"text": "three", "id": 7}))
    text = write(tmp_path / "b.txt", "a whole\n\nfile")
    records = Records([lines, text, lines])
    assert len(records) == 7
    assert [records.read(i).text for i in (0, 2, 3, 4)] == ["one", "three", "a whole\n\nfile", "one"]
    assert records.read(1).messages == records.read(5).messages == chat["messages"]
    assert records.read(2).where == f"{lines}:4"
    first, second, third = records.identity
    assert first == third != second
    assert (first["records"], second["records"]) == (3, 1)


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[1]", "holds a list"),
        ("{}", "only nothing"),
        ('{"prompt": "a", "answer": "b"}', "only prompt, answer"),
        ('{"text": "a", "messages": []}', "both text and messages"),
        ('{"text": 3}', "text is a int"),
        ('{"text": " \\n "}', "empty"),
        ('{"messages": []}', "expected a list of messages"),
        ('{"messages": [{"content": "a"}]}', "message 0 .* with a role"),
        (b'{"text": "\xff"}', "not UTF-8"),
        ('{"text": "\\ud800"}', "half a character"),
        ('{"messages": [{"role": "user", "content": "a\\udfff"}]}', "half a character"),
        ('{"text": "a", "text": "b"}', "stands more than once"),
        ('{"text": "a", "score": NaN}', "NaN is no number"),
        ('{"text": "a", "id": ' + "9" * 400 + "}", "beyond the range"),
        ('{"text": "a", "images": ["x"]}', "has images, of which nothing would be learnt"),
        ('{"text": "a", "tools": []}', "has tools, of which"),
        ('{"messages": [{"role": "user", "content": "a"}], "images": ["x"]}', "1 images and 0 places"),
        ('{"messages": [{"role": "user", "content": "a"}], "tools": "[]"}', "expected a list of objects"),
        ('{"messages": [{"role": "user", "content": "a", "images": [1]}]}', "message 0 has images"),
        ('{"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}', "no file"),
        ('{"messages": [{"role": "user", "content": ["a"]}]}', "neither text nor image"),
        ('{"messages": [{"role": "user", "content": 3}]}', "content is a int"),
    ],
)
def test_bad_lines_are_named_or_skipped(tmp_path, line, message):
    path = write(tmp_path / "a.jsonl", GOOD, line, GOOD)
    with pytest.raises(DataError, match=f"a.jsonl:2.*{message}.*--skip-bad"):
        Records([path])
    records = Records([path], skip_bad=True)
    assert len(records) == 2
    assert records.read(1).where.endswith(":3")
    assert len(records.skipped) == 1


def test_what_is_used_and_what_says_where_a_record_is_from(tmp_path):
    tools = [{"type": "function", "function": {"name": "look"}}]
    said = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look"}}]}
    chat = {"messages": [said], "tools": tools, "id": 3, "meta": {"images": 1}, "images": None}
    record = Records([write(tmp_path / "a.jsonl", json.dumps(chat))]).read(0)
    assert record.tools == tools and record.messages == [said]
    parts = [{"type": "text", "text": "hi"}]
    chat = {"messages": [{"role": "user", "content": parts}], "tools": []}
    record = Records([write(tmp_path / "a.jsonl", json.dumps(chat))]).read(0)
    assert record.tools is None and record.messages[0]["content"] == parts


def test_huge_records(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MOST_BYTES", 100)
    lines = write(tmp_path / "a.jsonl", GOOD, json.dumps({"text": "x" * 1000}), GOOD)
    with pytest.raises(DataError, match=r"a.jsonl:2 has 1,013 bytes; a record may have 100"):
        Records([lines])
    records = Records([lines], skip_bad=True)
    assert [records.read(i).where[-2:] for i in range(2)] == [":1", ":3"]
    with pytest.raises(DataError, match=r"b\.txt has 101 bytes"):
        Records([write(tmp_path / "b.txt", "y" * 101)])


def test_sources_that_cannot_be_used(tmp_path):
    with pytest.raises(ConfigError, match="there is no training data"):
        Records()
    with pytest.raises(ConfigError, match="there is no file"):
        Records([tmp_path / "none.jsonl"])
    with pytest.raises(ConfigError, match=r"ending '\.json'"):
        Records([write(tmp_path / "a.json", "[]")])
    with pytest.raises(DataError, match="no usable record"):
        Records([write(tmp_path / "empty.jsonl", "")])
    with pytest.raises(DataError, match="empty"):
        Records([write(tmp_path / "empty.txt", "")])


def test_changed_data_have_another_identity(tmp_path):
    path = write(tmp_path / "a.jsonl", GOOD)
    before = Records([path]).identity
    write(path, GOOD.replace("one", "two"))
    assert Records([path]).identity != before


def test_data_sets(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {"text": ["one", None, ""], "messages": [None, [{"role": "user", "content": "two"}], None]}
    datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(DataError, match=r"saved\[train\]:2 is empty"):
        Records(datasets=[str(tmp_path / "saved")])
    records = Records(datasets=[str(tmp_path / "saved")], skip_bad=True)
    assert records.read(0).text == "one"
    assert [m["content"] for m in records.read(1).messages] == ["two"]
    (tmp_path / "void").mkdir()
    with pytest.raises(DataError, match="cannot open the data set"):
        Records(datasets=[str(tmp_path / "void")])
