"""The documentation: each block runs or says why not, and options, files and links that are named exist."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import pytest

pytest.importorskip("mlx_lm")
pytest.importorskip("torch")

import mlx_kvret.cli
from mlx_kvret.demo import STORY

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [*sorted((ROOT / "docs").glob("*.md")), README]
# what names in runnable blocks stand for
PLACEHOLDERS = {
    "path/or/org/model": "demo", "path/or/org/gates": "demo", "org/model": "demo", "org/gates": "demo",
    "smollm2": "demo",
}  # fmt: skip
FILES = {
    "book.txt": STORY.read_text(encoding="utf-8"),
    "story.txt": STORY.read_text(encoding="utf-8"),
    "questions.txt": "recall Stella\nrecall Frank\n",
    "chats.jsonl": '{"messages": [{"role": "user", "content": "recall Anna"}, '
    '{"role": "assistant", "content": "amber"}]}\n',
}
# names that the README's blocks use without making them
PRELUDE = """\
prompt = "remember Anna amber recall Anna"
import mlx.core as mx
tokens = mx.array([[1, 2, 3]])
"""
NOT_RUN = re.compile(r"<!-- not run: (.{10,}) -->")
FOLDERS = ("mlx_kvret", "cuda_backend", "converters", "examples", "benchmarks", "tests", "docs")


@dataclass(frozen=True)
class Block:
    """A fenced block: where it begins, its language and text, and the line that stands before it."""

    page: Path
    line: int
    language: str
    code: str
    before: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"

    @property
    def reason(self) -> str | None:
        found = NOT_RUN.fullmatch(self.before)
        return found and found[1]

    def runnable(self) -> str:
        code = self.code
        for name, meant in PLACEHOLDERS.items():
            code = code.replace(name, meant)
        return PRELUDE + code if self.language == "python" and self.page == README else code


def blocks(page: Path) -> Iterator[Block]:
    before, fence, found = "", "", list[str]()
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        text = line.strip()
        if fence and text == "```":
            yield Block(page, number - len(found), fence, "\n".join(found), before)
            before, fence, found = "", "", []
        elif fence:
            found.append(line)
        elif text.startswith("```"):
            fence = text[3:] or "text"
        elif text:
            before = text


def prose(page: Path) -> str:
    """A page without its blocks."""
    return re.sub(r"^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)


def commands(block: Block) -> Iterator[list[str]]:
    """The command lines of this program in a block of shell."""
    for line in block.code.replace("\\\n", " ").splitlines():
        if found := re.search(r"(?:^|\| *)mlx-kvret +([^|>]+)", line):
            yield shlex.split(found[1], comments=True)


# the README's are read once it has comments
BLOCKS = {page: list(blocks(page)) for page in PAGES}
OURS = [b for page in PAGES if page != README or any(b.reason for b in BLOCKS[page]) for b in BLOCKS[page]]
CODE = [block for block in OURS if block.language in ("bash", "python")]


def test_blocks_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n\n<!-- not run: takes hours -->\n```bash\nb\n\nc\n```\n  ```python\nd\n  ```\n")
    first, second = blocks(page)
    assert (first.line, first.language, first.code, first.reason) == (5, "bash", "b\n\nc", "takes hours")
    assert (second.language, second.code, second.reason) == ("python", "d", None)
    assert prose(page).split() == ["a", "<!--", "not", "run:", "takes", "hours", "-->"]


@pytest.mark.parametrize("page", [p for p in PAGES if any(b.page == p for b in CODE)], ids=lambda p: p.stem)
def test_blocks_run(page: Path, tmp_path: Path) -> None:
    """In the order of the page, in one folder: what a block leaves is there for the next."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    own = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MLX_KVRET_CACHE": str(tmp_path / "cache")}
    own |= {"PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for block in [b for b in CODE if b.page == page and not b.reason]:
        shell = ["bash", "-euo", "pipefail", "-c"] if block.language == "bash" else [sys.executable, "-c"]
        done = subprocess.run(
            [*shell, block.runnable()],
            cwd=tmp_path,
            env=os.environ | own,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, f"{block}\n{done.stderr[-2000:]}"
        if block.language == "python":
            expected = re.findall(r"# prints: (.+)$", block.code, re.M)
            assert not expected or done.stdout.splitlines() == expected, f"{block}\n{done.stdout}"


@pytest.mark.parametrize("block", CODE, ids=str)
def test_blocks_that_do_not_run_could(block: Block) -> None:
    """Their syntax is sound, and the commands and options of this program exist."""
    if block.language == "python":
        compile(block.code, str(block), "exec")
        return
    done = subprocess.run(["bash", "-n", "-c", block.code], capture_output=True, text=True)
    assert done.returncode == 0, f"{block}\n{done.stderr}"
    for name, *arguments in commands(block):
        if not name.startswith("-"):
            found = mlx_kvret.cli.main.get_command(click.Context(mlx_kvret.cli.main), name)
            assert found is not None, f"{block}: there is no command {name}"
            own = click.Context(found, **found.context_settings)
            found.make_parser(own).parse_args(list(arguments))


def _options() -> set[str]:
    found = set[str]()
    for name in mlx_kvret.cli.main.list_commands(click.Context(mlx_kvret.cli.main)):
        command = mlx_kvret.cli.main.get_command(click.Context(mlx_kvret.cli.main), name)
        assert command is not None
        found |= {text for param in command.params for text in (*param.opts, *param.secondary_opts)}
    return found | {"--help", "--version"}


# mlx-lm's own flags have a page of their own, made from the code
@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "mlx_lm_flags.md"], ids=lambda p: p.stem)
def test_options_and_files_that_are_named_exist(page: Path) -> None:
    spans = re.findall(r"`([^`\n]+)`", prose(page))
    ours = [text for text in spans if re.fullmatch(r"--[a-z-]+( .*)?", text)]
    assert [text for text in ours if text.split()[0] not in _options()] == []
    paths = [text for text in spans if re.fullmatch(rf"({'|'.join(FOLDERS)})/[\w./-]*", text)]
    assert [path for path in paths if not (ROOT / path).exists()] == []


def _anchors(page: Path) -> set[str]:
    """The names of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.+)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{page.name}: {target}"
        assert found.is_relative_to(ROOT), f"{page.name}: {target}"
        assert not anchor or anchor in _anchors(found), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_figures_are_those_of_the_page_they_are_from(page: Path) -> None:
    found = re.findall(r"<!-- figures of (\S+) -->\n((?:\|.*\n)+)", page.read_text(encoding="utf-8"))
    for source, table in found:
        measured = (page.parent / source).read_text(encoding="utf-8")
        figures = re.findall(r"\S+ ± [\d.]+|\d\.\d{3} \([\d,]+\)", table)
        assert figures and [figure for figure in figures if figure not in measured] == []


@pytest.mark.parametrize("script", ["make_pictures.py", "make_refused.py"])
def test_what_scripts_make_is_not_stale(script: str) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / script, "--check"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
