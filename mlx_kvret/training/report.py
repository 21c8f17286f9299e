"""What a run tells while it goes on: a progress bar and a line in the CSV log for every step."""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass
from pathlib import Path

import click
from tqdm import tqdm

from .log import CsvLog
from .packing import Batch


@dataclass(frozen=True)
class Losses:
    """Means over a batch, losses in nats per token.

    ``soft_size`` is the soft cache size S_t in tokens per head, averaged over tokens; ``soft_share`` the same
    as a share of the full cache.
    """

    loss: float
    kl: float
    cross_entropy: float
    capacity: float
    soft_size: float
    soft_share: float

    @classmethod
    def of(cls, sums: list[float], batch: Batch, over: int, entries: int, capacity_weight: float) -> Losses:
        """From sums over a batch of KL, cross-entropy, the capacity's hinge and the soft size of all heads.

        ``over`` counts the positions the hinge was summed over, ``entries`` is L·H.
        """
        learnt = max(int(batch.learn.sum()), 1)
        kl, ce, hinge = sums[0] / learnt, sums[1] / learnt, sums[2] / max(over, 1)
        return cls(
            loss=(kl + ce) / 2 + capacity_weight * hinge,
            kl=kl,
            cross_entropy=ce,
            capacity=hinge,
            soft_size=sums[3] / (entries * batch.tokens),
            soft_share=sums[3] / (entries * float((batch.position + 1).sum())),
        )

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss)


# seconds between two lines where there is no terminal
EVERY = 30.0


class Report:
    """A bar on a terminal, else a line now and then, and the log; silent in all but the first process."""

    def __init__(self, path: Path, step: int, main: bool):
        self._log = CsvLog(path, step) if main else None
        self._since = self._shown = time.perf_counter()
        self._bar = tqdm(
            total=100.0,
            dynamic_ncols=True,
            disable=None if main else True,
            bar_format="{percentage:5.1f}% |{bar}| {elapsed}<{remaining}{postfix}",
        )

    def step(
        self,
        step: int,
        progress: float,
        losses: Losses,
        learning_rate: float,
        gradient_norm: float,
        batch: Batch,
    ) -> None:
        """Tell of a step; ``progress`` is the share of the run that is done."""
        now = time.perf_counter()
        speed, self._since = batch.tokens / (now - self._since), now
        if self._log is None:
            return
        self._log.write(
            dataclasses.asdict(losses)
            | {
                "step": step,
                "progress": progress,
                "learning_rate": learning_rate,
                "gradient_norm": gradient_norm,
                "tokens": batch.tokens,
                "cut": batch.cut,
                "tokens_per_second": speed,
            }
        )
        line = (
            f"step {step} KL {losses.kl:.3f} CE {losses.cross_entropy:.3f} capacity {losses.capacity:.3f} "
            f"cache {losses.soft_size:.1f} per head ({losses.soft_share:.0%}) {speed:,.0f} tok/s"
        )
        self._bar.n = 100 * progress
        self._bar.set_postfix_str(line)
        if self._bar.disable and (now - self._shown > EVERY or progress >= 1):
            self._shown = now
            click.echo(f"{progress:6.1%} {line}", err=True)

    def warn(self, text: str) -> None:
        """A line of its own, above the bar if there is one."""
        if self._log is not None:
            self._bar.clear()
            click.echo(f"warning: {text}", err=True)

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        if self._log is not None:
            self._log.close()
