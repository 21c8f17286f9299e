"""Who waits, reads and decodes: every row as if it were alone, whatever happens to the others."""

import random

import pytest

from mlx_kvret.serving.backend import backend_for
from mlx_kvret.serving.batched import Batched
from mlx_kvret.serving.drawing import Drawing
from mlx_kvret.serving.engine import OneByOne
from mlx_kvret.serving.failures import Refusal

from .running import OPTIONS, Asking, answer

LENGTHS = (1, 2, 31, 32, 33, 64, 65, 150)


@pytest.fixture(scope="module")
def backend(loaded):
    return backend_for(*loaded, OPTIONS)


@pytest.fixture(params=["one by one", "batched"])
def engine(request, backend):
    if request.param == "one by one":
        return OneByOne(backend)
    if not backend.batches:
        pytest.skip("no batches here")
    return Batched(backend, 8)


@pytest.fixture
def asking(backend, engine):
    return Asking(backend, engine)


def ids(length, seed=0):
    drawn = random.Random(seed)
    return [drawn.randrange(3, 190) for _ in range(length)]


def same(found, expected):
    """The same tokens, with probabilities that may be rounded otherwise in a batch."""
    assert [token for token, _ in found] == [token for token, _ in expected]
    assert [p for _, p in found] == pytest.approx([p for _, p in expected], abs=1e-5)


def alone(backend, given, **options):
    return Asking(backend, OneByOne(backend), limit=0).answer(given, **options)


def test_rows_are_as_alone(backend, asking):
    prompts = [ids(length, seed) for seed, length in enumerate(LENGTHS)]
    jobs = [asking.job(prompt, max_tokens=5 + 3 * i) for i, prompt in enumerate(prompts)]
    asking.run()
    for i, (job, prompt) in enumerate(zip(jobs, prompts, strict=True)):
        same(answer(job), alone(backend, prompt, max_tokens=5 + 3 * i))
        assert len(answer(job)) == 5 + 3 * i and job.told[-1].reason == "length"


def test_late_joins_early_leaves_and_seeds(backend, asking):
    drawn, jobs = random.Random(1), []
    for i in range(20):
        drawing = Drawing(1.0, 0.9, seed=i) if i % 2 else Drawing()
        jobs.append((asking.job(ids(1 + 9 * i, i), drawing=drawing, max_tokens=15), i, drawing))
        for _ in range(drawn.randrange(4)):
            asking.scheduler.turn()
        if i % 5 == 4:
            jobs[drawn.randrange(len(jobs))][0].cancelled = True
    asking.run()
    good = [(job, i, drawing) for job, i, drawing in jobs if not job.cancelled]
    assert len(good) >= 16
    for job, i, drawing in good:
        same(answer(job), alone(backend, ids(1 + 9 * i, i), drawing=drawing, max_tokens=15))


def test_no_more_run_than_fit_and_the_first_come_first(backend, engine):
    asking = Asking(backend, engine, rows=2)
    jobs = [asking.job(ids(40, i), max_tokens=4) for i in range(5)]
    ended = []
    while not asking.scheduler.idle:
        asking.scheduler.turn()
        assert asking.scheduler.running <= 2
        ended += [job for job in jobs if job.over and job not in ended]
    assert ended == jobs


def test_one_chunk_is_read_at_a_time(backend, asking, monkeypatch):
    read = []
    stock = backend.read
    monkeypatch.setattr(backend, "read", lambda cache, given: (read.append(len(given)), stock(cache, given)))
    for seed in range(3):
        asking.job(ids(100, seed))
    asking.scheduler.turn()
    assert read == [32]
    asking.run()
    # by turns, and at the same places
    assert read == [32] * 9 + [3] * 3


