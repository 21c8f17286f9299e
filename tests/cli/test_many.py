"""generate --prompts: many prompts from a file, each answered as it would be alone."""

import json
import re

import pytest
from click.testing import CliRunner

from mlx_kvret.cli import main

LINES = [
    {"prompt": "remember Anna amber then Rosa told Ivan copper recall Anna", "id": "first"},
    {"prompt": "remember Frank silver recall Frank", "budget": 8, "max_tokens": 2},
    {"prompt": "recall Stella", "budget": "1MB"},
]
BASE = ["generate", "--model", "demo", "--max-tokens", "5", "--budget", "16"]


def run(*arguments):
    return CliRunner().invoke(main, [*BASE, *map(str, arguments)], standalone_mode=True)


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_answers_are_those_of_single_prompts(tmp_path, backend):
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n\n".join(map(json.dumps, LINES)) + "\n", encoding="utf-8")
    done = run("--backend", backend, "--prompts", file, "--rows", 2)
    assert done.exit_code == 0, done.output
    found = sorted(map(json.loads, done.stdout.splitlines()), key=lambda made: made["index"])
    assert [made.get("id") for made in found] == ["first", None, None]
    for made, line in zip(found, LINES, strict=True):
        own = [("--budget", line.get("budget", 16)), ("--max-tokens", line.get("max_tokens", 5))]
        alone = run(
            "--backend", backend, "--prompt", line["prompt"], *(part for pair in own for part in pair)
        )
        assert made["text"] == alone.stdout.rstrip("\n")
        assert made["generation_tokens"] <= line.get("max_tokens", 5) and made["kv_entries"] > 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no prompt"),
        ("recall Anna", "line 1 of"),
        ('{"prompt": "a", "messages": []}', "an object with a prompt, or messages"),
        ('{"prompt": ""}', "as prompt"),
        ('\n{"prompt": "recall Anna", "tokens": 3}', "line 2 of"),
        ('{"prompt": "recall Anna", "max_tokens": 0}', "max_tokens"),
        ('{"prompt": "recall Anna", "budget": "many"}', "neither tokens per head"),
        ('{"messages": ["recall Anna"]}', "chat template|among messages|token id"),
    ],
)
def test_bad_files_are_one_line(tmp_path, text, said):
    file = tmp_path / "prompts.jsonl"
    file.write_text(text, encoding="utf-8")
    done = run("--prompts", file)
    assert done.exit_code == 1 and not done.stdout
    assert len(done.stderr.strip().splitlines()) == 1
    assert re.search(said, done.stderr)


@pytest.mark.parametrize(
    "options", [["--prompt", "a"], ["--file", "demo"], ["--prefill-response", "x"], ["--verbose"]]
)
def test_options_of_one_prompt_are_refused(tmp_path, options):
    done = run("--prompts", tmp_path / "any.jsonl", *options)
    assert done.exit_code == 1 and "does not work with --prompts" in done.stderr
    assert "no effect without --prompts" in run("--prompt", "a", "--rows", 2).stderr
