"""``mlx-kvret eval`` as a user calls it."""

import json

import pytest
from click.testing import CliRunner

from mlx_kvret.cli import main
from mlx_kvret.demo import GATES, STORY

ARGUMENTS = ["eval", "--model", "demo", "--budget", "1/8", "--samples", "2", "--quiet"]


def call(*extra):
    length = [] if "--length" in extra else ["--length", "192"]
    return CliRunner().invoke(main, [*ARGUMENTS, *length, *map(str, extra)])


def test_help_has_examples_and_every_task_and_method():
    text = CliRunner().invoke(main, ["eval", "--help"]).output
    for word in ("mlx-kvret eval --model demo", "variable-tracking", "hostile", "snapkv", "longmemeval:FILE"):
        assert word in text


def test_everything_in_one_run(tmp_path):
    pytest.importorskip("matplotlib", reason="an extra; CI installs it")
    names = {"out": "r.json", "report": "r.md", "json": "s.json", "plot": "p.svg", "diagnose": "d.json"}
    files = {name: tmp_path / file for name, file in names.items()}
    options = [part for name, path in files.items() for part in (f"--{name}", path)]
    done = call(*options, "--method", "full", "--method", "learned", "--method", "h2o", "--backend", "mlx")
    assert done.exit_code == 0, done.output
    cells = json.loads(files["out"].read_text(encoding="utf-8"))["cells"]
    assert {cell["method"]: cell["engine"] for cell in cells.values()} == {
        "full": "mlx",
        "learned": "mlx",
        "h2o": "reference",
    }
    assert "| h2o |" in files["report"].read_text(encoding="utf-8")
    assert len(json.loads(files["json"].read_text(encoding="utf-8"))["rows"]) == 3
    assert [row["method"] for row in json.loads(files["diagnose"].read_text(encoding="utf-8"))] == [
        "h2o",
        "learned",
    ]
    before = files["out"].read_bytes()
    again = call("--out", files["out"], "--method", "full", "--method", "h2o", "--backend", "mlx")
    assert again.exit_code == 0 and "| learned |" in again.output and files["out"].read_bytes() == before


def test_a_text_and_a_generated_task_on_the_demo():
    options = [
        "--method",
        "full",
        "--method",
        "recent",
        "--task",
        f"perplexity:{STORY}",
        "--task",
        "needle-single",
    ]
    done = call(*options, "--length", "600", "--backend", "mlx")
    assert done.exit_code == 0, done.output
    shown = done.output.split("## ")
    # filler has four equally likely next words; numbers are no words of the demo
    (text,) = [part for part in shown if part.startswith("perplexity:") and "600 tokens: perplexity" in part]
    full = float(text.split("| full | ")[1].split(" ")[0])
    assert 4 < full < 60
    # nothing is claimed of learned eviction where there is none
    assert "learned" not in done.output
    (needle,) = [part for part in shown if part.startswith("needle-single, 600 tokens: accuracy")]
    assert "| full | 0.000 ± 0.000 |" in needle


@pytest.mark.parametrize(
    "extra,message",
    [
        (["--task", "nothing"], "task 'nothing' is not known"),
        (["--method", "best"], "method 'best' is not known"),
        (["--budget", "x"], "budget 'x' is neither"),
        (["--plot", "a.bmp"], "expected .png or .svg"),
        (["--chunk", "0"], "chunk is 0"),
        (["--gates", f"a={GATES}", "--gates", f"a={GATES}"], "two sets of gates are called 'a'"),
        (["--length", "10"], "length is 10"),
    ],
)
def test_mistakes_are_one_line(extra, message):
    done = call(*extra)
    assert done.exit_code == 1
    # after what was said of the gates that were chosen
    *said, told = done.stderr.splitlines()
    assert told.startswith("error: ") and message in told and all(line.startswith("gates: ") for line in said)


