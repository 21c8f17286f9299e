"""A text read once and asked about, on both backends: every answer is what it would be alone."""

import pytest

import mlx_kvret
from mlx_kvret import demo
from mlx_kvret.errors import CheckpointError, ConfigError

FILLER = "the weary miller walks past a quiet river and "
TEXT = "remember Ada amber and " + FILLER * 4 + "remember Frank copper and " + FILLER * 20
ASKED = ["recall Ada", "recall Frank", "the weary", "recall Ada"]


@pytest.fixture(scope="module", params=["mlx", "torch"])
def loaded(request):
    pytest.importorskip({"mlx": "mlx.core", "torch": "torch"}[request.param])
    return mlx_kvret.load("demo", backend=request.param)


def held(cache):
    """What a cache holds, to be compared."""
    kept = [position.tolist() for layer in cache.kept_positions() for position in layer]
    return cache.seen, cache.entries, kept


@pytest.mark.parametrize(
    "options",
    [{}, {"raw": True}, {"policy": "recent", "budget": 8}, {"policy": "full"}, {"threshold": 1e-6}],
    ids=str,
)
def test_every_answer_is_what_it_would_be_alone(loaded, options):
    options = {"budget": 32} | options
    cache = mlx_kvret.read(*loaded, TEXT, **options)
    before = held(cache)
    answers = mlx_kvret.answer(*loaded, cache, ASKED, max_tokens=6)
    assert held(cache) == before
    alone = []
    for question in ASKED:
        own = mlx_kvret.read(*loaded, TEXT, **options)
        alone += mlx_kvret.answer(*loaded, own, question, max_tokens=6)
    assert answers == alone and len(set(answers)) > 1
    if options.get("policy", "learned") == "learned":
        assert answers[:2] == ["amber", "copper"]


def test_draws_are_those_of_a_question_alone(loaded):
    cache = mlx_kvret.read(*loaded, TEXT, budget=32)
    draw = {"temp": 9.0, "seed": 3, "max_tokens": 8}
    first, *_, last = mlx_kvret.answer(*loaded, cache, ["the", "recall Frank", "the"], **draw)
    assert first == last == mlx_kvret.answer(*loaded, cache, "the", **draw)[0]


def test_a_reading_and_a_question_are_what_generate_reads_at_once(loaded):
    model, tokenizer = loaded
    cache = mlx_kvret.read(model, tokenizer, TEXT, budget=4096)
    messages = [{"role": "user", "content": TEXT + "\n\nrecall Frank"}]
    whole = list(mlx_kvret.stream_generate(model, tokenizer, messages, budget=4096, max_tokens=6))
    assert mlx_kvret.answer(model, tokenizer, cache, "recall Frank", max_tokens=6) == [
        "".join(response.text for response in whole)
    ]
    assert (
        cache.seen + len(tokenizer.encode("recall Frank", add_special_tokens=False))
        == whole[-1].prompt_tokens
    )


def test_files_chunks_and_progress(loaded, tmp_path):
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    one.write_text("remember Ada amber", "utf-8")
    two.write_bytes(b"remember Frank\r\ncopper")
    told = []
    cache = mlx_kvret.read(
        *loaded, [one, two, FILLER], budget=64, prefill_step_size=7,
        prompt_progress_callback=lambda *now: told.append(now),
    )  # fmt: skip
    whole = mlx_kvret.read(*loaded, f"remember Ada amber\n\nremember Frank\ncopper\n\n{FILLER}", budget=64)
    assert held(cache) == held(whole)
    total = cache.seen
    assert told == [*((n, total) for n in range(0, total, 7)), (total, total)]
    (tmp_path / "bad").write_bytes(b"caf\xe9")
    for path, reason in (
        (tmp_path / "none", "No such file"),
        (tmp_path / "bad", "not UTF-8"),
        (tmp_path, "director"),
    ):
        with pytest.raises(ConfigError, match=reason):
            mlx_kvret.read(*loaded, path, budget=64)


def test_saved_and_opened_it_answers_the_same(loaded, tmp_path):
    model, tokenizer = loaded
    for options in ({}, {"raw": True}):
        cache = mlx_kvret.read(model, tokenizer, TEXT, budget=32, **options)
        mlx_kvret.save_cache(model, cache, tmp_path / "notes.kv")
        again, notes = mlx_kvret.load_cache(model, tmp_path / "notes.kv")
        assert notes and held(again) == held(cache)
        assert mlx_kvret.answer(model, tokenizer, again, ASKED, max_tokens=6) == mlx_kvret.answer(
            model, tokenizer, cache, ASKED, max_tokens=6
        )


