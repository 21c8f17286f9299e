"""Means, errors and sentences of a report against figures made by hand."""

import dataclasses
import json
import math
import statistics

import numpy as np
import pytest

from mlx_kvret.errors import ConfigError
from mlx_kvret.evaluation import Cell, Results, entries, losses, markdown, summary
from mlx_kvret.evaluation.plot import _panel, _styles, plot
from mlx_kvret.evaluation.report import standard_error, write_summary


def cell(method, scores, budget="1/4", gates="", metric="accuracy", length=256):
    return Cell("facts", length, budget, method, gates, "fake", metric, tuple(scores), 4.0, 0.1)


def results(*cells):
    return Results({"model": "m"}, {}, {c.key: c for c in cells})


def test_errors_over_samples_and_over_seeds():
    first, second = [1.0, 0.5, 0.75], [0.5, 0.5, 0.0]
    (entry,) = entries([cell("learned", first, gates="g/0"), cell("learned", second, gates="g/1")])
    assert entry.method == "learned (g)" and entry.scores.shape == (2, 3)
    assert entry.mean == pytest.approx(sum(first + second) / 6)
    by_sample = [(a + b) / 2 for a, b in zip(first, second, strict=True)]
    by_seed = [sum(first) / 3, sum(second) / 3]
    assert entry.sample_error == pytest.approx(statistics.stdev(by_sample) / 3**0.5)
    assert entry.seed_error == pytest.approx(statistics.stdev(by_seed) / 2**0.5)
    assert entry.error == pytest.approx(math.hypot(entry.sample_error, entry.seed_error))


def test_gates_of_other_kinds_and_single_ones_stay_apart():
    cells = [cell("learned", [1.0, 0.5], gates=g) for g in ("a/0", "a/1", "b/0", "plain")]
    assert [(e.method, len(e.scores)) for e in entries(cells)] == [
        ("learned (a)", 2),
        ("learned (b)", 1),
        ("learned", 1),
    ]
    assert entries(cells)[2].seed_error == 0.0 and math.isnan(standard_error([1.0]))


def test_differences_are_paired():
    # both vary much between samples, their difference does not
    ours, theirs = entries([cell("learned", [0.1, 0.5, 0.8], gates="g"), cell("recent", [0.2, 0.6, 0.9])])
    gain, error = ours.ahead(theirs)
    assert gain == pytest.approx(-0.1) and error == pytest.approx(0, abs=1e-9)
    (told,) = losses([ours, theirs])
    place = "facts, 256 tokens, budget 1/4: learned 0.467 ± 0.203 is below "
    assert told == place + "recent 0.567 ± 0.203 (-0.100 ± 0.000)"


def test_losses_leave_out_noise_the_oracle_and_other_budgets():
    ours = cell("learned", [0.4, 0.6, 0.5], gates="g")
    others = [
        cell("recent", [0.7, 0.2, 0.7]),
        cell("oracle", [1.0, 1.0, 1.0]),
        cell("knorm", [1.0, 1.0, 1.0], budget="1/2"),
        cell("keydiff", [1.0, 1.0, 1.0], length=512),
    ]
    assert losses(entries([ours, *others])) == []
    (told,) = losses(entries([ours, *others, cell("full", [1.0, 1.0, 1.0], budget="all")]))
    assert "full 1.000" in told


def test_lower_is_better_for_likelihoods():
    cells = [cell("learned", [1.0, 1.1], gates="g", metric="nll"), cell("recent", [2.0, 2.1], metric="nll")]
    ours, theirs = entries(cells)
    assert ours.ahead(theirs)[0] == pytest.approx(1.0) and losses([ours, theirs]) == []
    assert ours.text == f"{math.exp(1.05):.3f} ± {0.05 * math.exp(1.05):.3f}"


def test_page_tells_losses_first_and_every_figure():
    made = results(
        cell("full", [1.0, 1.0], budget="all"),
        cell("learned", [0.5, 0.5], gates="g"),
        cell("learned", [1.0, 1.0], budget="1/16", gates="g"),
        cell("recent", [0.25, 0.75], budget="1/16"),
    )
    page = markdown(made)
    assert page.index("## Where learned eviction loses") < page.index("## facts, 256 tokens: accuracy")
    assert "- facts, 256 tokens, budget 1/4: learned 0.500 ± 0.000 is below full 1.000" in page
    assert "| method | 1/4 | 1/16 |" in page
    assert "| full | 1.000 ± 0.000 | 1.000 ± 0.000 |" in page
    assert "| recent | – | 0.500 ± 0.250 |" in page
    assert "Nowhere in these tables" in markdown(results(cell("learned", [0.5, 0.5], gates="g")))


