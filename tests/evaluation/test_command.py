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
