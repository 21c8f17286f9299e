"""Plain text scored under many policies in one run: figures, what is shared, refused and kept."""

import dataclasses
import json
import math

import numpy as np
import pytest

import mlx_kvret
from mlx_kvret import demo
from mlx_kvret.core.config import EvictionDefaults
from mlx_kvret.errors import ConfigError, ModelMismatchError
from mlx_kvret.evaluation import entries, evaluate_text, gains, parse_methods, text_pieces
from mlx_kvret.evaluation.engine import PublicEngine
from mlx_kvret.evaluation.methods import level, parse_method
from mlx_kvret.evaluation.samples import Sample, Turn
from mlx_kvret.evaluation.tasks import make_samples

torch = pytest.importorskip("torch")
METHODS = ["full", "learned", "learned-layer", "learned-head", "recent", "random", "keydiff", "knorm"]
LOOKING = ["h2o", "snapkv"]


@pytest.fixture(scope="module")
def pieces():
    return [sample.turns[0].ids for sample in make_samples("facts", 200, 3, seed=8)]


@pytest.fixture(scope="module")
def rows(reference, gates, pieces):
    return evaluate_text(reference, pieces, METHODS + LOOKING, [16, "1/4"], {"g/0": gates}, progress=False)


def test_every_method_is_scored_piece_by_piece(rows, reference, stock, pieces):
    assert len(rows) == 1 + 2 * (len(METHODS) - 1 + len(LOOKING))
    assert all(len(row.scores) == 3 and row.metric == "nll" and row.chunk == 37 for row in rows[1:])
    with torch.no_grad():
        logits = stock(torch.tensor(pieces)).logits
    for piece, row, score in zip(pieces, logits, rows[0].scores, strict=True):
        wanted = torch.nn.functional.cross_entropy(row[:-1], torch.tensor(piece[1:]))
        assert score == pytest.approx(float(wanted), abs=1e-4)
    by_name = {(row.method, row.budget): row for row in rows}
    assert by_name["recent", "16"].entries == pytest.approx(16)
    # other methods keep other entries, and that shows
    assert len({row.scores for row in rows}) == len(rows)


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_the_librarys_own_caches_score_the_same(backend, rows, gates, pieces):
    model, tokenizer = mlx_kvret.load("demo", None, backend=backend)
    engine = PublicEngine(model, tokenizer, chunk=37, buffer=5)
    names = ["full", "learned", "learned-head", "recent"]
    ours = evaluate_text(engine, pieces, names, [16], {"g/0": gates}, progress=False)
    theirs = {(row.method, row.budget): row for row in rows}
    for row in ours:
        np.testing.assert_allclose(row.scores, theirs[row.method, row.budget].scores, atol=2e-4)


@pytest.mark.parametrize("name", ["learned", "learned-head", "h2o", "snapkv", "keydiff"])
def test_a_shared_beginning_changes_not_a_bit(name, reference, gates, pieces):
    reference.use_gates(gates)
    samples = [Sample((Turn(piece, scored=True),)) for piece in pieces]
    method = parse_method(name)
    shared = [outcome.score for outcome in reference.run(samples, method, 40)]
    assert reference._prefixes
    alone = [outcome.score for outcome in reference.open(samples, method, 40).run()]
    assert shared == alone