def test_summary_is_json(tmp_path):
    made = results(cell("learned", [0.5], gates="g"))
    write_summary(made, tmp_path / "s.json")
    data = json.loads((tmp_path / "s.json").read_text(encoding="utf-8"))
    assert data == summary(made)
    assert data["rows"][0]["error"] is None and data["rows"][0]["mean"] == 0.5


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_same_results_give_the_same_plot(tmp_path, suffix):
    pytest.importorskip("matplotlib")
    made = entries(
        [
            cell("full", [1.0, 1.0], budget="all"),
            *(cell("recent", [0.1, 0.5], budget=b, length=n) for b in ("1/4", "1/16") for n in (256, 512)),
        ]
    )
    first, second = tmp_path / f"a.{suffix}", tmp_path / f"b.{suffix}"
    for path in (first, second):
        plot(made, path)
    assert first.read_bytes() == second.read_bytes()
    assert first.read_bytes()[:4] == b"\x89PNG" if suffix == "png" else b"<svg" in first.read_bytes()


def test_a_plot_says_budgets_as_tables_do_and_compares_pair_by_pair():
    figure = pytest.importorskip("matplotlib.figure")
    pieces = {"full": 3.0, "random": 3.5, "learned:threshold=1e-6": 3.2, "learned": 3.1}
    made = entries(
        [
            cell(name, [mean, mean + 2], budget=budget, metric="nll")
            for name, mean in pieces.items()
            for budget in (["all"] if name == "full" else ["1/64", "1/4"])
        ]
    )
    styles = _styles(e.method for e in made if e.method != "full")
    assert list(styles) == ["learned:threshold=1e-6", "learned", "random"]
    assert (
        styles["learned"]["color"] == styles["learned:threshold=1e-6"]["color"] != styles["random"]["color"]
    )
    assert styles["learned"]["ls"] != styles["learned:threshold=1e-6"]["ls"]
    axis = figure.Figure().subplots()
    _panel(axis, made, styles, {"random": "by chance"})
    assert [label.get_text() for label in axis.get_xticklabels()] == ["1/64", "1/4"]
    assert "above the full cache" in axis.get_ylabel()
    line, *_ = axis.containers[0]
    np.testing.assert_allclose(np.array(line.get_ydata(), float), [0.2, 0.2])
    assert axis.get_legend_handles_labels()[1][-1] == "by chance"


def test_other_pictures_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"ends with '.gif'; expected .png or .svg"):
        plot([], tmp_path / "a.gif")


def test_every_task_is_compared_pair_by_pair():
    made = results(
        cell("full", [1.0, 0.5, 1.0], budget="all"),
        cell("learned", [1.0, 0.0, 0.5], gates="g/0"),
        cell("learned", [1.0, 0.5, 0.5], gates="g/1"),
        cell("recent", [0.5, 0.0, 0.0]),
    )
    page = markdown(made)
    against_full = page.split("Score above that of full, paired over samples:")[1]
    against_learned = page.split("Score above that of learned (g), paired over samples:")[1]
    assert "| recent | -0.667 ± 0.167 |" in against_full
    # over samples of the mean over gates, and over gates of the mean over samples
    both = math.hypot(statistics.stdev([-0.5, -0.25, -0.5]) / 3**0.5, statistics.stdev([0.5, 2 / 3]) / 2**0.5)
    assert f"| recent | -0.417 ± {both:.3f} |" in against_learned and "| learned (g) |" not in against_learned
    paired = {(row["method"], row["other"]): row for row in summary(made)["paired"]}
    assert paired["recent", "learned (g)"]["mean"] == pytest.approx(-5 / 12)
    assert paired["recent", "learned (g)"]["error"] == pytest.approx(both)


def test_nats_above_are_fewer_where_better():
    made = results(
        cell("full", [2.0, 3.0], budget="all", metric="nll"), cell("recent", [2.1, 3.3], metric="nll")
    )
    assert "Nats per token above that of full" in markdown(
        made
    ) and "| recent | +0.2000 ± 0.1000 |" in markdown(made)


def test_what_would_mislead_is_said():
    made = results(
        dataclasses.replace(
            cell("learned", [1.0, 0.5], gates="g"), note="sinks 0, validated with 4", chunk=32
        ),
        dataclasses.replace(cell("recent", [1.0, 0.5]), untouched=1, chunk=32),
    )
    made.settings["sinks"] = 4
    page = markdown(made)
    assert "| learned | 0.750 ± 0.250 † |" in page and "| recent | 0.750 ± 0.250 |" in page
    assert "not used as its gates were validated (sinks 0, validated with 4)" in page
    assert "recent: in 1 of 2 samples nothing was evicted" in page
    assert "in chunks of 32 tokens" in page and "at least 4 sinks" in page
    plain = markdown(results(cell("recent", [1.0, 0.5])))
    assert not any(word in plain for word in ("†", "nothing was evicted", "chunks", "sinks"))


def test_single_samples_have_no_errors():
    made = results(
        cell("full", [1.0], budget="all"), cell("learned", [0.5], gates="g"), cell("recent", [0.0])
    )
    assert "nan" not in markdown(made) and "±" not in markdown(made).split("## facts")[1]
    assert "learned 0.500 is below full 1.000 (-0.500)" in markdown(made)
