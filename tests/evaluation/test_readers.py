"""Files of public benchmarks in their formats, and what is said of broken ones."""

import json

import pytest

from mlx_kvret.errors import ConfigError
from mlx_kvret.evaluation.tasks import make_samples


def samples(path, kind, rows, tokenizer, **options):
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return make_samples(f"{kind}:{path}", options.pop("length", 0), 10, 0, tokenizer)


def text(ids):
    return "".join(map(chr, ids))


def test_longbench(tmp_path, characters):
    rows = [
        {
            "context": "The car is red.",
            "input": "What colour?",
            "answers": ["red", "crimson"],
            "all_classes": None,
        },
        {"context": "Buy it now.", "input": "Which kind?", "answers": ["ad"], "all_classes": ["ad", "poem"]},
    ]
    first, second = samples(tmp_path / "a.jsonl", "longbench", rows, characters)
    assert text(first.turns[0].ids[1:]) == "The car is red."
    question = first.turns[0].questions[0]
    assert question.references == ("red", "crimson") and question.metric == "f1"
    assert "What colour?" in text(question.ids)
    assert second.turns[0].questions[0].metric == "any" and "ad, poem" in text(
        second.turns[0].questions[0].ids
    )


def test_ruler(tmp_path, characters):
    rows = [
        {
            "index": 0,
            "input": "noise\nmore noise\nWhere is it?",
            "outputs": ["7", "8"],
            "answer_prefix": " In",
        }
    ]
    (sample,) = samples(tmp_path / "a.jsonl", "ruler", rows, characters)
    assert text(sample.turns[0].ids[1:]) == "noise\nmore noise"
    question = sample.turns[0].questions[0]
    assert text(question.ids) == "\nWhere is it? In"
    assert question.references == ("7", "8") and question.metric == "all"


def test_longmemeval(tmp_path, characters):
    row = {
        "question": "Which pet?",
        "answer": 3,
        "haystack_dates": ["May 1", "May 2"],
        "haystack_sessions": [
            [{"role": "user", "content": "hello"}],
            [{"role": "user", "content": "I own 3 cats", "has_answer": True}],
        ],
    }
    path = tmp_path / "a.json"
    path.write_text(json.dumps([row]), encoding="utf-8")
    (sample,) = make_samples(f"longmemeval:{path}", 0, 5, 0, characters)
    read = text(sample.turns[0].ids)
    assert "Conversation May 2\nuser: I own 3 cats" in read
    assert "".join(read[p] for p in sample.useful) == "user: I own 3 cats\n"
    assert sample.turns[0].questions[0].references == ("3",)


def test_text_is_cut_into_scored_pieces(tmp_path, characters):
    path = tmp_path / "a.txt"
    path.write_text("abcdefghij" * 5, encoding="utf-8")
    pieces = make_samples(f"perplexity:{path}", 21, 10, 0, characters)
    assert [text(p.turns[0].ids[1:]) for p in pieces] == ["abcdefghij" * 2] * 2
    assert all(p.turns[0].scored and p.turns[0].ids[0] == 0 for p in pieces)
    with pytest.raises(ConfigError, match="has 50 tokens; 52 or more are needed"):
        make_samples(f"perplexity:{path}", 52, 10, 0, characters)


@pytest.mark.parametrize(
    "kind,content,message",
    [
        ("ruler", '{"input": "a", "outputs": ["b"]}\n{"input"', "line 2: not JSON"),
        ("ruler", '{"input": "a"}', "line 1: no outputs; expected input, outputs"),
        ("longbench", "[1]", "line 1: no context, input, answers"),
        ("longbench", '{"context": "a", "input": "b", "answers": []}', "a record has no answer"),
        ("longmemeval", '{"question": 1}', "holds a dict; expected a list"),
        ("longmemeval", '[{"question": "a"}]', "record 1: no answer, haystack_sessions"),
        ("longmemeval", "[", r"cannot read .* as JSON"),
        ("ruler", "\n\n", "has no records"),
        ("ruler", '{"input": ["a"], "outputs": ["b"]}', r"line 1: input is \['a'\], expected a text"),
        ("ruler", '{"input": "a", "outputs": [["b"]]}', "line 1: outputs is .*expected a text"),
        ("ruler", '{"input": "a", "outputs": null}', "line 1: outputs is None"),
        ("ruler", '{"input": "a", "outputs": ["b"], "answer_prefix": 0.5e999}', "line 1: not JSON"),
        ("ruler", '{"input": "a", "outputs": ["b"], "answer_prefix": []}', "line 1: answer_prefix is"),
        ("ruler", '{"input": "a", "outputs": [""]}', "no answer, or an empty one"),
        ("ruler", '\n{"input": "\\ud800", "outputs": ["b"]}', "line 2: not JSON .*half a character"),
        ("ruler", '{"input": "a", "input": "b", "outputs": ["b"]}', "line 1: not JSON .*more than once"),
        ("ruler", "[" * 100_000, "line 1: not JSON .*deep"),
        ("longbench", '{"context": {}, "input": "b", "answers": ["a"]}', "line 1: context is"),
        (
            "longbench",
            '{"context": "a", "input": "b", "answers": ["a"], "all_classes": "x"}',
            "list of texts",
        ),
        (
            "longbench",
            '{"context": "a", "input": "b", "answers": ["a"], "all_classes": [1, true]}',
            "is True",
        ),
        ("longmemeval", '[{"question": "a", "answer": "b", "haystack_sessions": 3}]', "record 1: .*is 3"),
        ("longmemeval", '[{"question": "a", "answer": "b", "haystack_sessions": [[3]]}]', "record 1: hay"),
        ("longmemeval", '[{"question": "a", "answer": "b", "haystack_sessions": [[{}]]}]', "role is None"),
        (
            "longmemeval",
            '[{"question": "a", "answer": "b", "haystack_sessions": [], "haystack_dates": ["x"]}]',
            "record 1: has 1 dates for 0 sessions",
        ),
    ],
)
def test_broken_files_are_named(tmp_path, characters, kind, content, message):
    path = tmp_path / "a.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        make_samples(f"{kind}:{path}", 64, 5, 0, characters)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="gone is not a file"):
        make_samples(f"ruler:{tmp_path / 'gone'}", 0, 1, 0)