def test_text_files_are_a_task_with_nats_above_the_full_cache(tmp_path):
    path = tmp_path / "r.json"
    options = ["--data", STORY, "--method", "full", "--method", "learned", "--method", "recent"]
    done = call(*options, "--out", path, "--length", "200", "--dtype", "float32", "--backend", "mlx")
    assert done.exit_code == 0, done.output
    assert "## text, 200 tokens: perplexity" in done.output
    assert "Nats per token above that of full, paired over samples:" in done.output
    assert "Nats per token above that of learned, paired over samples:" in done.output
    assert "nan" not in done.output and "in chunks of 12 tokens, alike for all methods" in done.output
    data = json.loads(path.read_text(encoding="utf-8"))
    assert list(data["settings"]["data"]) == [str(STORY)] and data["settings"]["dtype"] == "float32"
    assert {cell["chunk"] for cell in data["cells"].values() if cell["method"] != "full"} == {12}
    # one sample: no error, and no figure that is none
    one = call(*options, "--samples", "1", "--length", "200", "--backend", "mlx")
    assert one.exit_code == 0 and "nan" not in one.output and "± 0.0" not in one.output


def test_an_interrupted_run_goes_on_by_its_file(tmp_path, monkeypatch):
    from mlx_kvret.evaluation.engine import PublicEngine

    whole, path = tmp_path / "whole.json", tmp_path / "r.json"
    options = ["--method", "full", "--method", "recent", "--method", "knorm", "--backend", "mlx"]
    assert call(*options, "--out", whole).exit_code == 0
    run, asked = PublicEngine.run, []

    def breaks(self, samples, method, budget):
        asked.append(method.name)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return run(self, samples, method, budget)

    monkeypatch.setattr(PublicEngine, "run", breaks)
    stopped = call(*options, "--out", path)
    assert stopped.exit_code != 0
    assert f"1 cells are kept; go on with `mlx-kvret eval --resume {path}`" in stopped.stderr
    done = CliRunner().invoke(main, ["eval", "--resume", str(path), "--quiet"])
    assert done.exit_code == 0, done.output
    assert asked == ["full", "recent", "recent", "knorm"]
    cells = [json.loads(p.read_text(encoding="utf-8"))["cells"] for p in (whole, path)]
    scores = [{key: cell["scores"] for key, cell in found.items()} for found in cells]
    assert scores[0] == scores[1]
    refused = CliRunner().invoke(main, ["eval", "--resume", str(path), "--samples", "9", "--out", "x"])
    assert refused.exit_code == 1 and "so --out, --samples has no effect" in refused.stderr
    assert CliRunner().invoke(main, ["eval"]).exit_code == 2


@pytest.mark.parametrize(
    "extra,message",
    [
        (
            ["--chunk", "512", "--task", f"perplexity:{STORY}"],
            "nothing would be evicted before the last token",
        ),
        (["--buffer", "180"], "nothing would be evicted before the last token"),
        (["--task", "text"], "give some with --data FILE"),
        (["--data", "missing.txt"], "missing.txt is not a file"),
        (["--data", STORY, "--task", "facts"], "text files were given, which only task text reads"),
        (["--data", STORY, "--diagnose", "d.json"], "the diagnosis needs one-turn tasks"),
    ],
)
def test_what_would_mislead_is_refused_before_anything_is_run(extra, message, monkeypatch):
    from mlx_kvret.evaluation.engine import PublicEngine

    monkeypatch.setattr(PublicEngine, "run", lambda *_: pytest.fail("a cell was run"))
    done = call(*extra, "--method", "full", "--method", "recent", "--backend", "mlx")
    assert done.exit_code == 1 and message in done.stderr


def test_gates_used_other_than_validated_are_marked(tmp_path):
    import dataclasses

    from mlx_kvret.core.checkpoint import load_gates, save_gates
    from mlx_kvret.core.config import EvictionDefaults

    found = load_gates(GATES)
    wishes = dataclasses.replace(found.config, eviction=EvictionDefaults(sinks=6))
    save_gates(tmp_path / "gates", wishes, found.tensors)
    methods = [part for name in ("learned", "learned:sinks=0", "recent") for part in ("--method", name)]
    done = call("--gates", tmp_path / "gates", *methods, "--backend", "mlx")
    assert done.exit_code == 0, done.output
    rows = {line.split(" | ")[0]: line for line in done.output.splitlines() if line.startswith("| ")}
    assert "†" in rows["| learned:sinks=0"] and "†" not in rows["| learned"] + rows["| recent"]
    assert "learned:sinks=0: not used as its gates were validated (sinks 0, validated with 6)" in done.output
    assert "Policies without gates protect at least 6 sinks" in done.output
