// What grid.cpp, scheduler.cpp and trace.cpp share. None of them is built with a sanitizer.
#pragma once
#include "abi.h"
#include "fiber.h"

enum class State { ready, at_simdgroup_op, at_simdgroup_barrier, at_barrier, done };
// The memories that a barrier can order; the bits of mem_flags are 1 << Memory.
enum Memory { in_device, in_threadgroup };

struct Thread {
  Fiber fiber;
  State state;
  msl_site site;
  unsigned flags;  // of the barrier it waits at
  unsigned index, simdgroup, lane;
  msl_attributes self;
};

constexpr unsigned simd_width = 32, most_threads = 1024;

// grid.cpp
extern msl_launch* launch;
extern unsigned threadgroup_index;  // in order of execution
void** launch_arguments();

// scheduler.cpp
extern Thread threads[most_threads];
extern Thread* current;  // null while the scheduler itself runs
extern unsigned thread_count, simdgroup_count;  // of this threadgroup
extern bool failed;
extern unsigned random_state;  // of the schedule
void thread_main();      // what a fiber executes
void run_threadgroup();  // all threads ready
void report(const char* format, ...);                    // the first report of a launch stays
void fail(void* code_address, const char* format, ...);  // from a kernel thread: does not return

// trace.cpp
void trace_launch_begins();
void trace_launch_ends();
void trace_threadgroup_begins();
void trace_threadgroup_variable(const char* name, void* data, size_t size, unsigned element_size);
void trace_barrier(unsigned flags);
void trace_simdgroup_barrier(unsigned simdgroup, unsigned flags);
