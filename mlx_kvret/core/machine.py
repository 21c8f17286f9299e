"""Whether a cache fits into the memory of the machine, told before anything is allocated."""

from __future__ import annotations

from pathlib import Path

from ..errors import ConfigError
from .budget import CacheShape, tokens_within
from .config import EvictionConfig


def free_host_bytes() -> int | None:
    """Free memory of this machine; None where it cannot be told."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), None)


def check_fits(shape: CacheShape, config: EvictionConfig, free: int | None) -> None:
    """Refuse a budget whose full cache is larger than ``free`` bytes; None where that cannot be told.

    A cache grows with what it reads, so one that is too large would fail late, after all the work.

    Raises:
        ConfigError: with the largest budget that fits.
    """
    if free is None or config.policy == "full":
        return
    needed = shape.held_by(config)
    if needed <= free:
        return
    try:
        most = tokens_within(free, shape, None, config.kv_bits)
        advice = f"at most a budget of {most:,} fits, with a buffer of an eighth"
    except ConfigError:
        advice = "no budget fits"
    raise ConfigError(
        f"a budget of {config.budget:,} tokens per head and a buffer of {config.buffer:,} take "
        f"{needed / 1e9:,.1f} GB once full, and {free / 1e9:,.1f} GB are free; {advice}"
    )
