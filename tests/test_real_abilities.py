"""What is measured of the real model: each measurement on the demo model, and the whole of it, tiny."""

import sys
from pathlib import Path

import numpy as np
import pytest

import mlx_kvret
from mlx_kvret.errors import ConfigError
from mlx_kvret.evaluation import Cell, Question, open_bench, parse_methods
from mlx_kvret.evaluation.runner import FULL
from mlx_kvret.evaluation.writer import Writer
from mlx_kvret.zoo.names import smollm2_folder

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "train_real"))
from abilities import agreement, asking, facts, page, prose
from abilities.cells import Part
from texts import measured_texts

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def bench():
    return open_bench("demo", parse_methods(["full", "learned"]), (), "reference", dtype="float32")


def said_within(budget, policy, turns, most):
    """Greedy answers of a bounded cache, token by token, through the public API on torch."""
    model, tokenizer = mlx_kvret.load("demo", backend="torch", dtype="float32")
    cache = mlx_kvret.make_cache(model, budget, max(1, budget // 8), policy=policy)
    found = []
    for ids in turns:
        stream = mlx_kvret.stream_generate(
            model, tokenizer, list(ids), cache=cache, max_tokens=most, prefill_step_size=max(1, budget // 2)
        )
        found.append((tuple(ids), tuple(int(part.token) for part in stream)))
    return found


@pytest.mark.parametrize("policy", ["learned", "recent"])
def test_answers_are_those_of_decoding(bench, policy):
    """An answer that a bounded cache gave token by token is wholly its own when it is read in pieces."""
    bench.reference.use_gates(next(iter(bench.gates.values())))
    rng = np.random.default_rng(0)
    turns = said_within(16, policy, [rng.integers(20, 190, 40).tolist() for _ in range(3)], most=24)
    assert max(len(said) for _, said in turns) > 2, "nothing would be due within an answer"
    budget = f"16/{sum(len(read) + len(said) for read, said in turns)}"
    method, other = parse_methods([policy, "knorm"])
    found = agreement.agree(bench.reference, turns, method, budget)
    assert found["same answer"] == found["greedy tokens"] == found["before the first difference"] == 1.0
    assert agreement.agree(bench.reference, turns, other, budget)["nats"] > found["nats"]


def test_first_difference(bench):
    turns = [((30, 31, 32, 33), (40, 41, 42, 43))]
    (full,) = parse_methods(["full"])
    found = agreement.agree(bench.reference, turns, full, FULL)
    assert found["same answer"] == 0.0
    assert found["before the first difference"] <= found["greedy tokens"] < 1.0


def test_a_value_begins_as_no_other():
    rng = np.random.default_rng(1)
    for kinds in (facts.IN_PROSE, facts.IN_A_CHAT):
        drawn = facts.draw_facts(kinds, rng)
        assert len({fact.told for fact in drawn}) == len({fact.value for fact in drawn}) == len(kinds)
        for fact in drawn:
            assert len(set(fact.choices)) == facts.CHOICES and fact.choices[0] == fact.value
            assert fact.value in fact.told and fact.value not in fact.asked + fact.begun
            assert not any(a != b and a in b for a in fact.choices for b in fact.choices)


def test_score_of_an_answer():
    one = facts.Asked(Question((1, 2)), (3,), (4, 5), (4, 6))
    logits = np.zeros((5, 8), np.float32)
    logits[2, 6], logits[3, 5] = 9.0, 9.0
    wrong = asking.score(one, logits)
    assert (wrong[asking.CHOSEN], wrong[asking.COMPLETED]) == (0.0, 0.0)
    logits[2, 4] = 10.0
    right = asking.score(one, logits)
    assert (right[asking.CHOSEN], right[asking.COMPLETED]) == (1.0, 1.0)
    wanted = [
        np.log(np.exp(row - row.max()).sum()) + row.max() - row[t]
        for row, t in zip(logits[2:4], (4, 5), strict=True)
    ]
    assert right[asking.NATS] == pytest.approx(np.mean(wanted), rel=1e-5)


def test_alternatives_that_a_tokenizer_does_not_tell_apart(bench):
    fact = facts.Fact("", "", "recall", "xyzzy", ("xyzzy", "plugh"))
    with pytest.raises(ConfigError, match="choose other words"):
        facts.ask(fact, Question((1,)), Writer(bench.tokenizer))


def cell(task, method, budget, scores, gates=""):
    metric = "nll" if "nats" in task else "share"
    return Cell(task, 256, budget, method, gates, "reference", metric, tuple(scores), 1.0, 1.0)


def test_page_tells_losses_first(tmp_path):
    task = "facts in prose: completed"
    cells = [
        cell(task, "full", FULL, [1.0, 1.0, 0.9, 1.0]),
        cell(task, "learned-global:sinks=4", "1/4", [0.5, 0.4, 0.4, 0.5], "smollm2/0"),
        cell(task, "recent:sinks=4", "1/4", [0.4, 0.5, 0.4, 0.6]),
        cell("gates: entries kept", "full", FULL, [1.0, 1.0, 1.0, 1.0]),
        cell("gates: entries kept", "learned-global:sinks=4", "1/4", [0.8, 0.8, 0.9, 0.9], "in 8 bits/0"),
        cell("facts in prose: answered", "full", FULL, [0.5, 0.4, 0.5, 0.4]),
        cell("facts in prose: nats", "full", FULL, [0.2, 0.3, 0.2, 0.3]),
        cell("facts in prose: nats", "learned-global:sinks=4", "1/4", [0.1, 0.2, 0.1, 0.2], "smollm2/0"),
    ]
    page.write_page(cells, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text(encoding="utf-8")
    losses, rest = text.split("## What the full cache cannot do")
    assert "completed, 256 tokens, 1/4: learned, global 0.450, full cache 0.975 (0.525 ± " in losses
    assert "sinks + window" not in losses and "nats, 256" not in losses and "kept" not in losses
    assert "| **learned, global**, in 8 bits | 0.850 ± " in rest
    assert "- facts in prose: answered, 256 tokens: right in 0.45" in rest
    assert "| **learned, global** | 0.150 (-0.100 ± 0.000) |" in rest
    assert "| sinks + window | 0.475 (-0.500 ± " in rest


def test_cells_are_not_made_again(tmp_path, bench):
    asked = []

    def measure(method, budget):
        asked.append((method.name, budget))
        return {"nats": [1.0], "chosen": [0.5]}

    for _ in range(2):
        part = Part(tmp_path / "part.json", {"model": "demo"}, bench.gates)
        methods = parse_methods(["full", "learned", "recent"])
        part.fill("task", 8, ("1/2",), methods, ("nats", "chosen"), bench.reference, measure)
    assert sorted(asked) == [("full", FULL), ("learned", "1/2"), ("recent", "1/2")]
    assert part.mean("task: chosen", 8) == 0.5
    with pytest.raises(ConfigError, match="other settings"):
        Part(tmp_path / "part.json", {"model": "another"}, bench.gates)


@pytest.fixture(scope="module")
def real():
    """The real model's folder and texts, or why they cannot be had."""
    from mlx_kvret.zoo import smollm2, store

    try:
        if not smollm2_folder("bfloat16").is_dir():
            smollm2.get("bfloat16")
        return measured_texts(store.downloads())
    except ConfigError as error:
        pytest.skip(f"the real model or its texts are not in the cache and cannot be fetched: {error}")


def test_facts_stand_where_they_are_said_to(real):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder("bfloat16"))
    for text in prose.texts_with_facts(real, tokenizer, 256, 1):
        ids = text.sample.turns[0].ids
        assert len(ids) == 256
        for one in text.asked:
            told = tokenizer.decode([ids[place] for place in one.question.useful])
            assert one.question.references[0] in told and told.endswith(".")
            assert tokenizer.decode(one.ids).endswith(one.question.references[0])
