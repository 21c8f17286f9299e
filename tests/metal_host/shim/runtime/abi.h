// The contract between a compiled kernel, the runtime that executes it and the Python side (launch.py mirrors Launch).
#pragma once
typedef __SIZE_TYPE__ msl_size;

struct msl_triple {
  alignas(16) unsigned x;
  unsigned y, z;
};

// What a GPU thread may ask about itself; the names are Metal's.
struct msl_attributes {
  msl_triple thread_position_in_grid, thread_position_in_threadgroup, threadgroup_position_in_grid,
      threadgroups_per_grid, threads_per_grid, threads_per_threadgroup, dispatch_threads_per_threadgroup, grid_origin,
      grid_size;
  unsigned thread_index_in_threadgroup, thread_index_in_simdgroup, simdgroup_index_in_threadgroup,
      simdgroups_per_threadgroup, dispatch_simdgroups_per_threadgroup, threads_per_simdgroup, thread_execution_width,
      quadgroup_index_in_threadgroup, quadgroups_per_threadgroup, dispatch_quadgroups_per_threadgroup,
      thread_index_in_quadgroup;
};

// Where in the Metal source a thread waits. Lanes meet only at the same site.
struct msl_site {
  const char *name, *file;
  int line, column;
};

struct msl_buffer {
  const char* name;
  void* data;
  msl_size size;
  unsigned element_size, writable, initialised;
  // Traced launches count bytes: every access / once per threadgroup / once per launch.
  unsigned long long loaded, stored, loaded_per_threadgroup, stored_per_threadgroup, loaded_distinct,
      stored_distinct;
};

typedef void (*msl_kernel)(void** buffers, const msl_attributes* self);
typedef void (*msl_combine)(void* deposits, unsigned lanes);

struct msl_launch {
  msl_kernel kernel;
  msl_buffer* buffers;
  unsigned long long* loaded_by_threadgroup;  // [threadgroups][buffers], may be null; filled by a traced launch
  unsigned buffer_count, grid[3], threadgroup[3];
  unsigned schedule;  // order of simdgroups and lanes: 0 ascending, 1 descending, else a random seed
  unsigned poison;    // byte that fills fresh threadgroup memory
  unsigned traced;    // the kernel was built with memory callbacks
  unsigned threadgroup_memory;                               // bytes, the most that a threadgroup used
  unsigned long long barriers, simdgroup_barriers, simdgroup_ops;
  msl_size fault;     // offset in the kernel's library of the access that failed, else 0
  char error[1024];
};

enum msl_atomic_kind { msl_atomic_load, msl_atomic_store, msl_atomic_update };

extern "C" {
int msl_run(msl_launch*);  // 0, or 1 with `error` set
// For kernels:
void* msl_threadgroup_variable(int id, msl_size size, unsigned element_size, const char* name, int line);
void msl_threadgroup_barrier(unsigned flags, const msl_site*);
void msl_simdgroup_barrier(unsigned flags, const msl_site*);
void msl_simdgroup_op(void* value, unsigned size, msl_combine, const msl_site*);
void msl_atomic_access(const volatile void* address, unsigned size, msl_atomic_kind, void* code_address);
void msl_fail(const char* format, ...);
}
