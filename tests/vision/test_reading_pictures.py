"""The reference engine with pictures: equal to the stock model where nothing goes, alike in any chunks."""

import numpy as np
import pytest

from mlx_kvret import demo
from mlx_kvret.errors import ConfigError, UnsupportedModelError
from mlx_kvret.evaluation import parse_methods
from mlx_kvret.evaluation.samples import Question, Sample, Turn
from mlx_kvret.evaluation.tasks import make_samples

torch = pytest.importorskip("torch")

FULL, LEARNED = parse_methods(["full", "learned"])


@pytest.fixture(scope="module")
def engine():
    from mlx_kvret.cuda_backend.loading import load_model, read_tokenizer
    from mlx_kvret.evaluation.reference import ReferenceEngine

    torch.set_num_threads(1)
    model, processor = load_model(demo.VISION_MODEL), read_tokenizer(demo.VISION_MODEL)
    return ReferenceEngine(model, processor, 24, 0, 8)


@pytest.fixture(scope="module")
def stock():
    from transformers import Qwen3VLForConditionalGeneration

    return Qwen3VLForConditionalGeneration.from_pretrained(demo.VISION_MODEL).eval()


def stock_logits(stock, engine, sample, after):
    """Of the last tokens of a text and what comes after it, in one call of the stock model."""
    turns = sample.turns
    ids = torch.tensor([[i for turn in turns for i in turn.ids] + list(after)])
    pictures = [p.pixels for turn in turns for p in turn.pictures]
    made = engine.processor.image_processor(images=pictures, return_tensors="pt")
    types = (ids == stock.config.image_token_id).int()
    with torch.no_grad():
        return stock(input_ids=ids, mm_token_type_ids=types, **made).logits[0, -len(after) :].numpy()


def off(found, expected):
    """The largest difference, as a part of the largest logit."""
    return np.abs(found - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("chunk", (7, 1000))
def test_equals_the_stock_model(engine, stock, chunk):
    samples = make_samples("albums", 240, 3, 5)
    reading = engine.open(samples, FULL, 1)
    reading.chunk = chunk
    reading.read([sample.turns[0] for sample in samples])
    for row, sample in enumerate(samples):
        asked = [list(q.ids + q.answer[:1]) for q in sample.turns[0].questions[:2]]
        found = reading.follow([asked if r == row else [] for r in range(3)])[row]
        for own, ids in zip(found, asked, strict=True):
            assert off(own, stock_logits(stock, engine, sample, ids)) < 5e-6


def test_pictures_may_come_in_any_turn(engine, stock):
    first, second = (sample.turns[0] for sample in make_samples("albums", 200, 2, 9))
    later = Turn(second.ids[1:], second.questions, pictures=second.pictures)
    sample = Sample((first, Turn((3, 10, 80)), later))
    reading = engine.open([sample], FULL, 1)
    for turn in sample.turns:
        reading.read([turn])
    asked = list(second.questions[0].ids)
    (found,) = reading.follow([[asked]])[0]
    assert off(found, stock_logits(stock, engine, sample, asked)) < 5e-6


def test_rows_do_not_see_each_other(engine):
    from mlx_kvret.core.checkpoint import load_gates

    engine.use_gates(load_gates(demo.GATES))
    samples = make_samples("albums-12-4", 240, 3, 6)
    together = engine.run(samples, LEARNED, 20)
    alone = [engine.run([sample], LEARNED, 20)[0] for sample in samples]
    assert together == alone


def test_a_split_gives_either_modality_its_share(engine):
    from mlx_kvret.core.checkpoint import load_gates

    engine.use_gates(load_gates(demo.GATES))
    samples = make_samples("albums", 400, 2, 8)
    image = engine.model.config.image_token_id
    for share in (0.0, 0.25, 1.0):
        (method,) = parse_methods([f"learned:scope=modality,picture_share={share}"])
        reading = engine.open(samples, method, 16)
        reading.read([sample.turns[0] for sample in samples])
        for row, sample in enumerate(samples):
            kept = [e.position[row][e.valid[row]] for e in reading.layers]
            ids = torch.tensor(sample.turns[0].ids)[torch.cat(kept)]
            assert len(ids) == 16 * 6 and (ids == image).sum() == round(share * 16 * 6)


def test_full_cache_answers_both_seen_and_told(engine):
    samples = make_samples("albums", 256, 6, 3)
    scores = [outcome.score for outcome in engine.run(samples, FULL, 1)]
    assert sum(scores) / len(scores) > 0.95


def test_what_cannot_be_read_is_refused(engine):
    (sample,) = make_samples("albums", 200, 1, 0)
    turn = sample.turns[0]
    with pytest.raises(ConfigError, match="scored"):
        engine.run([Sample((Turn(turn.ids, scored=True, pictures=turn.pictures),))], FULL, 1)
    with pytest.raises(ConfigError, match="these pictures"):
        engine.run([Sample((Turn(turn.ids, turn.questions, pictures=turn.pictures[1:]),))], FULL, 1)
    with pytest.raises(ConfigError, match="without pictures"):
        engine.run([Sample((Turn((*turn.ids[:-1], 199), (Question((5, 6), (90,)),)),))], FULL, 1)


def test_a_model_of_text_takes_no_pictures():
    from mlx_kvret.cuda_backend.loading import load_model, read_tokenizer
    from mlx_kvret.evaluation.reference import ReferenceEngine

    text = ReferenceEngine(load_model(demo.MODEL), read_tokenizer(demo.MODEL), 24, 0, 2)
    with pytest.raises(UnsupportedModelError, match="does not take pictures"):
        text.run(make_samples("albums", 200, 1, 0), FULL, 1)
