"""Standard tasks: the harness's three kinds of requests on both backends, a whole task from local files."""

import json

import click
import numpy as np
import pytest

from mlx_kvret.demo.language import story
from mlx_kvret.errors import ConfigError

torch = pytest.importorskip("torch")
lm_eval = pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402

from mlx_kvret.evaluation.harness import BoundedLM  # noqa: E402


@pytest.fixture(scope="module", params=["mlx", "torch"])
def backend(request):
    return request.param


def requests(kind, *arguments):
    return [Instance(kind, {}, a, i) for i, a in enumerate(arguments)]


def stock_likelihoods(stock, ids):
    with torch.no_grad():
        said = stock(torch.tensor([ids])).logits[0].log_softmax(-1)
    return [float(said[i, token]) for i, token in enumerate(ids[1:])]


TEXT = story(192, 12, seed=np.random.default_rng(4)).text


def test_full_cache_says_what_the_stock_model_says(backend, stock):
    lm = BoundedLM("demo", method="full", backend=backend, chunk=37)
    words = TEXT.split()
    pairs = [(" ".join(words[:150]), " " + " ".join(words[150:160])), (" ".join(words[:3]), " silver")]
    found = lm.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    for (context, continuation), (value, greedy) in zip(pairs, found, strict=True):
        ids = lm.tok_encode(context + continuation)
        count = len(continuation.split())
        assert value == pytest.approx(sum(stock_likelihoods(stock, ids)[-count:]), abs=1e-3)
        assert greedy is False
    ((whole,),) = [lm.loglikelihood_rolling(requests("loglikelihood_rolling", (TEXT,)), disable_tqdm=True)]
    assert whole == pytest.approx(sum(stock_likelihoods(stock, lm.tok_encode(TEXT))), abs=1e-2)


def test_answers_within_a_budget(backend):
    told = story(512, 12, seed=np.random.default_rng(5))
    asked = requests(
        "generate_until",
        *((f"{told.text} recall {name}", {"until": ["\n"], "max_gen_toks": 3}) for name in told.facts),
    )
    answers = BoundedLM("demo", budget=32, backend=backend, chunk=32).generate_until(asked, True)
    right = sum(answer.strip() == value for answer, value in zip(answers, told.facts.values(), strict=True))
    blind = BoundedLM("demo", budget=32, method="recent", backend=backend, chunk=32)
    wrong = blind.generate_until(asked, disable_tqdm=True)
    assert right >= 11
    assert sum(a.strip() == v for a, v in zip(wrong, told.facts.values(), strict=True)) <= 6


def test_a_task_from_local_files(tmp_path, backend):
    told = [story(256, 8, seed=np.random.default_rng(seed)) for seed in range(3)]
    rows = [
        {"text": s.text, "name": name, "value": value}
        for s in told
        for name, value in list(s.facts.items())[:2]
    ]
    data = tmp_path / "facts.json"
    data.write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "facts",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path)},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{text}} recall {{name}}",
        "doc_to_target": "{{value}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 3},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    lm = BoundedLM("demo", budget=32, backend=backend, chunk=32)
    for chat in (False, True):
        found = lm_eval.simple_evaluate(
            lm, tasks=[task], num_fewshot=0, bootstrap_iters=0, apply_chat_template=chat
        )
        assert found["results"]["facts"]["exact_match,none"] >= 5 / 6


def test_refused(backend):
    with pytest.raises(ConfigError, match="attention or answers"):
        BoundedLM("demo", method="snapkv", backend=backend)
    lm = BoundedLM("demo", backend=backend)
    with pytest.raises(ConfigError, match="sampling"):
        lm.generate_until(requests("generate_until", ("recall Ada", {"do_sample": True})), disable_tqdm=True)


def task_file(folder):
    """A task of the harness's in a file, with data beside it."""
    told = story(256, 8, seed=np.random.default_rng(2))
    rows = [{"text": told.text, "name": name, "value": value} for name, value in list(told.facts.items())[:3]]
    (folder / "facts.json").write_text("\n".join(map(json.dumps, rows)))
    (folder / "facts.yaml").write_text(f"""\
task: facts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/facts.json}}, cache_dir: {folder}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{text}}}} recall {{{{name}}}}"
doc_to_target: "{{{{value}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 3}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
""")


def test_the_harness_knows_us_by_name(tmp_path, backend, monkeypatch, capsys):
    from mlx_kvret.cli import main

    task_file(tmp_path)
    model = f"pretrained=demo,budget=32,chunk=32,backend={backend}"
    given = [
        "lm-eval", "--model", "kvret", "--model_args", model,
        "--tasks", "facts", "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out"),
    ]  # fmt: skip
    main(given, standalone_mode=False)
    (found,) = (tmp_path / "out").rglob("results*.json")
    assert json.loads(found.read_text())["results"]["facts"]["exact_match,none"] == 1
    assert "|facts|" in capsys.readouterr().out


def test_options_of_the_harness_without_effect_are_refused():
    with pytest.raises(ConfigError, match="one by one"):
        BoundedLM("demo", batch_size="auto")
    with pytest.raises(ConfigError, match="no effect on MLX"):
        BoundedLM("demo", backend="mlx", device="cpu")
    with pytest.raises(ConfigError, match="budget"):
        BoundedLM("demo", budget="lots")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "kvret", "--model_args", "pretrained=demo", "--tasks", "no-such-task"], "no-such-task"),
        (["--model", "kvret", "--model_args", "budget=32", "--tasks", "facts"], "pretrained"),
        (["--model", "kvret", "--model_args", "pretrained=demo,budget=0", "--tasks", "facts"], "budget is 0"),
    ],
)
def test_what_the_harness_refuses_is_told_in_its_name(tmp_path, arguments, said):
    from mlx_kvret.cli import main

    task_file(tmp_path)
    with pytest.raises(click.ClickException, match=said):
        main(["lm-eval", *arguments, "--include_path", str(tmp_path)], standalone_mode=False)
