"""What learned eviction is worth: tasks, policies side by side, budgets × lengths, reports.

>>> from mlx_kvret.evaluation import Grid, Results, markdown, open_bench, parse_methods, run_grid
>>> methods = parse_methods(["full", "learned", "recent"])
>>> bench = open_bench("demo", methods)
>>> grid = Grid(("facts",), (1024,), ("1/16", "1/64"), tuple(methods), samples=20)
>>> print(markdown(run_grid(grid, bench.engines, bench.gates, Results({}))))

Scripts that score plain text take :func:`evaluate_text`, see :mod:`.text`.
"""

from .bench import Bench, open_bench
from .engine import Engine, Outcome, PublicEngine
from .methods import Method, level, parse_method, parse_methods
from .report import Gain, entries, gains, losses, markdown, summary
from .results import Cell, Results, open_results, read_results
from .runner import Grid, run_grid
from .samples import Question, Sample, Turn
from .tasks import make_samples
from .text import evaluate_text, text_pieces

__all__ = [
    "Bench",
    "Cell",
    "Engine",
    "Gain",
    "Grid",
    "Method",
    "Outcome",
    "PublicEngine",
    "Question",
    "Results",
    "Sample",
    "Turn",
    "entries",
    "evaluate_text",
    "gains",
    "level",
    "losses",
    "make_samples",
    "markdown",
    "open_bench",
    "open_results",
    "parse_method",
    "parse_methods",
    "read_results",
    "run_grid",
    "summary",
    "text_pieces",
]
