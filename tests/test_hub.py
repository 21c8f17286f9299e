"""Names of models and gates: folders, hub ids from the local cache, and what cannot be had."""

import os
import subprocess
import sys

import huggingface_hub
import pytest
from huggingface_hub import constants, errors
from mlx_lm.utils import DEFAULT_ALLOW_PATTERNS

from mlx_kvret import hub
from mlx_kvret.errors import ConfigError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cached(home, name, *files):
    """A repository as huggingface_hub keeps it once downloaded."""
    folder = home / "hub" / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    (folder / "snapshots" / COMMIT).mkdir(parents=True)
    for file in files:
        (folder / "snapshots" / COMMIT / file).write_text("{}")
    return folder / "snapshots" / COMMIT


def resolved(home, name, *options, **environment):
    """What :func:`hub.resolve` does in a process of its own: the hub reads its settings once."""
    code = "import sys; from mlx_kvret.hub import resolve; print(resolve(*sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", code, name, *options],
        env=os.environ | {"HF_HOME": str(home)} | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_folders_come_first(tmp_path, monkeypatch):
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.resolve("org/name") == hub.resolve(hub.Path("org/name")) == hub.Path("org/name")
    assert hub.resolve("~/org") == tmp_path / "org"


@pytest.mark.parametrize(
    "name", ["absent", "./absent", "/absent/folder", "a/b/c", "org/na me", "x" * 300, "a\0b"]
)
def test_neither_folder_nor_hub_id(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"no hub id .* check the path of the gates"):
        hub.resolve(name, "gates")


def test_file_in_place_of_a_folder(tmp_path):
    (tmp_path / "gates.safetensors").touch()
    with pytest.raises(ConfigError, match="is a file; give the folder that holds the gates"):
        hub.resolve(tmp_path / "gates.safetensors", "gates")


@pytest.mark.parametrize(("what", "file"), [("model", "config.json"), ("gates", "trimkv_weights.pth")])
def test_offline_the_cache_is_used(tmp_path, what, file):
    snapshot = cached(tmp_path, "org/name", "config.json", file)
    done = resolved(tmp_path, "org/name", what, HF_HUB_OFFLINE="1")
    assert done.stdout.strip() == str(snapshot), done.stderr


@pytest.mark.parametrize("what", ["model", "gates"])
def test_a_revision_is_that_one_or_none(tmp_path, what):
    """What main has is never taken for another revision."""
    main = cached(tmp_path, "org/name", "config.json")
    other = main.with_name("f" * 40)
    other.mkdir()
    (other / "config.json").write_text("{}")
    (main.parent.parent / "refs" / "v2").write_text("f" * 40)
    for revision, found in (("v2", other), ("f" * 40, other), ("main", main)):
        done = resolved(tmp_path, "org/name", what, revision, HF_HUB_OFFLINE="1")
        assert done.stdout.strip() == str(found), done.stderr
    done = resolved(tmp_path, "org/name", what, "v3", HF_HUB_OFFLINE="1")
    assert done.returncode and "ConfigError: org/name at revision v3 is no local folder" in done.stderr


def test_a_folder_has_no_revision(tmp_path):
    with pytest.raises(ConfigError, match="revision v2 is of a hub repository"):
        hub.resolve(tmp_path, "model", "v2")


@pytest.mark.parametrize("name", [None, 3, b"org/name", ["org/name"]])
def test_what_is_no_name(name):
    with pytest.raises(ConfigError, match=r"the gates is .* expected a folder or a hub id"):
        hub.resolve(name, "gates")


def test_offline_and_not_in_the_cache(tmp_path):
    done = resolved(tmp_path, "org/name", HF_HUB_OFFLINE="1")
    assert done.returncode and "ConfigError: org/name is no local folder" in done.stderr
    assert "offline mode is on and it is not in the cache; unset HF_HUB_OFFLINE" in done.stderr


def test_no_network(tmp_path):
    done = resolved(tmp_path, "org/name", HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="0")
    assert done.returncode and "cannot be downloaded" in done.stderr and "check the network" in done.stderr


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("RepositoryNotFoundError", "no such public repository; check the spelling"),
        ("GatedRepoError", "grants access on request; ask for it there"),
        ("RevisionNotFoundError", "no such revision; give a branch, a tag or a commit"),
        ("RuntimeError", r"cannot be downloaded \(first\); check the network"),
    ],
)
def test_refusals_of_the_hub(monkeypatch, kind, says):
    class Refusal(getattr(errors, kind, RuntimeError)):
        def __init__(self):
            Exception.__init__(self, "first\nsecond")

    def download(name, revision, allow_patterns):
        raise Refusal

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ConfigError, match=says):
        hub.resolve("org/name")


def test_torch_files_are_fetched_for_gates_only(monkeypatch):
    asked = []
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda name, revision, allow_patterns: asked.append(allow_patterns) or name,
    )
    hub.resolve("org/name", "gates")
    hub.resolve("org/name")
    assert ["*.pth" in patterns for patterns in asked] == [True, False]
    hub.resolve("org/name", code=True)
    assert ["*.py" in patterns for patterns in asked] == [False, False, True]


def test_what_mlx_lm_downloaded_is_enough():
    """Offline, the hub refuses a snapshot that lacks files of a pattern that was never fetched."""
    assert set(hub._FILES["model"]) < set(DEFAULT_ALLOW_PATTERNS)
