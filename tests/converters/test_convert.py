"""Conversions as a whole: every pair of forms, options, destinations that fail, interruption, the command."""

import errno
import os
import resource
import signal
import subprocess
import sys

import pytest
from click.testing import CliRunner
from released import config, read, state, write

from mlx_kvret import demo
from mlx_kvret.cli import main
from mlx_kvret.cli.convert import command
from mlx_kvret.converters import FORMS, convert, detect, load_any, mlx_form, trimkv
from mlx_kvret.errors import CheckpointError, ConfigError


@pytest.fixture
def folders(tmp_path):
    """The same gates in every form."""
    write(tmp_path / "trimkv", config(), state())
    for form in ("shared", "mlx", "torch"):
        convert(tmp_path / "trimkv", tmp_path / form, form)
    return {form: tmp_path / form for form in FORMS}


def assert_nothing_left(tmp_path, known):
    assert {path.name for path in tmp_path.iterdir()} == known


@pytest.mark.parametrize("to", FORMS)
@pytest.mark.parametrize("form", FORMS)
def test_any_form_to_any_form(tmp_path, folders, form, to):
    done = convert(folders[form], tmp_path / "out", to)
    assert (done.src_form, done.dst_form, detect(tmp_path / "out")) == (form, to, to)
    assert done.nbytes == sum(
        os.path.getsize(tmp_path / "out" / name) for name in os.listdir(tmp_path / "out")
    )
    assert f"{form} → {to}: 14 tensors" in str(done)
    for name, tensor in load_any(folders["trimkv"]).tensors.items():
        assert load_any(tmp_path / "out").tensors[name].bits.tobytes() == tensor.bits.tobytes()
    if to == "trimkv":
        assert read(tmp_path / "out")[0] == config()


def test_written_files_have_ordinary_modes(tmp_path, folders):
    umask = os.umask(0o022)
    try:
        convert(folders["shared"], tmp_path / "out", "trimkv")
    finally:
        os.umask(umask)
    modes = {
        path.name: oct(path.stat().st_mode & 0o777)
        for path in [tmp_path / "out", *(tmp_path / "out").iterdir()]
    }
    assert modes == {"out": "0o755", "config.json": "0o644", "trimkv_weights.pth": "0o644"}


@pytest.mark.parametrize(
    ("to", "options", "says"),
    [
        ("gguf", {}, "cannot convert to 'gguf'; expected one of shared, mlx, torch, trimkv"),
        ("shared", {"bits": 8}, "bits has no effect on the shared form"),
        ("trimkv", {"bits": 8}, "bits has no effect on the trimkv form"),
        ("shared", {"dtype": "float8"}, "dtype is 'float8'"),
        ("shared", {"dtype": ""}, "dtype is ''"),
    ],
)
def test_options_that_cannot_work(tmp_path, folders, to, options, says):
    with pytest.raises(ConfigError, match=says):
        convert(folders["shared"], tmp_path / "out", to, **options)
    assert not (tmp_path / "out").exists()


def test_source_that_is_none(tmp_path, folders):
    (tmp_path / "empty").mkdir()
    for source, says in (("absent", "is not a folder"), ("empty", "holds no retention gates")):
        with pytest.raises(CheckpointError, match=says):
            convert(tmp_path / source, tmp_path / "out", "shared")
    (folders["shared"] / trimkv.WEIGHT_FILE).touch()
    with pytest.raises(CheckpointError, match="keep one form in a folder"):
        detect(folders["shared"])


def test_model_without_config(tmp_path, folders):
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        convert(folders["shared"], tmp_path / "out", "trimkv", model=tmp_path)


@pytest.mark.parametrize("to", FORMS)
def test_destination_in_use_stays_untouched(tmp_path, folders, to):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    for target in (tmp_path / "out", tmp_path / "out" / "mine", folders["shared"]):
        with pytest.raises(ConfigError, match="exists already"):
            convert(folders["shared"], target, to)
    assert (tmp_path / "out" / "mine").read_text() == "precious"
    assert load_any(folders["shared"])


@pytest.mark.parametrize("to", FORMS)
def test_unwritable_destination(tmp_path, folders, to):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot write .*/file/out: File exists: .*/file;"):
        convert(folders["shared"], tmp_path / "file" / "out", to)
    assert_nothing_left(tmp_path, {*FORMS, "file"})


