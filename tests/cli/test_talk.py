"""Taking back, asking again, going on and reading in a chat: transcript and cache always agree."""

from contextlib import nullcontext

import pytest
from click.testing import CliRunner

import mlx_kvret
from mlx_kvret.api import backend_of
from mlx_kvret.cli import main
from mlx_kvret.cli.talk import Conversation
from mlx_kvret.cli.typed import fenced, unfenced, unfinished
from mlx_kvret.errors import ConfigError

FILLER = "the weary miller walks past a quiet river and "


@pytest.fixture(scope="module", params=["mlx", "torch"])
def loaded(request):
    library = {"mlx": "mlx.core", "torch": "torch"}[request.param]
    pytest.importorskip(library, reason="the backend is not installed")
    return mlx_kvret.load("demo", backend=request.param)


def begun(loaded, **options):
    return Conversation(*loaded, None, {"budget": 32} | options)


def state(talk):
    assert talk.cache.seen == len(talk.transcript) == len(talk.transcript.ids)
    kept = [position.tolist() for layer in talk.cache.kept_positions() for position in layer]
    return talk.transcript.messages[:], talk.transcript.ids, kept


SHORT = {"max_tokens": 4}


@pytest.mark.parametrize("policy", ["learned", "full"])
def test_undo_goes_back_to_before_the_turn(loaded, policy, capsys):
    talk = begun(loaded, policy=policy, budget=8)
    talk.turn(FILLER * 3 + "remember Ada amber recall Ada", SHORT)
    before = state(talk)
    talk.turn(FILLER * 2 + "recall Ada", SHORT)
    assert state(talk) != before
    talk.undo()
    assert state(talk) == before
    with pytest.raises(ConfigError, match="nothing to take back"):
        talk.undo()
    assert state(talk) == before


@pytest.mark.parametrize(("every", "asked"), [(1, 16), (8, 2)])
def test_several_processes_ask_seldom_whether_to_stop(loaded, every, asked, monkeypatch, capsys):
    talk, times = begun(loaded), []
    monkeypatch.setattr(talk.company, "every", every)
    monkeypatch.setattr(talk.company, "stoppable", lambda: nullcontext(lambda: times.append(1)))

    def asks(tokens, step):
        talk.reset()
        times.clear()
        talk.turn(FILLER, {"max_tokens": tokens, "prefill_step_size": step, "logit_bias": {0: -100, 1: -100}})
        assert len(talk.last.said) == tokens
        return len(times)

    assert asks(17, 64) - asks(1, 64) == asked
    # between chunks of a prompt always
    assert asks(1, 2) >= 5


def test_retry_asks_the_same_again(loaded, capsys):
    talk = begun(loaded)
    talk.turn("remember Ada amber recall Ada", SHORT)
    once = state(talk)
    talk.retry(SHORT)
    assert state(talk) == once
    talk.undo()
    assert talk.transcript.messages == [] and talk.cache.seen == 0
    with pytest.raises(ConfigError, match="no message to ask again"):
        talk.retry(SHORT)


@pytest.mark.parametrize("cut", range(1, 9))
def test_an_answer_goes_on_as_if_it_had_not_been_cut(loaded, cut, capsys):
    whole, talk = begun(loaded, budget=512), begun(loaded, budget=512)
    whole.turn(FILLER, {"max_tokens": 16})
    talk.turn(FILLER, {"max_tokens": cut})
    talk.go_on({"max_tokens": 8 - cut or 1})
    talk.go_on({"max_tokens": 16 - len(talk.last.said)})
    assert state(talk) == state(whole) and len(talk.transcript.messages) == 2
    assert capsys.readouterr().out.count("[cut by") == 0


def test_an_answer_goes_on_whether_or_not_a_compaction_came_between(loaded, monkeypatch, capsys):
    backend, taken = backend_of(loaded[0]), []
    real = backend.take_back

    def told(cache, count):
        taken.append(real(cache, count))
        return taken[-1]

    monkeypatch.setattr(backend, "take_back", told)
    for cut in range(1, 9):
        talk = begun(loaded, budget=8, buffer=4)
        talk.turn(FILLER * 2, {"max_tokens": cut})
        said = list(talk.last.said)
        talk.go_on({"max_tokens": 3})
        assert talk.last.said[:cut] == said and len(talk.last.said) == cut + 3
        _, ids, _ = state(talk)
        assert ids[-cut - 3 :] == talk.last.said
        talk.turn("recall Ada", SHORT)
        state(talk)
    assert set(taken) == {True, False}