def test_a_cache_that_has_gone_on_is_refused(loaded, tmp_path):
    model, tokenizer = loaded
    cache = mlx_kvret.read(model, tokenizer, TEXT, budget=32)
    mlx_kvret.generate(model, tokenizer, "recall Ada", cache=cache, max_tokens=2)
    with pytest.raises(ConfigError, match="not known what this cache has read"):
        mlx_kvret.answer(model, tokenizer, cache, "recall Frank")
    # nor is it saved with what it had read
    mlx_kvret.save_cache(model, cache, tmp_path / "gone.kv")
    assert mlx_kvret.load_cache(model, tmp_path / "gone.kv")[1] == {}


def test_a_damaged_note_is_refused(loaded, tmp_path):
    model, tokenizer = loaded
    cache = mlx_kvret.read(model, tokenizer, TEXT, budget=32)
    mlx_kvret.save_cache(model, cache, tmp_path / "bad.kv", {"messages": "[]", "tokens": "{}"})
    again, _ = mlx_kvret.load_cache(model, tmp_path / "bad.kv")
    with pytest.raises(CheckpointError, match="conversation"):
        mlx_kvret.answer(model, tokenizer, again, "recall Frank")


class Stop(Exception):
    """Made up."""


def test_a_reading_that_is_broken_off_goes_on_where_it_was(loaded):
    from mlx_kvret.reading import Reading

    model, tokenizer = loaded

    def stop(done, total):
        if done:
            raise Stop

    reading = Reading.begun(model, tokenizer, mlx_kvret.make_cache(model, budget=32))
    with pytest.raises(Stop):
        reading.read(TEXT, 64, stop)
    assert reading.cache.seen == len(reading.transcript) == 64
    reading.read(TEXT, 64)
    whole = mlx_kvret.read(model, tokenizer, TEXT, budget=32, prefill_step_size=64)
    assert held(reading.cache) == held(whole)


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"text": ""}, "the text is empty"),
        ({"text": [" ", "\n"]}, "the text is empty"),
        ({"text": 7}, "text is 7"),
        ({"text": [7]}, "text 1 is a int"),
        ({"prefill_step_size": 0}, "prefill_step_size is 0"),
        ({"bugdet": 3}, "did you mean budget"),
        ({"budget": 0}, "budget is 0"),
        ({"raw": True, "system": "Be brief"}, "needs a chat template"),
        ({"text": "half \ud800"}, "UTF-8|no valid"),
    ],
)
def test_what_cannot_be_read(loaded, options, reason):
    with pytest.raises(ConfigError, match=reason):
        mlx_kvret.read(*loaded, **({"text": TEXT} | options))


@pytest.mark.parametrize("questions", ["", " ", ["recall Ada", ""], [7]])
def test_what_cannot_be_asked(loaded, questions):
    cache = mlx_kvret.read(*loaded, TEXT, budget=32)
    with pytest.raises(ConfigError, match="at least one word"):
        mlx_kvret.answer(*loaded, cache, questions)


def test_nothing_asked_is_nothing_answered(loaded):
    assert mlx_kvret.answer(*loaded, mlx_kvret.read(*loaded, TEXT, budget=32), []) == []


def test_a_token_is_taken_back_or_nothing_happens(loaded):
    from mlx_kvret.api import backend_of

    model, tokenizer = loaded
    for policy in ("learned", "full"):
        taken = []
        for size in range(20, 40):
            cache = mlx_kvret.make_cache(model, budget=8, buffer=4, policy=policy)
            ids = tokenizer.encode(FILLER * 8, add_special_tokens=False)[:size]
            backend_of(model).read_tokens(model, cache, ids, 5)
            before = held(cache)
            taken.append(backend_of(model).take_back(cache, 1))
            assert cache.seen == size - taken[-1]
            assert taken[-1] or held(cache) == before
        assert any(taken) and (policy == "learned" or all(taken))


def test_the_story_of_the_demo(loaded):
    model, tokenizer = loaded
    cache = mlx_kvret.read(model, tokenizer, demo.STORY, budget=64)
    asked = ["recall Stella", "recall Frank", "recall Ivan"]
    assert mlx_kvret.answer(model, tokenizer, cache, asked, max_tokens=4) == ["salmon", "silver", "copper"]


def test_side_by_side_or_one_after_another_the_answers_are_the_same(loaded):
    cache = mlx_kvret.read(*loaded, TEXT, budget=32)
    expected = mlx_kvret.answer(*loaded, cache, ASKED, max_tokens=6)
    assert mlx_kvret.answer(*loaded, cache, ASKED, max_tokens=6, rows=1) == expected
    assert mlx_kvret.answer(*loaded, cache, ASKED, max_tokens=6, rows=3) == expected
    told = []
    given = {"max_tokens": 6, "prompt_progress_callback": lambda done, total: told.append(done)}
    assert mlx_kvret.answer(*loaded, cache, ASKED, **given) == expected and told
    with pytest.raises(ConfigError, match="rows"):
        mlx_kvret.answer(*loaded, cache, ASKED, rows=0)
