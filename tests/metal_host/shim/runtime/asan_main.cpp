// The address sanitizer's process: asan_main KERNEL.so JOB. Reads the launch and its buffers from JOB, runs it and
// writes the buffers back. Every buffer is a heap block of its exact size, between red zones.
#include <dlfcn.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "abi.h"

int main(int, char** argument) {
  void* library = dlopen(argument[1], RTLD_NOW);
  void* kernel = library ? dlsym(library, "msl_kernel_entry") : nullptr;
  if (!kernel) return fprintf(stderr, "%s\n", dlerror()), 2;
  FILE* job = fopen(argument[2], "rb+");
  unsigned header[9];  // buffer_count, grid, threadgroup, schedule, poison
  if (!job || fread(header, sizeof header, 1, job) != 1) return 2;
  static msl_launch launch;
  launch.kernel = (msl_kernel)kernel;
  launch.buffer_count = header[0];
  for (int d = 0; d < 3; d++) launch.grid[d] = header[1 + d], launch.threadgroup[d] = header[4 + d];
  launch.schedule = header[7];
  launch.poison = header[8];
  std::vector<msl_buffer> buffers(launch.buffer_count);
  for (auto& b : buffers)
    if (fread(&b.size, sizeof b.size, 1, job) != 1) return 2;
  long start = ftell(job);
  for (auto& b : buffers)
    if (b.data = malloc(b.size); b.size && fread(b.data, b.size, 1, job) != 1) return 2;
  launch.buffers = buffers.data();
  if (msl_run(&launch)) return fprintf(stderr, "metal_host: %s\n", launch.error), _exit(3), 3;
  fseek(job, start, SEEK_SET);
  for (auto& b : buffers) fwrite(b.data, 1, b.size, job);
  fclose(job);
  _exit(0);
}
