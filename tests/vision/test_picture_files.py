"""Files of benchmarks with pictures, as they come from their makers, read with the processor of the demo."""

import base64
import io
import json

import numpy as np
import pytest

from mlx_kvret import demo
from mlx_kvret.demo.language import WORDS
from mlx_kvret.demo.pictures import IMAGE
from mlx_kvret.errors import ConfigError
from mlx_kvret.evaluation.tasks import check_task, has_length, make_samples, metric

PIL = pytest.importorskip("PIL.Image")
pytest.importorskip("torch")


@pytest.fixture(scope="module")
def processor():
    from mlx_kvret.cuda_backend.loading import read_tokenizer

    return read_tokenizer(demo.VISION_MODEL)


def shade(grey, rows=2, columns=3):
    return PIL.fromarray(np.full((16 * rows, 16 * columns, 3), grey, np.uint8))


def png(grey, rows=2, columns=3):
    file = io.BytesIO()
    shade(grey, rows, columns).save(file, format="png")
    return file.getvalue()


def said(ids):
    """Words of ids, runs of image tokens as their number."""
    out = []
    for i in ids:
        if i == IMAGE:
            out[-1:] = [out[-1] + 1] if out and isinstance(out[-1], int) else [*out[-1:], 1]
        else:
            out.append(WORDS[i] if i < len(WORDS) else "|")
    return out


def test_mmstar_as_tsv_parquet_and_lines(tmp_path, processor):
    row = {
        "question": "recall Ada",
        "A": "red",
        "B": "blue",
        "answer": "B",
        "category": "x",
        "l2_category": "y",
    }
    coded = base64.b64encode(png(10)).decode()
    tsv = tmp_path / "MMStar.tsv"
    names = ["index", "image", *row]
    tsv.write_text("\t".join(names) + "\n" + "\t".join(["0", coded, *row.values()]) + "\n", encoding="utf-8")
    (tmp_path / "a.png").write_bytes(png(10))
    lines = tmp_path / "rows.jsonl"
    lines.write_text(json.dumps(row | {"image": "a.png"}) + "\n", encoding="utf-8")
    files = [tsv, lines]
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.Table.from_pylist([row | {"image": {"bytes": png(10), "path": "1.png"}}])
    parquet.write_table(table, tmp_path / "mmstar.parquet")
    files.append(tmp_path / "mmstar.parquet")
    first, *others = [make_samples(f"mmstar:{file}", 0, 5, 0, processor) for file in files]
    assert all(other == first for other in others)
    ((sample,),) = [first]
    (turn,) = sample.turns
    assert said(turn.ids) == ["<s>", "|", 6, "|"]
    assert (turn.pictures[0].pixels == 10).all() and turn.pictures[0].pixels.shape == (32, 48, 3)
    (question,) = turn.questions
    assert said(question.ids)[:2] == ["recall", "Ada"]
    assert question.references == ("B",) and question.choices == ("red", "blue")
    assert question.metric == "letter"
    assert not has_length(f"mmstar:{tsv}") and metric(f"mmstar:{tsv}") == "accuracy"


def test_mathvista_by_id(tmp_path, processor):
    (tmp_path / "images").mkdir()
    shade(5).save(tmp_path / "images" / "1.jpg")
    base = {"image": "images/1.jpg", "unit": None, "question": "recall Ada", "query": "recall Ada"}
    rows = {
        "1": base
        | {"choices": ["red", "blue"], "answer": "blue", "question_type": "multi_choice"}
        | {"answer_type": "text", "precision": None},
        "2": base
        | {"choices": None, "answer": "1.20", "question_type": "free_form"}
        | {"answer_type": "float", "precision": 1.0},
        "3": base
        | {"choices": None, "answer": "[1, 2]", "question_type": "free_form"}
        | {"answer_type": "list", "precision": None},
    }
    path = tmp_path / "annot_testmini.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    choice, number, other = [
        sample.turns[0].questions[0] for sample in make_samples(f"mathvista:{path}", 0, 9, 0, processor)
    ]
    assert (choice.metric, choice.references, choice.choices) == ("letter", ("B",), ("red", "blue"))
    assert (number.metric, number.references, number.digits) == ("number", ("1.20",), 1)
    assert (other.metric, other.references) == ("any", ("[1, 2]",))
    del rows["2"], rows["3"]
    rows["1"]["answer"] = ""
    path.write_text(json.dumps(rows), encoding="utf-8")
    with pytest.raises(ConfigError, match="testmini"):
        make_samples(f"mathvista:{path}", 0, 9, 0, processor)