@pytest.mark.parametrize("to", FORMS)
def test_write_that_really_fails_leaves_nothing(tmp_path, folders, to):
    """The kernel refuses to let a file grow beyond 4 KB, as it does when the disk is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(ConfigError, match=r"cannot write .*/out: File too large; it is as it was"):
            convert(folders["shared"], tmp_path / "out", to)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_nothing_left(tmp_path, set(FORMS))


WRITERS = {
    "shared": "mlx_kvret.core.checkpoint.write_tensors",
    "mlx": "mlx_kvret.converters.mlx_form.write_tensors",
    "torch": "mlx_kvret.converters.torch_form.write_tensors",
    "trimkv": "mlx_kvret.converters.trimkv.write_state",
}


@pytest.mark.parametrize("to", FORMS)
@pytest.mark.parametrize(
    ("error", "expected", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), ConfigError, "cannot write .*/out: No space left"),
        (KeyboardInterrupt("ctrl-C"), KeyboardInterrupt, "ctrl-C"),
    ],
)
def test_full_disk_or_ctrl_c_leaves_nothing(tmp_path, folders, monkeypatch, to, error, expected, says):
    def write_half(path, tensors):
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(WRITERS[to], write_half)
    with pytest.raises(expected, match=says):
        convert(folders["shared"], tmp_path / "out", to)
    assert_nothing_left(tmp_path, set(FORMS))


KILLED = """
import sys, time
from pathlib import Path
from mlx_kvret.converters import convert
import mlx_kvret.core.checkpoint as checkpoint

def write_half(path, tensors):
    path.write_bytes(b"half")
    print("writing", flush=True)
    time.sleep(60)

checkpoint.write_tensors = write_half
convert(sys.argv[1], sys.argv[2], "shared")
"""


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_killed_conversion_leaves_no_destination(tmp_path, folders, sent):
    command = [sys.executable, "-c", KILLED, str(folders["mlx"]), str(tmp_path / "out")]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        # a shell's background jobs ignore it, and hand that down
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout.readline() == b"writing\n"
        process.send_signal(sent)
        process.wait(30)
    assert process.returncode
    assert not (tmp_path / "out").exists()
    if sent == signal.SIGINT:
        assert_nothing_left(tmp_path, set(FORMS))
    # what a killed one leaves is hidden, and nobody takes it for gates
    convert(folders["mlx"], tmp_path / "out", "shared")
    assert load_any(tmp_path / "out")


def run(*arguments, **options):
    return CliRunner().invoke(main, ["convert", *map(str, arguments)], **options)


def test_command_line_converts(tmp_path, folders):
    result = run(folders["trimkv"], tmp_path / "out", "--to", "mlx", "--bits", 8, "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("trimkv → mlx: 14 tensors") and "synthetic inputs" in result.stdout
    assert mlx_form.quantization(mlx_form.load_mlx_gates(tmp_path / "out"))


def test_command_line_reads_a_prompt_file(tmp_path):
    options = ("--to", "mlx", "--bits", 8, "--model", demo.MODEL, "--prompt-file", "-")
    result = run(demo.GATES, tmp_path / "out", *options, input="remember Ada amber . recall Ada")
    assert result.exit_code == 0, result.output
    assert f"7 tokens, scope global (a prompt in {demo.MODEL})" in result.stdout
    result = run(demo.GATES, tmp_path / "again", *options, input=b"\xff\xfe")
    assert result.exit_code == 1 and "UTF-8" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("{shared}", "{shared}", "--to", "mlx"), "exists already"),
        (("{shared}", "{out}", "--to", "shared", "--bits", "8"), "bits has no effect"),
        (("{shared}", "{out}", "--to", "mlx", "--bits", "4"), "bits is 4; expected 8"),
        (("{absent}", "{out}", "--to", "mlx"), "there is no folder"),
    ],
)
def test_command_line_errors_are_one_line(tmp_path, folders, arguments, says):
    places = {"shared": folders["shared"], "out": tmp_path / "out", "absent": tmp_path / "absent"}
    result = run(*(argument.format(**places) for argument in arguments))
    assert result.exit_code == 1 and result.stdout == ""
    assert says in result.stderr and result.stderr.count("\n") == 1


def test_help_shows_examples_and_every_form():
    result = run("--help")
    assert result.exit_code == 0 and "mlx-kvret convert" in result.output
    (to,) = (option for option in command.params if option.name == "to")
    assert tuple(to.type.choices) == FORMS
