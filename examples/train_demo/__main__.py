"""Train the demo model and rewrite it in mlx_kvret/demo, with its story: ``python examples/train_demo``.

Gates for it come from ``python examples/reproduce.py --shipped-model --ship``.
"""

from __future__ import annotations

import argparse

import torch
from package import write_model, write_story
from train_model import train_model

from mlx_kvret.demo import MODEL, STORY
from mlx_kvret.demo.language import story

STORY_SEED = 1


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    write_model(MODEL, train_model(options.seed))
    write_story(STORY, story(4096, seed=STORY_SEED))
    print(f"wrote {MODEL} and {STORY}")


if __name__ == "__main__":
    main()
