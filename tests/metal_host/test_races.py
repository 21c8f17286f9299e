"""The race detector against the definition of a race, on random programs.

A program is a table: in step s thread t does nothing, loads, stores or adds atomically at some address; a
barrier of some kind follows each step. Two accesses race if threads differ, the address is one, not both
load, not both are atomic, and no barrier between their steps orders that memory for both threads.
"""

from itertools import product

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metal_host import EMULATED, KernelError, installed
from metal_host.emulator import Mode, executing

pytestmark = pytest.mark.skipif(not EMULATED, reason="the GPU doesn't report races")

THREADS, GROUPS, STEPS, ADDRESSES = 40, 2, 4, 5  # two simdgroups, the second one partly filled
LOAD, STORE, ADD, LOAD_ATOMIC = 1, 2, 3, 4
NOTHING, THREADGROUP, SIMDGROUP = 0, 1, 2  # barriers
SOURCE = """
threadgroup uint local[ADDRESSES];
const uint t = thread_position_in_grid.x;
uint sink = 0;
if (thread_index_in_threadgroup < ADDRESSES) local[thread_index_in_threadgroup] = 0;
threadgroup_barrier(mem_flags::mem_threadgroup);
for (int s = 0; s < STEPS; s++) {
  const int what = action[s * THREADS * GROUPS + t], at = address[s * THREADS * GROUPS + t];
  if (IN_DEVICE) {
    if (what == 1) sink += memory[at];
    if (what == 2) memory[at] = uint(s);
    if (what == 3) atomic_fetch_add_explicit((device atomic_uint*)&memory[at], 1u, memory_order_relaxed);
    if (what == 4) sink += atomic_load_explicit((device atomic_uint*)&memory[at], memory_order_relaxed);
  } else {
    if (what == 1) sink += local[at];
    if (what == 2) local[at] = uint(s);
    if (what == 3) atomic_fetch_add_explicit((threadgroup atomic_uint*)&local[at], 1u, memory_order_relaxed);
    if (what == 4) sink += atomic_load_explicit((threadgroup atomic_uint*)&local[at], memory_order_relaxed);
  }
  const int kind = barrier[2 * s], flags = barrier[2 * s + 1];
  if (kind == 1 && flags == 0) threadgroup_barrier(mem_flags::mem_none);
  if (kind == 1 && flags == 1) threadgroup_barrier(mem_flags::mem_device);
  if (kind == 1 && flags == 2) threadgroup_barrier(mem_flags::mem_threadgroup);
  if (kind == 1 && flags == 3) threadgroup_barrier(mem_flags::mem_device | mem_flags::mem_threadgroup);
  if (kind == 2 && flags == 0) simdgroup_barrier(mem_flags::mem_none);
  if (kind == 2 && flags == 1) simdgroup_barrier(mem_flags::mem_device);
  if (kind == 2 && flags == 2) simdgroup_barrier(mem_flags::mem_threadgroup);
  if (kind == 2 && flags == 3) simdgroup_barrier(mem_flags::mem_device | mem_flags::mem_threadgroup);
}
out[t] = sink;
"""


def has_race(actions, barriers, in_device):
    """actions: {(step, thread of the grid): (what, address)}; barriers: [(kind, flags)] after each step."""
    bit = 1 if in_device else 2
    for ((s1, t1), (what1, at1)), ((s2, t2), (what2, at2)) in product(actions.items(), repeat=2):
        if t1 == t2 or s1 > s2 or at1 != at2:
            continue
        if {what1, what2} <= {LOAD, LOAD_ATOMIC} or {what1, what2} <= {ADD, LOAD_ATOMIC}:
            continue
        group1, group2 = t1 // THREADS, t2 // THREADS
        if group1 != group2:
            if in_device:
                return True
            continue
        together = t1 % THREADS // 32 == t2 % THREADS // 32
        between = [kind for kind, flags in barriers[s1:s2] if flags & bit]
        if THREADGROUP not in between and not (together and SIMDGROUP in between):
            return True
    return False


def reported_race(actions, barriers, in_device, schedule):
    with installed():
        kernel = mx.fast.metal_kernel(
            name="program",
            input_names=["action", "address", "barrier"],
            output_names=["memory", "out"],
            source=SOURCE,
        )
    what, where = (np.zeros((STEPS, THREADS * GROUPS), np.int32) for _ in range(2))
    for (step, thread), (kind, at) in actions.items():
        what[step, thread], where[step, thread] = kind, at
    names = {
        "ADDRESSES": ADDRESSES,
        "STEPS": STEPS,
        "THREADS": THREADS,
        "GROUPS": GROUPS,
        "IN_DEVICE": in_device,
    }
    try:
        with executing(Mode("tsan", schedule)):
            kernel(
                inputs=[mx.array(what), mx.array(where), mx.array(np.array(barriers, np.int32))],
                output_shapes=[(ADDRESSES,), (THREADS * GROUPS,)],
                output_dtypes=[mx.uint32, mx.uint32],
                grid=(THREADS * GROUPS, 1, 1),
                threadgroup=(THREADS, 1, 1),
                template=list(names.items()),
                init_value=0,
            )
    except KernelError as error:
        assert "race on" in str(error)
        return True
    return False


SOME_THREADS = [0, 1, 31, 32, 39, THREADS, THREADS + 32]
PROGRAMS = st.dictionaries(
    st.tuples(st.integers(0, STEPS - 1), st.sampled_from(SOME_THREADS)),
    st.tuples(st.sampled_from([LOAD, STORE, ADD, LOAD_ATOMIC]), st.integers(0, 1)),
    max_size=7,
)
BARRIERS = st.lists(
    st.tuples(st.sampled_from([NOTHING, THREADGROUP, SIMDGROUP]), st.integers(0, 3)),
    min_size=STEPS,
    max_size=STEPS,
)


@settings(max_examples=300, deadline=None)
@given(PROGRAMS, BARRIERS, st.booleans(), st.integers(0, 3))
def test_reports_exactly_the_races(actions, barriers, in_device, schedule):
    assert reported_race(actions, barriers, in_device, schedule) == has_race(actions, barriers, in_device)


def test_both_answers_occur():
    store, load = {(0, 0): (STORE, 0)}, {(1, 32): (LOAD, 0)}
    apart = [(NOTHING, 0)] * STEPS
    ordered = [(THREADGROUP, 2), *apart[1:]]
    assert reported_race(store | load, apart, False, 0)
    assert not reported_race(store | load, ordered, False, 0)
