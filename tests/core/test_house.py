"""How the modules stand to each other: no circles, backends apart, short files that say what they are."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("mlx_kvret", "cuda_backend", "converters")
MOST_LINES, USUAL_LINES = 400, 200


def _name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    inside = () if parts[0] == "mlx_kvret" else ("mlx_kvret",)
    return ".".join((*inside, *(parts[:-1] if parts[-1] == "__init__" else parts)))


FILES = {_name(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}


def imported(name: str) -> set[str]:
    """Modules of the house that a module imports anywhere in its file, for types alone too."""
    path, found = FILES[name], set[str]()
    package = name.split(".") if path.stem == "__init__" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            members = {f"{module}.{alias.name}" for alias in node.names}
            found |= {member if member in FILES else module for member in members}
    return found & FILES.keys() - {name}


GRAPH = {name: imported(name) for name in FILES}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Names that are left when those that import nothing of the rest are taken away, again and again."""
    left = dict(graph)
    while leaves := [name for name, targets in left.items() if not targets & left.keys()]:
        for name in leaves:
            del left[name]
    while ends := [name for name in left if not any(name in targets for targets in left.values())]:
        for name in ends:
            del left[name]
    return sorted(left)


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set(), "e": {"a"}}) == ["b", "c"]


def test_no_circles():
    assert circle(GRAPH) == []


@pytest.mark.parametrize(
    ("room", "stranger"),
    [
        ("mlx_kvret.mlx_backend", "mlx_kvret.cuda_backend"),
        ("mlx_kvret.cuda_backend", "mlx_kvret.mlx_backend"),
        ("mlx_kvret.core", "mlx_kvret.mlx_backend"),
        ("mlx_kvret.core", "mlx_kvret.cuda_backend"),
        ("mlx_kvret.core", "mlx_kvret.converters"),
    ],
)
def test_rooms_that_do_not_know_each_other(room, stranger):
    inside = {name for name in FILES if f"{name}.".startswith(f"{room}.")}
    met = {(name, seen) for name in inside for seen in GRAPH[name] if f"{seen}.".startswith(f"{stranger}.")}
    assert inside and not met


def test_the_backends_have_the_same_rooms():
    ours, theirs = (
        {path.stem for path in folder.glob("*.py")}
        for folder in (ROOT / "mlx_kvret" / "mlx_backend", ROOT / "cuda_backend")
    )
    shared = {
        "api",
        "attachment",
        "attaching",
        "attention",
        "bounded",
        "cache",
        "forward",
        "gates",
        "generation",
    }
    shared |= {"hooks", "hosts", "loading", "loops", "memory", "pool", "probe", "recent", "rope", "sampling"}
    shared |= {"selection", "snapshots", "view"}
    assert shared <= ours & theirs


@pytest.mark.parametrize("name", FILES)
def test_files_are_short_and_say_what_they_are_for(name):
    text = FILES[name].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES
    assert (ast.get_docstring(ast.parse(text)) or "").splitlines()[0]


def test_most_files_are_shorter():
    lengths = sorted(len(path.read_text(encoding="utf-8").splitlines()) for path in FILES.values())
    assert lengths[len(lengths) // 2] <= USUAL_LINES
