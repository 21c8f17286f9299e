"""Files from the network: whole, gone on with, or refused."""

import hashlib
import http.server
import threading

import pytest

from mlx_kvret.errors import ConfigError
from mlx_kvret.zoo import store
from mlx_kvret.zoo.fetch import fetch, read_json

CONTENT = bytes(range(256)) * 4096 * 2 + b"end"
HASH = hashlib.sha256(CONTENT).hexdigest()
ADVICE = "ask the neighbour"


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT; the server's ``mode`` says how badly."""

    def do_GET(self):
        start = 0
        wanted = self.headers.get("Range")
        self.server.asked.append(wanted)
        content = b"other" if self.server.mode == "other" else CONTENT
        if wanted and self.server.mode != "no ranges":
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            if start >= len(content):
                self.send_error(416)
                return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        body = content[start:]
        self.wfile.write(body[: len(body) // 2] if self.server.mode == "breaks" else body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.mode, made.asked = "well", []
    made.url = f"http://127.0.0.1:{made.server_port}/file"
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


@pytest.fixture
def target(tmp_path):
    return tmp_path / "new" / "file.whl"


def test_a_file_is_fetched_once(server, target):
    assert fetch(server.url, target, HASH, ADVICE).read_bytes() == CONTENT
    fetch(server.url, target, HASH, ADVICE)
    assert server.asked == [None] and [path.name for path in target.parent.iterdir()] == ["file.whl"]


def test_a_broken_download_goes_on_where_it_stopped(server, target):
    server.mode = "breaks"
    with pytest.raises(
        ConfigError, match=r"cannot be downloaded .* goes on where it stopped, or ask the neigh"
    ):
        fetch(server.url, target, HASH, ADVICE)
    have = target.with_name("file.whl.part").stat().st_size
    assert 0 < have < len(CONTENT) and not target.exists()
    server.mode = "well"
    assert fetch(server.url, target, HASH, ADVICE).read_bytes() == CONTENT
    assert server.asked == [None, f"bytes={have}-"]


def test_all_but_the_last_step_was_done(server, target):
    target.parent.mkdir()
    target.with_name("file.whl.part").write_bytes(CONTENT)
    assert fetch(server.url, target, HASH, ADVICE).read_bytes() == CONTENT


def test_servers_without_ranges_begin_again(server, target):
    target.parent.mkdir()
    target.with_name("file.whl.part").write_bytes(b"half")
    server.mode = "no ranges"
    assert fetch(server.url, target, HASH, ADVICE).read_bytes() == CONTENT


@pytest.mark.parametrize("before", [b"", b"damaged"])
def test_another_file_is_refused_and_not_kept(server, target, before):
    target.parent.mkdir()
    server.mode = "well" if before else "other"
    if before:
        target.with_name("file.whl.part").write_bytes(before)
    with pytest.raises(ConfigError, match=f"its SHA-256 is .*, expected {HASH}"):
        fetch(server.url, target, HASH, ADVICE)
    assert list(target.parent.iterdir()) == []


def test_a_file_that_was_changed_later_is_refused(server, target):
    target.parent.mkdir()
    target.write_bytes(b"changed")
    with pytest.raises(ConfigError, match="another file than expected"):
        fetch(server.url, target, HASH, ADVICE)
    assert target.read_bytes() == b"changed" and not server.asked


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/x", "nonsense", "http://127.0.0.1:99999/x"])
def test_no_network(target, url):
    with pytest.raises(ConfigError, match="cannot be downloaded"):
        fetch(url, target, HASH, ADVICE)
    with pytest.raises(ConfigError, match="check the network, or ask"):
        read_json(url, ADVICE)


def test_an_index_that_is_none(server):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_json(server.url, ADVICE)


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {"MLX_KVRET_CACHE": "/somewhere"}, "/somewhere"),
        ("darwin", {"MLX_KVRET_CACHE": "~/somewhere"}, "/home/me/somewhere"),
        ("linux", {"XDG_CACHE_HOME": "/caches"}, "/caches/mlx-kvret"),
        ("linux", {"XDG_CACHE_HOME": "caches"}, "/home/me/.cache/mlx-kvret"),
        ("linux", {}, "/home/me/.cache/mlx-kvret"),
        ("darwin", {"XDG_CACHE_HOME": "/caches"}, "/home/me/Library/Caches/mlx-kvret"),
    ],
)
def test_where_it_is_kept(monkeypatch, platform, variables, expected):
    for name in ("MLX_KVRET_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (variables | {"HOME": "/home/me"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.platform", platform)
    assert str(store.home()) == expected
