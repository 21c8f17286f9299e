"""Give the demo model eyes and rewrite them in mlx_kvret/demo: ``python examples/train_vision``.

Gates for it come from ``python examples/vision.py --ship``.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from align import STEPS, align
from model import new_model
from package import write_model, write_sample

from mlx_kvret.demo import VISION_MODEL, VISION_SAMPLE


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS, help="of alignment, a fifteenth of a second each")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    model = new_model()
    right = align(model, np.random.default_rng(options.seed), options.steps)
    write_model(VISION_MODEL, model.eval())
    write_sample(VISION_SAMPLE)
    print(f"wrote {VISION_MODEL} and {VISION_SAMPLE}; {right:.1%} of the last cells read right")


if __name__ == "__main__":
    main()
