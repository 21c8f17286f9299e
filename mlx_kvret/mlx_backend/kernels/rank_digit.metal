// The digit in which the last wanted candidate lies: the prefix grows by it, and those above are no longer wanted.
// One threadgroup per group; a thread has E bins, the first thread the highest.
constexpr int E = (1 << BITS) / (S * 32);
const uint self = thread_index_in_threadgroup;
const uint lane = thread_index_in_simdgroup;
const uint warp = simdgroup_index_in_threadgroup;
const int group = int(threadgroup_position_in_grid.x);
const uint wanted = uint(state[group * 3 + 1]);
const size_t top = (size_t(group + 1) << BITS) - 1;

threadgroup uint tg_counts[S];
uint mine = 0;
for (int i = 0; i < E; i++) mine += histogram[top - (self * E + i)];
uint above = simd_prefix_exclusive_sum(mine);
if (lane == 31) tg_counts[warp] = above + mine;
threadgroup_barrier(mem_flags::mem_threadgroup);
for (uint s = 0; s < warp; s++) above += tg_counts[s];

if (above < wanted && wanted <= above + mine) {
  for (int i = 0; i < E; i++) {
    const uint found = histogram[top - (self * E + i)];
    if (wanted <= above + found) {
      next[group * 3] = state[group * 3] | ulong((1u << BITS) - 1 - (self * E + i)) << SHIFT;
      next[group * 3 + 1] = wanted - above;
      next[group * 3 + 2] = found;
      break;
    }
    above += found;
  }
}
