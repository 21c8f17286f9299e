"""``python -m mlx_kvret COMMAND``: the command line, for launchers that want the interpreter."""

from mlx_kvret.cli import main

main(prog_name="mlx-kvret")
