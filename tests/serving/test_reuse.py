"""Which requests go on from a snapshot, over HTTP: five kinds, with a template that cuts answers."""

import copy
from time import perf_counter

import pytest

from mlx_kvret.demo import STORY

from .running import CHAT, running

# cuts the beginning of each past answer off, as templates of thinking models do
REWRITES = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'].split(' ')[3:] | join(' ') + ' ' + eos_token }}"
    "{% else %}{{ ' ' + message['content'] }}{% endif %}{% endfor %}"
)
# opens the answer with a mark of its own
OPENS = REWRITES + "{% if add_generation_prompt %}{{ ' recall' }}{% endif %}"
WORDS = STORY.read_text(encoding="utf-8").split()


def words(start, count=150):
    return " ".join(WORDS[start : start + count])


def user(start, count=150):
    return {"role": "user", "content": words(start, count)}


SYSTEM = {"role": "system", "content": words(3000, 80)}


def with_template(loaded, template):
    model, tokenizer = loaded
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return model, tokenizer


def ask(server, *messages, **more):
    """The answer's text, tokens of the prompt, and those of them that a snapshot had read."""
    options = {"messages": list(messages), "max_tokens": 30, "logit_bias": {"1": -100}} | more
    answer = server.post(CHAT, **options)
    assert answer.status == 200, answer.text
    found = answer.json()
    usage = found["usage"]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return found["choices"][0]["message"]["content"], usage["prompt_tokens"], cached


@pytest.mark.parametrize("template", [REWRITES, OPENS], ids=["bare", "opened"])
@pytest.mark.parametrize("stream", [False, True])
def test_five_kinds_of_requests(loaded, template, stream):
    with running(with_template(loaded, template), {"budget": 64, "buffer": 8}) as server:
        text, first, cached = ask(server, SYSTEM, user(0))
        assert cached == 0
        # the tail that opens an answer is not of the next turn
        turn = first - 1
        answered = {"role": "assistant", "content": text.strip()}
        told = []
        for messages in (
            [SYSTEM, user(0), answered, user(300, 40)],
            [SYSTEM, user(0), answered, user(300, 40)],
            [SYSTEM, user(0), answered, user(700, 40)],
            [SYSTEM, user(1500)],
            [SYSTEM, user(0, 75), answered, user(300, 40)],
        ):
            options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
            if stream:
                answer = server.post(CHAT, messages=messages, max_tokens=3, **options)
                usage = answer.events()[-1]["usage"]
                told.append((usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]))
            else:
                told.append(ask(server, *messages)[1:])
        following, again, edited, other, shortened = told
        assert following == (following[0], turn) and following[0] > turn + 40
        assert again == (following[0], following[0] - 1)
        assert edited[1] == turn
        # the begin token and the system prompt
        assert other[1] == 81 and shortened[1] == 81


def test_a_history_that_is_kept_goes_on_from_the_end_of_the_answer(server):
    text, first, _ = ask(server, user(0), max_tokens=9)
    answered = {"role": "assistant", "content": text}
    *_, cached = ask(server, user(0), answered, user(300, 40))
    assert cached == first + 9


def test_an_answer_that_ended_by_itself_is_read_with_its_end(server):
    asked = {"role": "user", "content": "remember Stella salmon recall Stella"}
    text, first, _ = ask(server, asked, logit_bias={})
    assert text == "salmon"
    _, _, cached = ask(server, asked, {"role": "assistant", "content": text}, user(300, 40))
    assert cached == first + 2


def test_a_salt_keeps_users_apart(server):
    assert ask(server, user(900), cache_salt="a")[2] == 0
    assert ask(server, user(900), cache_salt="b")[2] == 0
    assert ask(server, user(900))[2] == 0
    assert [ask(server, user(900), cache_salt=salt)[2] for salt in "ab"] == [150, 150]


def test_a_budget_of_one_s_own_has_snapshots_of_its_own(server):
    assert ask(server, user(1200))[2] == 0
    assert ask(server, user(1200), kv_budget=8)[2] == 0
    assert ask(server, user(1200), kv_budget=8)[2] == 150


def test_a_completion_that_goes_on_word_for_word(server):
    prompt = words(2000, 100)
    options = {"max_tokens": 8, "logit_bias": {"1": -100}}
    text = server.text(prompt, **options)
    for longer in (f"{prompt} {text}", f"{prompt} {text}", prompt):
        assert server.text(longer, **options)
    assert server.metrics.hits >= 3


def test_snapshots_stay_within_their_memory(demo_mlx):
    with running(demo_mlx, room={"memory": 4_000_000, "snapshots": 400_000}) as server:
        for start in range(0, 600, 20):
            ask(server, user(start, 40 + start // 10), max_tokens=3)
            prefixes = server.scheduler.prefixes
            assert prefixes.nbytes <= prefixes.limit < 400_000
        assert 0 < len(prefixes) < 30
        # the newest is there, the oldest has gone
        assert ask(server, user(580, 98), max_tokens=3)[2] == 98
        assert ask(server, user(0, 40), max_tokens=3)[2] == 0


def test_without_snapshots_everything_is_read_again(demo_mlx):
    with running(demo_mlx, room={"snapshots": 0}) as server:
        assert [ask(server, user(0))[2] for _ in range(2)] == [0, 0]
        assert len(server.scheduler.prefixes) == 0


def test_a_second_turn_costs_little(demo_mlx):
    """Time to the first token after 4,000 tokens of conversation, against that of the first turn."""
    with running(demo_mlx, {"budget": 64, "buffer": 8}, room={"chunk": 256}) as server:
        times = []
        conversation = [user(0, 4000)]
        for turn in range(2):
            begun = perf_counter()
            text, _, cached = ask(server, *conversation, max_tokens=1)
            times.append(perf_counter() - begun)
            conversation += [{"role": "assistant", "content": text}, user(100 * turn, 20)]
        assert cached >= 4000 and times[1] < 0.1 * times[0], times
