// Executes a launch: its threadgroups one after another, with what each thread may know of its place, and the memory
// that a threadgroup shares.
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "scheduler.h"

msl_launch* launch;
unsigned threadgroup_index;

namespace {
constexpr unsigned most_threadgroup_memory = 32768;
constexpr size_t stack_size = 256 << 10, guard_size = 4096;

std::vector<void*> arguments;  // addresses of the buffers
std::vector<void*> variables;  // threadgroup memory, by number of its declaration
unsigned memory_used;

bool give_stacks() {
  if (threads[0].fiber.stack) return true;
  size_t each = stack_size + guard_size;
  auto memory = (char*)mmap(nullptr, each * most_threads, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return false;
  for (unsigned i = 0; i < most_threads; i++) {
    mprotect(memory + i * each, guard_size, PROT_NONE);
    threads[i].fiber.stack = memory + i * each + guard_size;
    threads[i].fiber.stack_size = stack_size;
  }
  return true;
}

void forget_variables() {
  for (void* v : variables) free(v);
  variables.clear();
  memory_used = 0;
}

void prepare_thread(unsigned i, const msl_triple& group, const msl_triple& groups, const msl_triple& size,
                    const msl_triple& full) {
  Thread& t = threads[i];
  unsigned whole = full.x * full.y * full.z;
  t.index = i;
  t.simdgroup = i / simd_width;
  t.lane = i % simd_width;
  t.state = State::ready;
  t.site = {"start", "", 0, 0};
  msl_attributes& a = t.self;
  a.grid_origin = {0, 0, 0};
  a.threads_per_grid = a.grid_size = {launch->grid[0], launch->grid[1], launch->grid[2]};
  a.threadgroup_position_in_grid = group;
  a.threadgroups_per_grid = groups;
  a.threads_per_threadgroup = size;
  a.dispatch_threads_per_threadgroup = full;
  auto& p = a.thread_position_in_threadgroup = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
  a.thread_position_in_grid = {group.x * full.x + p.x, group.y * full.y + p.y, group.z * full.z + p.z};
  a.thread_index_in_threadgroup = i;
  a.thread_index_in_simdgroup = t.lane;
  a.simdgroup_index_in_threadgroup = t.simdgroup;
  a.simdgroups_per_threadgroup = simdgroup_count;
  a.dispatch_simdgroups_per_threadgroup = (whole + simd_width - 1) / simd_width;
  a.threads_per_simdgroup = a.thread_execution_width = simd_width;
  a.quadgroup_index_in_threadgroup = i / 4;
  a.quadgroups_per_threadgroup = (thread_count + 3) / 4;
  a.dispatch_quadgroups_per_threadgroup = (whole + 3) / 4;
  a.thread_index_in_quadgroup = i % 4;
  fiber_prepare(t.fiber, thread_main);
}

void run_grid() {
  // Like MLX: the threadgroup is no larger than the grid; like Metal: threadgroups at the edge are smaller.
  unsigned full[3], groups[3];
  for (int d = 0; d < 3; d++) {
    full[d] = std::min(launch->threadgroup[d], launch->grid[d]);
    if (!full[d]) return report("the grid or the threadgroup is empty");
    groups[d] = (launch->grid[d] + full[d] - 1) / full[d];
  }
  size_t whole = (size_t)full[0] * full[1] * full[2];
  if (whole > most_threads) return report("a threadgroup of %zu threads; Metal allows %u", whole, most_threads);
  if (!give_stacks()) return report("no memory for the stacks of %u threads", most_threads);
  threadgroup_index = 0;
  for (unsigned z = 0; z < groups[2]; z++)
    for (unsigned y = 0; y < groups[1]; y++)
      for (unsigned x = 0; x < groups[0]; x++, threadgroup_index++) {
        unsigned at[3] = {x, y, z}, size[3];
        for (int d = 0; d < 3; d++) size[d] = std::min(full[d], launch->grid[d] - at[d] * full[d]);
        thread_count = size[0] * size[1] * size[2];
        simdgroup_count = (thread_count + simd_width - 1) / simd_width;
        for (unsigned i = 0; i < thread_count; i++)
          prepare_thread(i, {x, y, z}, {groups[0], groups[1], groups[2]}, {size[0], size[1], size[2]},
                         {full[0], full[1], full[2]});
        if (launch->traced) trace_threadgroup_begins();
        run_threadgroup();
        forget_variables();
        if (failed) return;
      }
}
}  // namespace

void** launch_arguments() { return arguments.data(); }

void* msl_threadgroup_variable(int id, msl_size size, unsigned element_size, const char* name, int line) {
  if ((size_t)id >= variables.size()) variables.resize(id + 1);
  void*& data = variables[id];
  if (data) return data;
  memory_used += (size + 15) / 16 * 16;
  launch->threadgroup_memory = std::max(launch->threadgroup_memory, memory_used);
  if (memory_used > most_threadgroup_memory)
    msl_fail("%u bytes of threadgroup memory, the limit is %u (%s, line %d)", memory_used, most_threadgroup_memory, name,
             line);
  data = malloc(size);  // one allocation each, so that the address sanitizer sees the end of every variable
  memset(data, launch->poison, size);
  if (launch->traced) trace_threadgroup_variable(name, data, size, element_size);
  return data;
}

int msl_run(msl_launch* l) {
  launch = l;
  failed = false;
  random_state = l->schedule;
  arguments.clear();
  if (l->traced) trace_launch_begins();
  for (unsigned i = 0; i < l->buffer_count; i++) arguments.push_back(l->buffers[i].data);
  run_grid();
  forget_variables();
  if (l->traced) trace_launch_ends();
  return failed;
}
