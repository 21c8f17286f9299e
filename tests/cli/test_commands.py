"""The command line in one process: output, help and one-line errors."""

import json

import pytest
from click.testing import CliRunner

from mlx_kvret import demo
from mlx_kvret.cli import main

DEMO = ["generate", "--model", "demo"]
FILLER = "the weary miller walks past a quiet river and "
STORY = FILLER + "remember Ada amber " + FILLER * 20


def run(*arguments, text=None):
    return CliRunner().invoke(main, [str(a) for a in arguments], input=text)


@pytest.mark.parametrize("command", ["generate", "chat", "convert", "info"])
def test_help_has_examples(command):
    result = run(command, "--help")
    assert result.exit_code == 0 and "Examples:" in result.output
    assert f"mlx-kvret {command} " in result.output


def test_help_lists_the_commands():
    result = run("--help")
    assert all(f"  {name} " in result.output for name in ("generate", "chat", "convert", "info"))


def test_generate_answers_from_an_option_a_file_and_a_pipe(tmp_path):
    (tmp_path / "story.txt").write_text(STORY)
    asked = [
        run(*DEMO, "--budget", 32, "--prompt", STORY + "recall Ada"),
        run(*DEMO, "--budget", 32, "--file", tmp_path / "story.txt", "--prompt", "recall Ada"),
        run(*DEMO, "--budget", 32, text=STORY + "recall Ada"),
        run(*DEMO, "--budget", 32, "--file", "-", "--prompt", "recall Ada", text=STORY),
        run(*DEMO, "--budget", "40KB", "--ignore-chat-template", "--prompt", STORY + "recall Ada"),
    ]
    for result in asked:
        assert (result.exit_code, result.stdout.split()) == (0, ["amber"]), result.output


def test_the_policy_decides():
    result = run(*DEMO, "--budget", 32, "--policy", "recent", "--prompt", STORY + "recall Ada", "--verbose")
    assert result.exit_code == 0 and result.stdout.split() != ["amber"]
    assert "of 196 tokens per head" in result.stderr and "full cache" in result.stderr


@pytest.mark.parametrize(
    "arguments,reason",
    [
        (["--budget", "0"], "budget is 0"),
        (["--budget", "-5"], "budget is -5"),
        (["--budget", "some"], "budget 'some'"),
        (["--budget", "1KB"], "too small"),
        (["--buffer", "-1"], "buffer"),
        (["--sinks", "2000"], "sinks"),
        (["--threshold", "0.5", "--policy", "recent"], "threshold"),
        (["--max-tokens", "0"], "max_tokens"),
        (["--prefill-step-size", "0"], "--prefill-step-size"),
        (["--temp", "-1"], "temp"),
        (["--temp", "nan"], "temp is nan"),
        (["--temp", "1", "--top-p", "2"], "top_p is 2"),
        (["--seed", "3"], "seed has no effect with a temp of 0"),
        (["--temp", "1", "--seed", "-3"], "seed is -3"),
        (["--temp", "1", "--seed", "9" * 30], "seed is 999"),
        (["--policy", "recent", "--policy-seed", "3"], "policy_seed is 3"),
        (["--lookahead", "1" + "0" * 30], "lookahead is 1000"),
        (["--budget", "1000000000"], "GB are free; at most a budget of"),
        (["--budget", "nan"], "budget 'nan'"),
        (["--prompt", " "], "prompt is empty"),
        (["--file", "no-such-file"], "no-such-file"),
        (["--model", "no-such-folder"], "no folder no-such-folder"),
        (["--model", "org/no-such-model"], "org/no-such-model"),
        (["--gates", "no-such-gates"], "no-such-gates"),
        (["--ignore-chat-template", "--system-prompt", "s"], "--system-prompt"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_error_is_one_line_and_status_1(monkeypatch, arguments, reason):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    given = [*DEMO, *([] if "--prompt" in arguments else ["--prompt", "the weary miller"]), *arguments]
    result = run(*given)
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and reason in result.stderr


def test_the_learned_policy_without_gates(tmp_path):
    # the demo's model as any folder, which brings no gates
    result = run("generate", "--model", demo.MODEL, "--prompt", "the")
    assert result.exit_code == 1 and "no retention gates" in result.stderr
    result = run("generate", "--model", demo.MODEL, "--prompt", "the", "--policy", "knorm", "--max-tokens", 2)
    assert result.exit_code == 0
    (tmp_path / "config.json").write_text("{}")
    assert run("generate", "--model", tmp_path, "--prompt", "the").exit_code == 1


def test_info_prices_a_budget():
    result = run("info", "demo", "--budget", "64", "--budget", "100KB", "--context", 4096)
    assert result.exit_code == 0
    for part in ("bounded", "rg10", "4,096", "64", "100KB", "backends"):
        assert part in result.output
    shape = json.loads((demo.MODEL / "config.json").read_text())
    assert f"{shape['num_hidden_layers']} layers" in result.output
    result = run("info", demo.GATES.parent)
    assert result.exit_code == 1 and "neither a model" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--context", "0"], "--context is 0"),
        (["--context", "4096", "--context", "-1"], "--context is -1"),
        (["--context", "9" * 40], "at most 2147483647"),
        (["--budget", "0"], "budget is 0"),
        (["--budget", "64", "--budget", "9" * 12], "budget is 999999999999"),
    ],
)
def test_info_refuses_before_it_prints(arguments, reason):
    result = run("info", "demo", *arguments)
    assert result.exit_code == 1 and result.stdout == "" and reason in result.stderr


def test_a_seed_makes_sampling_repeatable():
    drawn = [
        run(*DEMO, "--prompt", "the", "--temp", 9, "--seed", seed, "--max-tokens", 12, "--budget", 32).stdout
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
