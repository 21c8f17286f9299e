"""A context and questions in, answers out, on both backends."""

import pytest

import mlx_kvret
from mlx_kvret.errors import ConfigError

TEXT = (
    "remember Ada amber and "
    + "the weary miller walks past a quiet river and " * 20
    + "remember Frank copper"
)


@pytest.fixture(scope="module", params=["mlx", "torch"])
def pipe(request):
    return mlx_kvret.pipeline("demo", backend=request.param, budget=32, max_tokens=3)


def test_one_question_or_several(pipe, tmp_path):
    assert pipe(TEXT, "recall Ada") == {"answer": "amber"}
    asked = ["recall Ada", "recall Frank"]
    assert pipe(TEXT, questions=asked) == {"answers": ["amber", "copper"]}
    (tmp_path / "text").write_text(TEXT)
    assert pipe(tmp_path / "text", questions=asked[1:]) == {"answers": ["copper"]}
    assert pipe(TEXT, questions=[]) == {"answers": []}


def test_options_of_a_call_win(pipe):
    blind = pipe(TEXT, questions=["recall Ada"], policy="recent", budget=4, buffer=0, sinks=0)
    assert blind["answers"] != ["amber"]
    assert pipe(TEXT, "recall Ada") == {"answer": "amber"}
    again = mlx_kvret.pipeline(pipe.model, pipe.tokenizer, budget=32)
    assert again(TEXT, "recall Frank", max_tokens=2) == {"answer": "copper"}


def test_what_cannot_work_is_refused(pipe):
    for arguments, options, said in (
        ((TEXT,), {}, "one of both"),
        ((TEXT, "recall Ada"), {"questions": ["recall Ada"]}, "one of both"),
        ((TEXT,), {"questions": "recall Ada"}, "questions is one text"),
        ((TEXT, "recall Ada"), {"bugdet": 3}, "did you mean budget"),
        ((TEXT, "recall Ada"), {"press": None}, "policy and budget"),
        (("", "recall Ada"), {}, "the text is empty"),
        ((TEXT, " "), {}, "at least one word"),
    ):
        with pytest.raises(ConfigError, match=said):
            pipe(*arguments, **options)
    with pytest.raises(ConfigError, match="max_tokns"):
        mlx_kvret.pipeline("demo", max_tokns=3)
    with pytest.raises(ConfigError, match="loaded with the model"):
        mlx_kvret.pipeline("demo", pipe.tokenizer)
    with pytest.raises(ConfigError, match="need a tokenizer"):
        mlx_kvret.pipeline(pipe.model)
    with pytest.raises(ConfigError, match="no effect on a loaded model"):
        mlx_kvret.pipeline(pipe.model, pipe.tokenizer, gates=None)
