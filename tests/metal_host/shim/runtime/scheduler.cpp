// Runs one threadgroup: its threads are fibers that take turns at barriers and simdgroup functions. Meeting points are
// exact: a barrier that some thread does not reach, or a simdgroup function that some lane does not reach, is an error.
#include "scheduler.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <numeric>

Thread threads[most_threads];
Thread* current;
unsigned thread_count, simdgroup_count;
bool failed;
unsigned random_state;

namespace {
constexpr unsigned deposit_size = 64;

struct Simdgroup {
  // Two sets, used in turn: a fast lane may deposit for its next call before a slow one has fetched its result.
  alignas(64) unsigned char deposits[2][simd_width * deposit_size];
  unsigned turn;
  msl_combine combine;
};

Simdgroup simdgroups[most_threads / simd_width];
Fiber scheduler;

unsigned lanes_of(unsigned simdgroup) { return std::min(simd_width, thread_count - simdgroup * simd_width); }

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

bool same_text(const char* a, const char* b) { return a == b || !strcmp(a, b); }

bool same_site(const Thread& a, const Thread& b) {
  return a.state == b.state && a.site.line == b.site.line && a.site.column == b.site.column &&
         same_text(a.site.name, b.site.name) && same_text(a.site.file, b.site.file);
}

// No lane of the simdgroup can run. Lets them go on if all wait at one simdgroup function or barrier.
bool release_simdgroup(unsigned index) {
  Simdgroup& group = simdgroups[index];
  unsigned n = lanes_of(index);
  Thread* lanes = threads + index * simd_width;
  Thread* first = nullptr;
  for (unsigned i = 0; i < n; i++)
    if (lanes[i].state == State::at_simdgroup_op || lanes[i].state == State::at_simdgroup_barrier) {
      first = &lanes[i];
      break;
    }
  if (!first) return false;
  for (unsigned i = 0; i < n; i++)
    if (!same_site(lanes[i], *first)) {
      report("%s at %s:%d is not reached by all lanes: lane %u waits there, lane %u %s; %s", first->site.name,
             first->site.file, first->site.line, first->lane, i, Whereabouts(lanes[i]).text, Name(*first).text);
      return false;
    }
  if (first->state == State::at_simdgroup_op) {
    launch->simdgroup_ops++;
    group.combine(group.deposits[group.turn], n);
    group.turn ^= 1;
  } else {
    launch->simdgroup_barriers++;
    if (launch->traced) trace_simdgroup_barrier(index, first->flags);
  }
  for (unsigned i = 0; i < n; i++) lanes[i].state = State::ready;
  return !failed;
}

void run_simdgroup(unsigned index) {
  unsigned n = lanes_of(index);
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

unsigned random_below(unsigned n) {
  random_state = random_state * 1664525 + 1013904223;
  return (random_state >> 8) % n;
}

void choose_order(unsigned* order) {
  std::iota(order, order + simdgroup_count, 0u);
  if (launch->schedule == 1) std::reverse(order, order + simdgroup_count);
  if (launch->schedule > 1)
    for (unsigned i = simdgroup_count; i > 1; i--) std::swap(order[i - 1], order[random_below(i)]);
}
}  // namespace

void run_threadgroup() {
  unsigned order[most_threads / simd_width];
  do {
    choose_order(order);
    for (unsigned i = 0; i < simdgroup_count && !failed; i++) run_simdgroup(order[i]);
  } while (!failed && release_threadgroup());
}

void thread_main() {
  launch->kernel(launch_arguments(), &current->self);
  current->state = State::done;
  for (;;) suspend();
}

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

void msl_threadgroup_barrier(unsigned flags, const msl_site* site) { wait(State::at_barrier, site, flags); }
void msl_simdgroup_barrier(unsigned flags, const msl_site* site) { wait(State::at_simdgroup_barrier, site, flags); }

void msl_simdgroup_op(void* value, unsigned size, msl_combine combine, const msl_site* site) {
  Simdgroup& group = simdgroups[current->simdgroup];
  if (size > deposit_size) return msl_fail("%s of %u bytes; the emulator allows %u", site->name, size, deposit_size);
  void* deposit = group.deposits[group.turn] + current->lane * size;
  // Lanes that are at another call would overwrite each other here; release_simdgroup reports them before it matters.
  memcpy(deposit, value, size);
  group.combine = combine;
  wait(State::at_simdgroup_op, site, 0);
  memcpy(value, deposit, size);
}
