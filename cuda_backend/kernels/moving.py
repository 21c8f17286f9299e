# mypy: allow-untyped-defs
"""Moving entries in Triton: from the newest tokens into the pool's holes, beside its twin in plain torch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens"])
def fill_kernel(
    p_key, p_value, p_slots, p_keep, p_pool_key, p_pool_value, tokens,
    key_row, key_head, key_place, value_row, value_head, value_place, heads,
    KEY: tl.constexpr, VALUE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Move one newcomer into its slot, if it survived: nothing is read or written for the others."""
    place = tl.program_id(0)
    if tl.load(p_keep + place):
        token, head = place % tokens, (place // tokens) % heads
        row = place // tokens // heads
        slot = tl.load(p_slots + place).to(tl.int64)
        column = tl.arange(0, BLOCK)
        b_key = tl.load(
            p_key + row * key_row + head * key_head + token * key_place + column, mask=column < KEY
        )
        b_value = tl.load(
            p_value + row * value_row + head * value_head + token * value_place + column, mask=column < VALUE
        )
        tl.store(p_pool_key + slot * KEY + column, b_key, mask=column < KEY)
        tl.store(p_pool_value + slot * VALUE + column, b_value, mask=column < VALUE)


def fill(
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    keep: torch.Tensor,
    pool_keys: torch.Tensor,
    pool_values: torch.Tensor,
) -> None:
    """Survivors ``keep`` (R·H·T,) of newest tokens (R, H, T, D) move into their ``slots`` (R·H·T,)."""
    _, heads, tokens, key_dim = keys.shape
    value_dim = values.shape[-1]
    fill_kernel[(len(slots),)](
        keys, values, slots, keep, pool_keys, pool_values, tokens,
        *keys.stride()[:3], *values.stride()[:3], heads,
        KEY=key_dim, VALUE=value_dim, BLOCK=triton.next_power_of_2(max(key_dim, value_dim)),
    )  # fmt: skip


def naive_fill(
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    keep: torch.Tensor,
    pool_keys: torch.Tensor,
    pool_values: torch.Tensor,
) -> None:
    """The specification of :func:`fill`."""
    pool_keys[slots[keep]] = keys.flatten(0, 2)[keep]
    pool_values[slots[keep]] = values.flatten(0, 2)[keep]
