// Executes a launch: threadgroups one after another, the threads of one as fibers that take turns at barriers and
// simdgroup functions. Meeting points are exact: a barrier that some thread does not reach, or a simdgroup function
// that some lane does not reach, is an error. Built without sanitizers.
#include "scheduler.h"

#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <vector>

msl_launch* launch;
Thread* current;
unsigned threadgroup_index;

namespace {
constexpr unsigned simd_width = 32, most_threads = 1024, most_threadgroup_memory = 32768, deposit_size = 64;
constexpr size_t stack_size = 256 << 10, guard_size = 4096;

struct Simdgroup {
  unsigned lanes;
  // Two sets, used in turn: a fast lane may deposit for its next call before a slow one has fetched its result.
  alignas(64) unsigned char deposits[2][simd_width * deposit_size];
  unsigned turn;
  msl_combine combine;
};

Thread threads[most_threads];
Simdgroup simdgroups[most_threads / simd_width];
unsigned thread_count, simdgroup_count, memory_used;
std::vector<void*> variables;  // threadgroup memory, by number of its declaration
std::vector<void*> arguments;  // addresses of the buffers
Fiber scheduler;
bool failed;
unsigned random_state;

unsigned random_below(unsigned n) {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 17;
  random_state ^= random_state << 5;
  return random_state % n;
}

struct Name {
  char text[128];
  explicit Name(const Thread& t) {
    auto &p = t.self.thread_position_in_threadgroup, &g = t.self.threadgroup_position_in_grid;
    snprintf(text, sizeof text, "thread (%u,%u,%u) [simdgroup %u lane %u] of threadgroup (%u,%u,%u)", p.x, p.y, p.z,
             t.simdgroup, t.lane, g.x, g.y, g.z);
  }
};

struct Whereabouts {
  char text[256];
  explicit Whereabouts(const Thread& t) {
    if (t.state == State::done)
      snprintf(text, sizeof text, "has returned");
    else
      snprintf(text, sizeof text, "waits at %s, %s:%d", t.site.name, t.site.file, t.site.line);
  }
};

void report(const char* format, va_list arguments) {
  if (failed) return;
  failed = true;
  vsnprintf(launch->error, sizeof launch->error, format, arguments);
}
void report(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  report(format, arguments);
  va_end(arguments);
}

void suspend() { fiber_switch(current->fiber, scheduler); }

void resume(Thread& t) {
  current = &t;
  fiber_switch(scheduler, t.fiber);
  current = nullptr;
}

void wait(State state, const msl_site* site, unsigned flags) {
  current->state = state;
  current->site = *site;
  current->flags = flags;
  suspend();
}

void thread_main() {
  launch->kernel(arguments.data(), &current->self);
  current->state = State::done;
  for (;;) suspend();
}

bool same_text(const char* a, const char* b) { return a == b || !strcmp(a, b); }

bool same_site(const Thread& a, const Thread& b) {
  return a.state == b.state && a.site.line == b.site.line && a.site.column == b.site.column &&
         same_text(a.site.name, b.site.name) && same_text(a.site.file, b.site.file);
}

// No lane of the simdgroup can run. Lets them go on if all wait at one simdgroup function or barrier.
bool release_simdgroup(unsigned index) {
  Simdgroup& group = simdgroups[index];
  Thread* lanes = threads + index * simd_width;
  Thread* first = nullptr;
  for (unsigned i = 0; i < group.lanes; i++)
    if (lanes[i].state == State::at_simdgroup_op || lanes[i].state == State::at_simdgroup_barrier) {
      first = &lanes[i];
      break;
    }
  if (!first) return false;
  for (unsigned i = 0; i < group.lanes; i++)
    if (!same_site(lanes[i], *first)) {
      report("%s at %s:%d is not reached by all lanes: lane %u waits there, lane %u %s; %s", first->site.name,
             first->site.file, first->site.line, first->lane, i, Whereabouts(lanes[i]).text, Name(*first).text);
      return false;
    }
  if (first->state == State::at_simdgroup_op) {
    launch->simdgroup_ops++;
    group.combine(group.deposits[group.turn], group.lanes);
    group.turn ^= 1;
  } else {
    launch->simdgroup_barriers++;
    if (launch->traced) trace_simdgroup_barrier(index, first->flags);
  }
  for (unsigned i = 0; i < group.lanes; i++) lanes[i].state = State::ready;
  return !failed;
}

void run_simdgroup(unsigned index) {
  unsigned n = simdgroups[index].lanes;
  do
    for (unsigned i = 0; i < n && !failed; i++) {
      Thread& t = threads[index * simd_width + (launch->schedule == 1 ? n - 1 - i : i)];
      if (t.state == State::ready) resume(t);
    }
  while (!failed && release_simdgroup(index));
}

// All threads wait at a threadgroup_barrier or are done. False when all are done or a barrier is not reached by all.
bool release_threadgroup() {
  Thread *waiting = nullptr, *elsewhere = nullptr;
  for (unsigned i = 0; i < thread_count; i++)
    if (threads[i].state == State::at_barrier && !waiting) waiting = &threads[i];
  if (!waiting) return false;
  for (unsigned i = 0; i < thread_count; i++)
    if (!same_site(threads[i], *waiting)) elsewhere = &threads[i];
  if (elsewhere) {
    report("threadgroup_barrier at %s:%d is not reached by all threads: %s waits there, %s %s", waiting->site.file,
           waiting->site.line, Name(*waiting).text, Name(*elsewhere).text, Whereabouts(*elsewhere).text);
    return false;
  }
  launch->barriers++;
  if (launch->traced) trace_barrier(waiting->flags);
  for (unsigned i = 0; i < thread_count; i++) threads[i].state = State::ready;
  return true;
}

void run_threadgroup() {
  unsigned order[most_threads / simd_width];
  std::iota(order, order + simdgroup_count, 0u);
  do {
    if (launch->schedule == 1) std::reverse(order, order + simdgroup_count);
    for (unsigned i = simdgroup_count; launch->schedule > 1 && i > 1; i--) std::swap(order[i - 1], order[random_below(i)]);
    for (unsigned i = 0; i < simdgroup_count && !failed; i++) run_simdgroup(order[i]);
    if (launch->schedule == 1) std::reverse(order, order + simdgroup_count);
  } while (!failed && release_threadgroup());
}

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
        for (unsigned i = 0; i < simdgroup_count; i++)
          simdgroups[i].lanes = std::min(simd_width, thread_count - i * simd_width);
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

void fail(void* code_address, const char* format, ...) {
  Dl_info module;
  if (!failed && dladdr(code_address, &module)) launch->fault = (char*)code_address - (char*)module.dli_fbase;
  va_list arguments;
  va_start(arguments, format);
  report(format, arguments);
  va_end(arguments);
  while (current) suspend();
}

void msl_fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  report(format, arguments);
  va_end(arguments);
  while (current) suspend();  // a failed thread is never resumed
}

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

void msl_threadgroup_barrier(unsigned flags, const msl_site* site) { wait(State::at_barrier, site, flags); }
void msl_simdgroup_barrier(unsigned flags, const msl_site* site) { wait(State::at_simdgroup_barrier, site, flags); }

void msl_simdgroup_op(void* value, unsigned size, msl_combine combine, const msl_site* site) {
  Simdgroup& group = simdgroups[current->simdgroup];
  if (size > deposit_size) return msl_fail("%s of a value of %u bytes; the emulator allows %u", site->name, size, deposit_size);
  void* deposit = group.deposits[group.turn] + current->lane * size;
  // Lanes that are at another call would overwrite each other here; release_simdgroup reports them before it matters.
  memcpy(deposit, value, size);
  group.combine = combine;
  wait(State::at_simdgroup_op, site, 0);
  memcpy(value, deposit, size);
}

int msl_run(msl_launch* l) {
  launch = l;
  failed = false;
  random_state = l->schedule * 2654435761u | 1;
  arguments.clear();
  if (l->traced) trace_launch_begins();
  for (unsigned i = 0; i < l->buffer_count; i++) arguments.push_back(l->buffers[i].data);
  run_grid();
  forget_variables();
  if (l->traced) trace_launch_ends();
  return failed;
}