def test_there_is_nothing_to_go_on_with(loaded, capsys):
    talk = begun(loaded)
    with pytest.raises(ConfigError, match="no answer to go on with"):
        talk.go_on(SHORT)
    talk.turn("remember Ada amber recall Ada", SHORT)
    assert talk.last.ended
    with pytest.raises(ConfigError, match="no answer to go on with"):
        talk.go_on(SHORT)


def test_a_file_is_read_and_taken_back(loaded, tmp_path, capsys):
    path = tmp_path / "notes"
    path.write_text(FILLER * 9 + "remember Frank copper")
    talk = begun(loaded)
    talk.turn("remember Ada amber recall Ada", SHORT)
    before = state(talk)
    talk.read(path, 16)
    assert talk.transcript.messages == before[0] and talk.cache.seen > 80
    read = state(talk)
    talk.turn("recall Frank", SHORT)
    asked = talk.transcript.messages[-2]["content"]
    assert (
        asked == path.read_text() + "\n\nrecall Frank" and talk.transcript.messages[-1]["content"] == "copper"
    )
    talk.undo()
    assert state(talk) == read
    talk.read(path, 16)
    talk.undo()
    assert state(talk) == read


def chat(*lines, options=()):
    arguments = ["chat", "--model", "demo", "--budget", "32", "--max-tokens", "4", *options]
    return CliRunner().invoke(main, arguments, input="".join(f"{line}\n" for line in lines))


def answers(result):
    return [part.strip() for part in result.stdout.split(">>")[1:]]


def test_all_of_it_by_command(tmp_path):
    (tmp_path / "notes").write_text("remember Frank copper")
    lines = ["remember Ada amber recall Ada", "/undo", "/stats", "/retry", f"/read {tmp_path}/notes"]
    lines += ["recall Frank", "/retry", "/undo", "recall Ada", "the weary", "/continue", "/stats"]
    result = chat(*lines, "/read", f"/read {tmp_path}/none")
    said = answers(result)
    assert said[:2] == ["amber", "[taken back; 0 tokens are read]"]
    assert said[2].startswith("[nothing read yet; KV 0.0")
    assert said[3] == "" and "no message to ask again" in result.stderr
    assert said[4] == "[read 4 tokens; ask about them]"
    assert said[5] == said[6] == "copper" and said[7] == "[taken back; 4 tokens are read]"
    # the unknown is asked of the same reading
    assert said[8] != "amber" and len(said[9].split()) == len(said[10].split()) == 4
    assert said[11].startswith("[remembers ") and "a full cache would take" in said[11]
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 3 and "needs a file" in errors[1] and "No such file" in errors[2]
    assert result.stderr.count("[cut by --max-tokens 4; /continue goes on]") >= 2


def test_lines_that_belong_together():
    told = ["remember Ada amber \\", "remember Frank copper\\", "recall Frank"]
    assert answers(chat(*told))[0].split() == ["..", "..", "copper"]
    fence = ['"""', "remember Ada amber", "", "/quit is no command here", '"""', "recall Ada"]
    said = answers(chat(*fence))
    assert said[-2] == "amber" and said[0].startswith(".. .. .. ..")
    # at the end of input what is there is a message
    assert chat("recall Ada \\").exit_code == 0 and chat('"""', "recall Ada").exit_code == 0


@pytest.mark.parametrize(
    "text, more, whole",
    [
        ("a", False, "a"),
        ("a\\", True, "a\\"),
        ("a\\\nb", False, "a\\\nb"),
        ('"""', True, '"""'),
        ('"""a"""', False, "a"),
        ('"""a\\', True, '"""a\\'),
        ('"""\na\n\nb\n"""', False, "a\n\nb"),
        ('  """\na\n"""  ', False, "a"),
        ('a """', False, 'a """'),
        ('""""', True, '""""'),
    ],
)
def test_when_a_message_is_whole(text, more, whole):
    assert unfinished(text) == more and unfenced(text) == whole
    assert fenced(text) == text.strip().startswith('"""')


def test_a_file_to_begin_with(tmp_path):
    (tmp_path / "one").write_text("remember Ada amber")
    (tmp_path / "two").write_text("remember Frank copper")
    result = chat("recall Ada", options=["--file", f"{tmp_path}/one", "--file", f"{tmp_path}/two"])
    assert answers(result)[0] == "amber" and result.stdout.count("[read ") == 2


def test_a_saved_cache_to_begin_with_says_nothing_of_options(tmp_path):
    chat("remember Ada amber recall Ada", f"/save {tmp_path}/t.kv")
    where = ["chat", "--model", "demo", "--cache", f"{tmp_path}/t.kv", "--max-tokens", "4"]
    result = CliRunner().invoke(main, where, input="recall Ada\n/reset\nrecall Ada\n")
    assert "it goes on with" not in result.output and answers(result)[0] == "amber"
    assert "up to 32 tokens per head" in result.stderr
