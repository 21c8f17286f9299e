"""The command plan, and its arithmetic against what caches really take, on both backends."""

import json
import shutil

import pytest
from click.testing import CliRunner

import mlx_kvret
from mlx_kvret import demo
from mlx_kvret.api import _backend, any_backend
from mlx_kvret.cli import main
from mlx_kvret.core.plan import plan


def run(*arguments):
    return CliRunner().invoke(main, ["plan", *[str(a) for a in arguments]])


@pytest.fixture(scope="module", params=["mlx", "torch"])
def backend(request):
    library = {"mlx": "mlx.core", "torch": "torch"}[request.param]
    pytest.importorskip(library, reason="the backend is not installed")
    return request.param


def test_what_is_planned_is_what_caches_take(backend):
    model, tokenizer = mlx_kvret.load("demo", backend=backend)
    _, shape = _backend(backend).cache_shape(demo.MODEL)
    found = plan(shape, 10**9, 0, 2048, 3, smallest=64)
    for row in (found.full, *found.bounded[:2]):
        options = {"policy": "full"} if row.budget is None else {"budget": row.budget}
        cache = mlx_kvret.read(model, tokenizer, demo.STORY.read_text()[:13_000], **options)
        assert cache.seen >= (row.budget or 0) * 9 // 8 + 1
        real = cache.nbytes if row.budget else cache.nbytes / cache.seen * 2048
        # a cache is full only just before a compaction; mlx-lm's own grows by 256 tokens
        assert 0.85 * row.nbytes <= real <= (1.0 if row.budget else 1.15) * row.nbytes


def test_the_table_and_the_verdict():
    result = run("demo", "--memory", "100MB", "--context", "8k", "--conversations", 20)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert (
        lines[0].startswith("demo: 0.65 MB of weights, 96.2 MB of 100 MB left") and "8,192 tokens" in lines[0]
    )
    rows = [line.split() for line in lines if line.startswith("  ") and "MB" in line]
    assert rows[0] == ["all", "12.6", "MB", "7"]
    assert [row[0] for row in rows[1:]] == ["256", "512", "1,024", "2,048", "4,096"]
    _, shape = any_backend().cache_shape(demo.MODEL)
    weights = (demo.MODEL / "model.safetensors").stat().st_size
    most = plan(shape, 10**8, weights, 8192, 20).largest.budget
    assert f"The largest budget that fits 20 conversations: --budget {most}." in result.stdout
    assert "do not say from which budget on they are sound" in result.stdout


def test_gates_that_say_from_which_budget_on_they_are_sound(tmp_path):
    shutil.copytree(demo.GATES, tmp_path / "gates")
    path = tmp_path / "gates" / "kvret.json"
    manifest = json.loads(path.read_text())
    manifest["gates"]["eviction"] = {"smallest_budget": 3000}
    path.write_text(json.dumps(manifest))
    asked = ["demo", "--memory", "100MB", "--context", "8k", "--gates", tmp_path / "gates"]
    result = run(*asked, "--conversations", 20)
    assert "found sound from 3,000 on, which does not fit" in result.stdout
    marked = [line.split()[0] for line in result.stdout.splitlines() if "below what the gates" in line]
    assert marked == ["256", "512", "1,024", "2,048"]
    assert "were found sound from a budget of 3,000 on" in run(*asked).stdout


@pytest.mark.parametrize(
    "more, verdict",
    [
        (["--conversations", "4"], "The full cache fits 4 conversations of 8,192 tokens"),
        (["--conversations", "100000"], "Not even the smallest budget fits 100,000 conversations"),
        (["--gates", "none"], "Without gates nothing says which budget is sound."),
    ],
)
def test_other_verdicts(more, verdict):
    result = run("demo", "--memory", "100MB", *more)
    assert result.exit_code == 0 and verdict in result.stdout, result.output


@pytest.mark.parametrize(
    "line, status, reason",
    [
        (["demo"], 2, "--memory"),
        (["demo", "--memory", "16"], 1, "the memory is '16'; expected a size such as 16GB"),
        (["demo", "--memory", "1GB", "--context", "long"], 1, "expected tokens such as 131072 or 128k"),
        (["demo", "--memory", "1GB", "--conversations", "0"], 1, "--conversations is 0"),
        (["demo", "--memory", "1MB"], 1, "nothing is left for a cache"),
        (["none", "--memory", "1GB"], 1, "none"),
        (["demo", "--memory", "1GB", "--gates", "no-such-gates"], 1, "no-such-gates"),
        ([demo.GATES, "--memory", "1GB"], 1, "config.json"),
    ],
)
def test_what_cannot_be_planned_is_one_line(line, status, reason):
    result = run(*line)
    assert result.exit_code == status and result.stdout == "" and result.stderr.count("\n") == 1
    assert reason in result.stderr


def test_info_leads_to_it():
    result = CliRunner().invoke(main, ["info", "demo"])
    assert "mlx-kvret plan demo --memory 16GB" in result.stdout
