"""``--image`` and ``/image``: pictures on the command line, before a prompt, in a talk, in a saved one."""

import PIL.Image
import pytest
from click.testing import CliRunner

import mlx_kvret
from mlx_kvret.cli import main

from . import folders

HOW = ["--backend", "mlx", "--gates", "none", "--max-tokens", 4]
EVICTION = ["--policy", "keydiff", "--budget", 16]


def run(command, *arguments, text=None):
    return CliRunner().invoke(main, [command, *map(str, (*arguments, *HOW))], input=text)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    at = tmp_path_factory.mktemp("pictures")
    for name, one in (("one.png", folders.picture(1)), ("two.png", folders.picture(2, 2, 2))):
        PIL.Image.fromarray(one).save(at / name)
    return at


def test_generate_answers_about_pictures_as_the_function_does(folder, files):
    model, processor = mlx_kvret.load(folder, None, backend="mlx")
    parts = [{"type": "image"}, {"type": "text", "text": "recall Anna"}]
    for images, prompt, content in (
        (["one.png"], "recall Anna", parts),
        (["one.png", "two.png"], "recall Anna", [{"type": "image"}, *parts]),
        (
            ["two.png"],
            "recall <image> Anna",
            [{"type": "text", "text": "recall"}, parts[0], {"type": "text", "text": "Anna"}],
        ),
    ):
        paths = [files / name for name in images]
        expected = mlx_kvret.generate(
            model,
            processor,
            [{"role": "user", "content": content}],
            images=paths,
            policy="keydiff",
            budget=16,
            max_tokens=4,
        )
        found = run("generate", "--model", folder, "--prompt", prompt, "--image", *paths, *EVICTION)
        assert (found.exit_code, found.stdout.strip()) == (0, expected.strip()), found.output
    plain = run("generate", "--model", folder, "--prompt", "recall Anna", *EVICTION, "--scope", "modality")
    assert plain.exit_code == 0 and "cut by" in plain.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--image", "none.png"], "cannot read"),
        (["--image", "https://example.org/a.png"], "nothing is fetched"),
        (["--image", "{one}", "--prompt", "<image> and <image>"], "2 places for a picture"),
        (["--image", "{one}", "--prompt", "<|vision_start|> x"], "spells control tokens"),
        (["--image", "{one}", "--prompt", "x <|image_pad|>"], "write <image> where one belongs"),
        (["--image", "{one}", "--ignore-chat-template"], "--image needs the model's chat template"),
        (["--image", "{one}", "--picture-share", "0.5"], "a share goes with the scope"),
        (["--image", "{one}", "--prompts", "x.jsonl"], "--image does not work with --prompts"),
    ],
)
def test_wrong_use_is_one_line(folder, files, arguments, words):
    given = [one.format(one=files / "one.png") for one in arguments]
    found = run(
        "generate",
        "--model",
        folder,
        *(["--prompt", "x"] if "--prompts" not in given else []),
        *given,
        *EVICTION,
    )
    assert found.exit_code == 1 and words in found.stderr and len(found.stderr.strip().splitlines()) == 1


def test_a_file_that_a_terminal_has_quoted_goes_with_the_message(folder, files):
    spaced = files / "a picture.png"
    PIL.Image.fromarray(folders.picture(1)).save(spaced)
    escaped = str(spaced).replace(" ", "\\ ")
    for name in (f"'{spaced}'", f'"{spaced}"', escaped, spaced):
        talk = run("chat", "--model", folder, *EVICTION, text=f"/image {name}\n")
        assert "a picture of 64 x 48" in talk.stdout, talk.output
    wrong = run("chat", "--model", folder, *EVICTION, text="/image https://a.b/c.png\n/image 'no\n")
    assert "'https://a.b/c.png', and nothing is fetched" in wrong.stderr and "cannot read" in wrong.stderr


def test_a_model_of_text_says_so(files):
    found = run(
        "generate", "--model", "demo", "--prompt", "x", "--image", files / "one.png", "--policy", "recent"
    )
    assert found.exit_code == 1 and "this model reads text only" in found.stderr


def test_a_talk_about_pictures_is_saved_and_goes_on(folder, files, tmp_path):
    typed = f"/image {files / 'one.png'}\nrecall Anna\n/image {files / 'two.png'}\nand <image> this\n"
    talk = run(
        "chat", "--model", folder, *EVICTION, text=f"{typed}/retry\nmore\n/save {tmp_path / 'talk.kv'}\n"
    )
    assert talk.exit_code == 0 and "a picture of 64 x 48; it goes with the next message" in talk.stdout
    answers = [part.strip() for part in talk.stdout.split(">>")]
    assert answers[4] == answers[5] != "" and answers[2] and answers[6]
    again = run("chat", "--model", folder, "--cache", tmp_path / "talk.kv", text="even more\n")
    assert again.exit_code == 0 and "[loaded" in again.stdout, again.output
    one = run("generate", "--model", folder, "--cache", tmp_path / "talk.kv", "--prompt", "even more")
    assert one.stdout.strip() and one.stdout.strip() in again.stdout
    seen = run(
        "generate",
        "--model",
        folder,
        "--cache",
        tmp_path / "talk.kv",
        "--prompt",
        "x",
        "--image",
        files / "one.png",
    )
    assert seen.exit_code == 0 and seen.stdout.strip()
    wrong = run(
        "chat", "--model", folder, *EVICTION, text="/image none.png\n/image\n/image https://a.b/c.png\n"
    )
    assert (
        "cannot read" in wrong.stderr
        and "/image needs a file" in wrong.stderr
        and "nothing is fetched" in wrong.stderr
    )
