"""``mlx_kvret.inspect``: what it tells is what a cache holds, and a page of it is harmless and whole."""

import json
import re

import numpy as np
import pytest
from click.testing import CliRunner

import mlx_kvret
from mlx_kvret.cli import main
from mlx_kvret.core.history import History
from mlx_kvret.demo import STORY
from mlx_kvret.errors import ConfigError, KVRetError
from mlx_kvret.page.files import page_of

OPTIONS = {"budget": 16, "buffer": 4}


@pytest.fixture(scope="module", params=["mlx", "torch"])
def loaded(request):
    pytest.importorskip({"mlx": "mlx_lm", "torch": "torch"}[request.param])
    return mlx_kvret.load("demo", backend=request.param)


def data_of(page: str) -> dict:
    """What stands in a page, as its script reads it."""
    (block,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    return json.loads(block)


def story(words: int) -> str:
    return " ".join(STORY.read_text(encoding="utf-8").split()[:words])


def test_what_is_told_is_what_is_kept(loaded, tmp_path):
    """Chunk by chunk beside a cache that is asked after each."""
    model, tokenizer = loaded
    text = story(150)
    found = mlx_kvret.inspect(model, tokenizer, text, prefill_step_size=10, **OPTIONS)
    ids = tokenizer.encode(text)
    cache, naive = mlx_kvret.make_cache(model, **OPTIONS), []
    backend = mlx_kvret.api.backend_of(model)
    for start in range(0, len(ids), 10):
        backend.read_tokens(model, cache, ids[start : start + 10], 10)
        naive.append((cache.seen, cache.kept_positions()))
    history = found.history
    assert history.now.seen == len(ids) and len(history.compactions) > 5
    by_seen = {moment.seen: at for at, moment in enumerate(history.compactions)}
    for seen, kept in naive:
        if seen in by_seen or seen == len(ids):
            at = by_seen.get(seen)
            for layer, heads in enumerate(kept):
                for head, positions in enumerate(heads):
                    assert np.flatnonzero(history.held(at, layer, head)).tolist() == positions.tolist()
    assert history.now.entries == cache.entries and found.answer == ""
    assert "".join(found.data["texts"]).split() == tokenizer.decode(ids).split()
    found.save(tmp_path / "page.html")
    again = data_of((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert again["texts"] == found.data["texts"] and (History.from_dict(again).gone == history.gone).all()


def test_an_answer_is_that_of_generate(loaded):
    model, tokenizer = loaded
    text = story(150)
    found = mlx_kvret.inspect(
        model,
        tokenizer,
        text,
        prompt="recall Stella",
        raw=True,
        max_tokens=20,
        prefill_step_size=16,
        **OPTIONS,
    )
    said = mlx_kvret.generate(
        model, tokenizer, f"{text}\n\nrecall Stella", max_tokens=20, prefill_step_size=16, **OPTIONS
    )
    assert found.answer == said and found.history.now.seen == len(found.data["texts"])
    held = found.history.now.entries
    assert held == sum(int(found.history.held(None, layer).sum()) for layer in range(found.history.layers))


def test_both_backends_tell_the_same():
    pytest.importorskip("mlx_lm")
    pytest.importorskip("torch")
    found = [
        mlx_kvret.inspect(*mlx_kvret.load("demo", backend=name), story(120), prompt="recall Ada", **OPTIONS)
        for name in ("mlx", "torch")
    ]
    one, other = (inspection.data for inspection in found)
    assert one["gone"] == other["gone"] and one["texts"] == other["texts"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "nothing to read"),
        ({"text": "  "}, "nothing to read"),
        ({"text": "a", "max_tokens": 3}, "max_tokens has no effect without a prompt"),
        ({"text": "a", "budjet": 3}, "budget"),
        ({"text": "a", "prompt": "b", "budjet": 3}, "budget"),
        ({"text": "a", "policy": "full"}, "nothing to see"),
        ({"text": "a", "prefill_step_size": 0}, "prefill_step_size"),
        ({"text": 5}, "text is 5"),
    ],
)
def test_refused(loaded, given, said):
    with pytest.raises(KVRetError, match=said):
        mlx_kvret.inspect(*loaded, **given)


def test_a_text_cannot_leave_its_block():
    """Marks of HTML and of the template, in names and in tokens."""
    hostile = [
        "</script><script>alert(1)</script>",
        "<!--<script>",
        "@@policy@@",
        "\u2028\u0000\ud800",
        "]]>&lt;",
    ]
    history = History(1, 1).to_dict()
    page = page_of(history | {"texts": hostile, "model": hostile[0]})
    assert page.count("<script") == 3 and page.count("</script") == 3 and "alert(1)</" not in page
    assert page.isascii() or "\ud800" not in page
    page.encode()
    assert data_of(page)["texts"] == hostile
    assert not re.search(r"(src|href)=\"(?!data:)", page) and "http" not in re.sub(
        r"http-equiv|http://www.w3.org/2000/svg", "", page
    )


def run(*args):
    return CliRunner().invoke(main, ["inspect", "--model", "demo", *map(str, args)])


def test_command(tmp_path):
    out = tmp_path / "page.html"
    found = run("--file", "demo", "--prompt", "recall Stella", "--budget", "64", "--out", out)
    assert found.exit_code == 0, found.output
    assert found.stdout == "salmon\n" and "compactions" in found.stderr
    assert out.stat().st_mode & 0o777 == 0o600 and out.stat().st_size < 200_000
    data = data_of(out.read_text(encoding="utf-8"))
    assert data["model"] == "demo" and data["texts"][-2].strip() == "salmon"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((), "give --file"),
        (("--file", "demo", "--temp", "0.5"), "--temp has no effect without --prompt"),
        (("--file", "demo", "--max-tokens", "5"), "--max-tokens has no effect without --prompt"),
        (("--file", "demo", "--policy", "full"), "nothing to see"),
        (("--file", "nowhere.txt"), "cannot read nowhere.txt"),
        (("--file", "demo", "--budget", "0"), "budget"),
    ],
)
def test_command_refuses(tmp_path, args, said):
    out = tmp_path / "page.html"
    found = run(*args, "--out", out)
    assert found.exit_code and said in found.stderr and not out.exists()


def test_command_refuses_a_folder(tmp_path):
    found = run("--file", "demo", "--out", tmp_path)
    assert found.exit_code and "is a folder" in found.stderr


def test_no_tokenizer(loaded):
    with pytest.raises(ConfigError, match="no tokenizer"):
        mlx_kvret.inspect(loaded[0], None, "a")
