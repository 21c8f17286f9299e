"""The tables of refused.md, read from the code: models by name, and every refusal in the code's own words.

python docs/make_refused.py            writes refused.md, between its two marks
python docs/make_refused.py --check    only says whether it is what would be written
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = Path(__file__).parent / "refused.md"
BEGIN, END = "<!-- made by docs/make_refused.py -->", "<!-- end -->"
KINDS = {"UnsupportedModelError": "Models", "UnsupportedFeatureError": "Options and calls"}
SIDES = {"mlx_kvret/mlx_backend": "MLX", "cuda_backend": "torch", "mlx_kvret": "both"}


def messages(path: Path) -> Iterator[tuple[str, str]]:
    """The class and the message of each refusal that a file raises or returns; ``…`` is what varies."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in KINDS
            and node.args
        ):
            yield node.func.id, _text(node.args[0])


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) for part in node.values)
    return str(node.value) if isinstance(node, ast.Constant) else "…"


def by_name(path: Path) -> Iterator[tuple[str, str]]:
    """Model types that a backend's hooks refuse by name, and why: their dictionary ``REFUSED``."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and any(
            getattr(name, "id", "") == "REFUSED" for name in node.targets
        ):
            yield from ast.literal_eval(node.value).items()


def side(path: Path) -> str:
    """Which backend a file belongs to."""
    name = path.relative_to(ROOT).as_posix()
    return next(said for folder, said in SIDES.items() if name.startswith(f"{folder}/"))


def tables() -> str:
    """The generated part of the page."""
    folders = (ROOT / "mlx_kvret", ROOT / "cuda_backend")
    files = [path for folder in folders for path in sorted(folder.rglob("*.py"))]
    named = sorted(
        (name, why, side(path)) for path in files if path.name == "hooks.py" for name, why in by_name(path)
    )
    lines = ["### Models by name", "", "| model type | backend | why |", "|---|---|---|"]
    lines += [f"| `{name}` | {backend} | {why} |" for name, why, backend in named]
    found = [(kind, said, side(path)) for path in files for kind, said in messages(path)]
    for kind, title in KINDS.items():
        lines += ["", f"### {title}, in the code's words", "", "| backend | message |", "|---|---|"]
        lines += [
            f"| {backend} | {said.replace('|', '&#124;').replace('<', '&lt;')} |"
            for backend, said in sorted({(where, said) for own, said, where in found if own == kind})
        ]
    return "\n".join(lines)


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    made = f"{before}{BEGIN}\n\n{tables()}\n\n{END}{rest.split(END)[1]}"
    if sys.argv[1:] != ["--check"]:
        PAGE.write_text(made, encoding="utf-8")
    elif page != made:
        sys.exit(f"{PAGE} is stale; run `python docs/make_refused.py`")


if __name__ == "__main__":
    main()