def test_beginnings_are_read_once_and_only_while_they_fit(reference, gates, pieces, monkeypatch):
    samples = [Sample((Turn(piece, scored=True),)) for piece in pieces]
    counted, reference._shared = [], None
    handle = reference.model.register_forward_pre_hook(
        lambda module, args, kwargs: counted.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    try:
        for expected in (3 * 200, 3 * (200 - 74)):  # 40 + 5 are reached with the second chunk of 37
            reference.run(samples, parse_method("recent" if expected == 600 else "h2o"), 40)
            assert sum(counted) == expected
            counted.clear()
        monkeypatch.setattr("mlx_kvret.evaluation.reference.ROOM", -1)
        for _ in range(2):
            reference.run(samples, parse_method("recent"), 30)
            assert sum(counted) == 3 * 200
            counted.clear()
    finally:
        handle.remove()


def test_likelihood_is_of_the_state_after_eviction(reference):
    # with M + B reached at the end of the first chunk, the second sees only what was kept
    ids = make_samples("facts", 200, 1, seed=9)[0].turns[0].ids[:74]
    sample = Sample((Turn(ids, scored=True),))
    reading = reference.open([sample], parse_method("recent:sinks=0,window=0"), 8)
    reading.run()
    full = reference.open([sample], parse_method("full"), 1)
    full.chunk = 37
    full.run()
    ours, theirs = (np.concatenate(r.nats, 1)[0] for r in (reading, full))
    # tokens 1 to 37 are predicted before anything goes: the token after a chunk from that chunk's last state
    assert np.array_equal(ours[:37], theirs[:37])
    assert not np.isclose(ours[37:], theirs[37:], atol=1e-3).all()


@pytest.mark.parametrize("backend", ["mlx", "torch", "reference"])
def test_a_token_is_predicted_from_what_comes_right_before_it(backend, reference, stock):
    # after an unscored turn there are no logits for the first token, after a scored one there are
    ids = make_samples("facts", 192, 1, seed=10)[0].turns[0].ids
    cuts = ((0, 30, True), (30, 60, True), (60, 100, False), (100, 150, True))
    sample = Sample(tuple(Turn(ids[a:b], scored=scored) for a, b, scored in cuts))
    engine = reference
    if backend != "reference":
        engine = PublicEngine(*mlx_kvret.load("demo", None, backend=backend), chunk=37)
    with torch.no_grad():
        logits = stock(torch.tensor([ids])).logits[0, :-1]
    nats = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
    wanted = torch.cat([nats[:59], nats[100:149]]).mean()
    found = engine.run([sample], parse_method("full"), 1)[0].score
    assert found == pytest.approx(float(wanted), abs=1e-4)


def test_torch_reads_texts_side_by_side_as_one_by_one(gates, pieces):
    model, tokenizer = mlx_kvret.load("demo", None, backend="torch")
    for name in ("full", "learned", "recent", "learned:threshold=1e-3"):
        together, alone = (
            evaluate_text(
                PublicEngine(model, tokenizer, batch=size), pieces, [name], [16], {"g": gates}, progress=False
            )[0]
            for size in (2, 1)
        )
        np.testing.assert_allclose(together.scores, alone.scores, atol=1e-5)
        assert together.entries == pytest.approx(alone.entries)


def test_gains_are_paired_over_pieces(rows):
    found = entries(rows)
    told = {(gain.method, gain.budget): gain for gain in gains(found, "full")}
    by_name = {(row.method, row.budget): np.array(row.scores) for row in rows}
    paired = by_name["h2o", "16"] - by_name["full", "all"]
    gain = told["h2o", "16"]
    assert -gain.mean == pytest.approx(paired.mean())
    assert gain.error == pytest.approx(paired.std(ddof=1) / 3**0.5)
    assert gain.shown == f"{paired.mean():+.4f} ± {gain.error:.4f}"
    assert ("full", "all") not in told and len(told) == len(rows) - 1
    against = {(gain.method, gain.budget) for gain in gains(found, "learned (g)")}
    assert ("h2o", "16") in against and ("learned (g)", "16") not in against


def test_a_single_piece_has_no_error(reference, gates, pieces):
    rows = evaluate_text(reference, pieces[:1], ["full", "recent"], [16], {"g": gates}, progress=False)
    (gain,) = gains(entries(rows), "full")
    assert math.isnan(gain.error) and "nan" not in gain.shown and "±" not in gain.shown
    assert "nan" not in entries(rows)[1].text


def test_a_broken_run_goes_on(tmp_path, reference, gates, pieces, monkeypatch):
    path = tmp_path / "text.json"
    arguments = reference, pieces, ["full", "recent", "learned"], [16, 20], {"g/0": gates}
    whole = evaluate_text(*arguments, progress=False)
    run, asked = type(reference).run, []

    def breaks(self, samples, method, budget):
        asked.append(method.name)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return run(self, samples, method, budget)

    monkeypatch.setattr(type(reference), "run", breaks)
    with pytest.raises(KeyboardInterrupt):
        evaluate_text(*arguments, path=path, progress=False)
    assert len(json.loads(path.read_text(encoding="utf-8"))["cells"]) == 2
    rows = evaluate_text(*arguments, path=path, progress=False)
    assert len(asked) == 3 + 3
    assert [row.scores for row in rows] == [row.scores for row in whole]
    with pytest.raises(ConfigError, match="made with other settings: pieces was"):
        evaluate_text(reference, pieces[:2], *arguments[2:], path=path, progress=False)


@pytest.fixture(params=["mlx", "torch", "reference"])
def any_engine(request, reference, monkeypatch):
    """An engine, and a list that tells the methods it ran."""
    if request.param == "reference":
        engine = reference
    else:
        engine = PublicEngine(*mlx_kvret.load("demo", None, backend=request.param), chunk=37, buffer=5)
    run, ran = type(engine).run, []

    def noted(self, samples, method, budget):
        ran.append(method.name)
        return run(self, samples, method, budget)

    monkeypatch.setattr(type(engine), "run", noted)
    return engine, ran


@pytest.mark.parametrize("change", [{"hidden_size": 32}, {"kv_heads": 3}, {"layers": 5}])
def test_gates_of_another_model_are_told_before_the_first_cell(change, any_engine, gates, pieces):
    config = dataclasses.replace(gates.config, base_fingerprint="", **change)
    rng = np.random.default_rng(0)
    shapes = config.tensor_shapes()
    other = mlx_kvret.core.checkpoint.GateCheckpoint(
        config,
        {
            name: mlx_kvret.core.tensors.Tensor.of(rng.normal(size=shape).astype(np.float32))
            for name, shape in shapes.items()
        },
    )
    engine, ran = any_engine
    with pytest.raises(ModelMismatchError):
        evaluate_text(
            engine, pieces, ["full", "recent", "learned"], [16], {"a": gates, "b": other}, progress=False
        )
    assert ran == []


def test_what_cannot_mean_anything_is_refused_before_anything_is_run(any_engine, gates, pieces):
    engine, ran = any_engine

    def call(methods, budgets, own=pieces, given=None):
        evaluate_text(engine, own, methods, budgets, given or {}, progress=False)

    for arguments, message in (
        (
            (["recent"], [195]),
            r"nothing would be evicted .* budget 195: the cache may grow to 200",
        ),
        ((["full", "recent"], ["1/16", "1/1"]), "text, 200 tokens, budget 1/1"),
        ((["learned"], [16]), "without gates"),
        ((["recent"], [16], []), "pieces have no tokens"),
        ((["recent"], [16], [pieces[0], pieces[1][:-1]]), "pieces have 199, 200 tokens"),
        ((["recent"], ["1/0.5"]), "budget '1/0.5' is neither"),
        ((["newest"], [16]), "method 'newest' is not known"),
    ):
        with pytest.raises(ConfigError, match=message):
            call(*arguments)
    assert ran == []
    # the full cache alone never evicts anything
    call(["full"], [1000])
    assert ran == ["full"]


def test_policies_without_gates_get_the_sinks_of_the_learned_one(gates):
    wishes = dataclasses.replace(gates.config, eviction=EvictionDefaults(sinks=6, smallest_budget=12))
    methods = parse_methods(["learned", "recent", "h2o", "snapkv", "oracle", "keydiff:sinks=1", "full"])
    plain = {m.name: m for m in level(methods, [gates.config])}
    fair = {m.name: m for m in level(methods, [gates.config, wishes])}
    sinks = {name: m.eviction(64, 0, wishes).sinks for name, m in fair.items() if not m.full}
    assert sinks == {"learned": 6, "recent": 6, "h2o": 6, "snapkv": 6, "oracle": 6, "keydiff:sinks=1": 1}
    assert plain["recent"].eviction(64, 0).sinks == 4 and plain["h2o"].eviction(64, 0).sinks == 0
    # where the budget has no room for all of them
    assert fair["recent"].eviction(4, 0).sinks == 3 and fair["h2o"].eviction(4, 0).sinks == 2
    said = {m.name: m for m in level(parse_methods(["learned:sinks=8", "recent"]), [wishes])}
    assert said["recent"].eviction(64, 0).sinks == 8


def test_a_learned_method_says_how_it_differs_from_what_was_validated(gates):
    wishes = dataclasses.replace(gates.config, eviction=EvictionDefaults(sinks=4, smallest_budget=12))
    assert parse_method("learned").unlike(wishes, 12) == ""
    assert parse_method("learned:sinks=4,window=2").unlike(wishes, 12) == ""
    assert parse_method("learned:sinks=0").unlike(wishes, 64) == "sinks 0, validated with 4"
    assert parse_method("learned").unlike(wishes, 8) == "budget 8, found sound from 12 up"
    assert parse_method("learned:sinks=0").unlike(gates.config, 1) == ""


def test_pieces_are_consecutive_seeded_and_of_every_file(tmp_path, characters):
    files = []
    for name, count in (("a", 300), ("b", 95)):
        files.append(tmp_path / f"{name}.txt")
        files[-1].write_text("".join(chr(33 + (ord(name) + i) % 90) for i in range(count)), encoding="utf-8")
    found = text_pieces(files, characters, 21, 10, seed=3)
    assert (
        found == text_pieces(files, characters, 21, 10, seed=3) != text_pieces(files, characters, 21, 10, 4)
    )
    assert len(set(found)) == len(found) == 10 and all(len(piece) == 21 for piece in found)
    texts = [file.read_text(encoding="utf-8") for file in files]
    own = [[text[i : i + 20] for i in range(0, len(text) - 19, 20)] for text in texts]
    drawn = [characters.decode(piece[1:]).replace(" ", "") for piece in found]
    # in turn, as long as both have some
    assert all(piece in own[i % 2] for i, piece in enumerate(drawn[:8]))
    assert text_pieces(files, characters, 21, 2, seed=3) == found[:2]
    with pytest.raises(ConfigError, match=r"missing\.txt is not a file"):
        text_pieces([tmp_path / "missing.txt"], characters, 21, 2)


@pytest.mark.parametrize("backend", ["mlx", "torch", "reference"])
def test_models_run_in_bfloat16(backend, pieces, rows):
    from mlx_kvret.evaluation import open_bench

    methods = parse_methods(["full", "learned", *(LOOKING if backend == "reference" else [])])
    bench = open_bench("demo", methods, backend=backend, chunk=37, buffer=5, batch=3, dtype="bfloat16")
    (engine,) = bench.engines
    if backend == "mlx":
        import mlx.core as mx
        from mlx.utils import tree_flatten

        assert {w.dtype for _, w in tree_flatten(engine.model.parameters())} == {mx.bfloat16}
    else:
        assert {w.dtype for w in engine.model.parameters()} == {torch.bfloat16}
    ours = evaluate_text(engine, pieces, methods, [16], bench.gates, progress=False)
    theirs = {row.method: row for row in rows if row.budget in ("all", "16")}
    for row in ours:
        scores = theirs[row.method].scores
        assert row.scores != scores and np.allclose(row.scores, scores, rtol=0.1)
    with pytest.raises(ConfigError, match="dtype is 'int8'"):
        open_bench(demo.MODEL, methods, dtype="int8")