def dialogue(tmp_path, questions, answers, pictures=2):
    for i in range(pictures):
        (tmp_path / f"{i}.png").write_bytes(png(20 * i, 2 + i, 2))
    told = [
        {"from": who, "value": text}
        for pair in zip(questions, answers, strict=True)
        for who, text in zip(("user", "assistant"), pair, strict=True)
    ]
    record = {"id": "7", "image": [f"{i}.png" for i in range(pictures)], "conversations": told}
    path = tmp_path / "benchmark.json"
    path.write_text(json.dumps({"7": record}), encoding="utf-8")
    return f"mmdu:{path}"


def test_mmdu_is_one_cache_of_many_turns(tmp_path, processor):
    task = dialogue(
        tmp_path,
        ["<ImageHere> recall Ada", "recall Carl <ImageHere> while", "and recall Ada"],
        ["red", "blue", "red"],
    )
    (sample,) = make_samples(task, 0, 3, 0, processor)
    assert [turn.scored for turn in sample.turns] == [False, True] * 3
    assert [said(turn.ids) for turn in sample.turns] == [
        ["<s>", "|", 4, "|", "recall", "Ada"],
        ["red"],
        [".", "recall", "Carl", "|", 6, "|", "while"],
        ["blue"],
        [".", "and", "recall", "Ada"],
        ["red"],
    ]
    assert [len(turn.pictures) for turn in sample.turns] == [1, 0, 1, 0, 0, 0]
    assert metric(task) == "nll"


def test_broken_dialogues_are_named(tmp_path, processor):
    with pytest.raises(ConfigError, match="more <ImageHere> than pictures"):
        make_samples(dialogue(tmp_path, ["<ImageHere> <ImageHere> <ImageHere>"], ["red"]), 0, 1, 0, processor)
    with pytest.raises(ConfigError, match="remove that mark"):
        make_samples(dialogue(tmp_path, ["recall <|image_pad|>"], ["red"]), 0, 1, 0, processor)
    path = tmp_path / "bad.json"
    path.write_text(json.dumps([{"image": [], "conversations": [{"from": "user"}]}]), encoding="utf-8")
    with pytest.raises(ConfigError, match="questions and answers in turn"):
        make_samples(f"mmdu:{path}", 0, 1, 0, processor)


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("a.csv", "x", "expected a file of kind"),
        ("a.jsonl", '{"question": "a"}', "no image, answer"),
        ("a.jsonl", '{"question": "a", "image": "none.png", "answer": "B"}', "cannot read"),
        ("a.jsonl", '{"question": "a", "image": 3, "answer": "B"}', "image is 3"),
        ("a.jsonl", '{"question": "a", "image": "a.jsonl", "answer": "BB"}', "expected a letter"),
        ("a.jsonl", '{"question": "a", "image": "a.jsonl", "answer": "B"}', "no picture"),
        ("a.json", "3", "list of records"),
        ("a.json", "{", "as JSON"),
        ("a.parquet", "x", "as parquet"),
        ("a.tsv", "question\timage\nx", "no image, answer"),
    ],
)
def test_broken_files_are_named(tmp_path, processor, name, content, said):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=said):
        make_samples(f"mmstar:{tmp_path / name}", 0, 1, 0, processor)


def test_a_tokenizer_alone_makes_no_tokens_of_pictures(tmp_path, processor):
    (tmp_path / "a.jsonl").write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match="without a processor"):
        make_samples(f"mmstar:{tmp_path / 'a.jsonl'}", 0, 1, 0, processor.tokenizer)
    with pytest.raises(ConfigError, match="not a file"):
        check_task("mmdu:nowhere.json")