@pytest.mark.parametrize("stage", ["waiting", "reading", "decoding"])
@pytest.mark.parametrize("why", ["left", "late"])
def test_who_is_over_makes_room_within_a_step(backend, engine, stage, why):
    asking = Asking(backend, engine, rows=1 if stage == "waiting" else 8)
    other = asking.job(ids(5), max_tokens=30)
    job = asking.job(ids(500 if stage == "reading" else 5, 1), max_tokens=30)
    for _ in range(4):
        asking.scheduler.turn()
    line = {"waiting": asking.scheduler.waiting, "reading": asking.scheduler.reading}
    assert job in line.get(stage, asking.scheduler.decoding.values())
    if why == "left":
        job.cancelled = True
    else:
        job.until = 0
    asking.scheduler.turn()
    assert job not in [*line["waiting"], *line["reading"], *asking.scheduler.decoding.values()]
    assert job.told[-1].status == (499 if why == "left" else 504)
    asking.run()
    same(answer(other), alone(backend, ids(5), max_tokens=30))


class Broken(RuntimeError):
    pass


def test_a_chunk_that_fails_fails_its_request_alone(backend, asking, monkeypatch):
    stock = backend.read

    def read(cache, given):
        if given[0] == 7:
            raise Broken
        stock(cache, given)

    monkeypatch.setattr(backend, "read", read)
    other, job = asking.job(ids(50), max_tokens=9), asking.job([7] * 20)
    asking.run()
    assert [type(news) for news in job.told] == [Refusal] and job.told[0].status == 500
    same(answer(other), alone(backend, ids(50), max_tokens=9))
    assert asking.metrics.failed_steps == 1


def test_a_step_that_fails_fails_its_rows_and_the_next_ones_go_on(backend, asking, monkeypatch):
    jobs = [asking.job(ids(5, seed), max_tokens=30) for seed in range(3)]
    for _ in range(5):
        asking.scheduler.turn()
    late = asking.job(ids(90, 9), max_tokens=9)
    asking.scheduler.turn()
    with monkeypatch.context() as patch:
        patch.setattr(asking.scheduler.engine, "step", lambda: 1 / 0)
        asking.scheduler.turn()
    assert [job.told[-1].status for job in jobs] == [500] * 3
    # it was read meanwhile
    asking.run()
    same(answer(late), alone(backend, ids(90, 9), max_tokens=9))
    same(asking.answer(ids(5, 0), max_tokens=30), alone(backend, ids(5, 0), max_tokens=30))


def test_a_snapshot_that_cannot_be_kept_costs_no_answer(backend, asking, monkeypatch):
    monkeypatch.setattr(asking.scheduler.prefixes, "put", lambda *given: 1 / 0)
    job = asking.job(ids(20), marks=())
    asking.run()
    same(answer(job), alone(backend, ids(20), marks=()))


def test_a_hit_equals_a_fresh_read_where_the_snapshot_stood_at_a_chunk_s_end(backend):
    asking = Asking(backend, OneByOne(backend))
    start = ids(96)
    asking.answer(start + ids(20, 1), marks={64})
    for length in (1, 3, 40, 100):
        asked = start[:64] + ids(length, length)
        job = asking.job(asked, marks={64})
        asking.run()
        assert job.cached == 64
        assert answer(job) == alone(backend, asked, marks=())


def test_an_exact_hit_and_a_text_that_goes_on(backend, asking):
    given = ids(70)
    first = asking.answer(given)
    again = asking.job(given)
    asking.run()
    assert again.cached == 69
    same(answer(again), first)
    # what continues an answer word for word goes on from its end, also if it adds but one token
    said = [token for token, _ in first]
    longer = asking.job(given + said + [5])
    asking.run()
    assert longer.cached == len(given) + len(said)


def test_snapshots_of_other_owners_are_not_found(backend, asking):
    given = ids(40)
    asking.answer(given, owner=("a", "b"))
    for owner, cached in ((("a", "b"), 39), (("ab", ""), 0), (("a",), 0), (("a", "c"), 0)):
        job = asking.job(given, owner=owner)
        asking.run()
        assert job.cached == cached


def test_a_budget_of_one_s_own_holds(backend, asking):
    job = asking.job(ids(300), budget=8)
    asking.run()
    shape, usage = backend.shape, job.told[-1].usage
    assert usage.kv_entries <= 16 * shape.heads
    assert usage.kv_bytes <= shape.nbytes(8, OPTIONS["buffer"])
