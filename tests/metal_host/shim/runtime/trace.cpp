// Memory callbacks of kernels compiled with clang's -fsanitize=thread. ThreadSanitizer's own runtime knows neither GPU
// barriers nor more than 255 threads; this one does. For every access it checks that it lies inside a buffer, a
// threadgroup variable or the thread's stack, that no other thread's conflicting access is unordered with it, and
// counts the bytes.
//
// Order, as Metal gives it: a threadgroup_barrier orders all threads of the threadgroup, a simdgroup_barrier those of
// the simdgroup, both only for the memories named in mem_flags. Nothing orders threadgroups of one launch.
#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "scheduler.h"

namespace {
typedef unsigned long long u64;
constexpr size_t guard = 64 << 20;  // unmapped bytes on both sides of a buffer, so that no overrun meets a neighbour
constexpr unsigned threads_per_threadgroup = 1024, simdgroups = 32;

enum Spread : unsigned char { one_thread, one_simdgroup, several_simdgroups };
enum Kind { load, store, atomic_load, atomic_store, atomic_update, kinds };
const char* const kind_names[kinds] = {"load", "store", "atomic load", "atomic store", "atomic update"};
bool is_atomic(int kind) { return kind >= atomic_load; }
bool reads(int kind) { return kind != store && kind != atomic_store; }
bool writes(int kind) { return kind != load && kind != atomic_load; }
bool conflicting(int a, int b) { return (writes(a) || writes(b)) && !(is_atomic(a) && is_atomic(b)); }

// The latest accesses of one kind to a granule, as far as a later access can still conflict with them.
struct Access {
  unsigned thread;  // threadgroup * 1024 + index + 1; 0: none
  unsigned epoch, simdgroup_epoch;
  Spread spread;
  bool other_threadgroups;
};
struct Cell {
  Access of[kinds];
  bool written;
};
struct Count {
  unsigned loaded_in, stored_in;  // the last threadgroup + 1 that did
};
struct Region {
  const char* name;
  char* begin;
  size_t size;
  unsigned shift;  // log2 of the granule's bytes
  Memory memory;
  int buffer;  // -1: a threadgroup variable
  Cell* cells; // null for inputs, which no one may write
  Count* counts;
};
std::vector<Region> regions;
std::vector<void*> originals;
unsigned epochs[2], simdgroup_epochs[simdgroups][2];

unsigned me() { return threadgroup_index * threads_per_threadgroup + current->index + 1; }
unsigned group_of(unsigned thread) { return (thread - 1) / threads_per_threadgroup; }
unsigned simdgroup_of(unsigned thread) { return (thread - 1) % threads_per_threadgroup / 32; }

bool ordered(const Access& a, Memory memory) {
  if (!a.thread) return true;
  if (a.other_threadgroups || group_of(a.thread) != threadgroup_index) return false;
  if (a.epoch != epochs[memory] || (a.thread == me() && a.spread == one_thread)) return true;
  return a.spread != several_simdgroups && simdgroup_of(a.thread) == current->simdgroup &&
         a.simdgroup_epoch != simdgroup_epochs[current->simdgroup][memory];
}

void remember(Access& a, Memory memory) {
  Access fresh{me(), epochs[memory], simdgroup_epochs[current->simdgroup][memory], one_thread, a.other_threadgroups};
  if (a.thread && group_of(a.thread) != threadgroup_index)
    fresh.other_threadgroups = true;
  else if (a.thread && a.epoch == fresh.epoch) {
    if (a.spread == several_simdgroups || simdgroup_of(a.thread) != current->simdgroup)
      fresh.spread = several_simdgroups;
    else if (a.simdgroup_epoch == fresh.simdgroup_epoch)  // older ones of this simdgroup are ordered with what follows
      fresh.spread = a.thread == fresh.thread ? a.spread : one_simdgroup;
  }
  a = fresh;
}

[[gnu::noinline]] void race(const Region& r, size_t offset, Kind kind, Kind other, const Access& a, void* pc) {
  fail(pc,
       "race on %s, byte %zu: %s by thread %u of threadgroup %u and %s by %sthread %u of threadgroup %u, with no "
       "barrier between them that orders %s memory",
       r.name, offset, kind_names[kind], current->index, threadgroup_index, kind_names[other],
       a.spread == one_thread && !a.other_threadgroups ? "" : "several threads, the last is ",
       (a.thread - 1) % threads_per_threadgroup, group_of(a.thread), r.memory == in_device ? "device" : "threadgroup");
}

void check(const Region& r, size_t granule, Kind kind, void* pc) {
  Cell& c = r.cells[granule];
  if (reads(kind) && !c.written)
    return fail(pc, "%s of %s, byte %zu, which no one has written", kind_names[kind], r.name, granule << r.shift);
  for (int other = 0; other < kinds; other++)
    if (conflicting(kind, other) && !ordered(c.of[other], r.memory))
      return race(r, granule << r.shift, kind, (Kind)other, c.of[other], pc);
  c.written = true;
  remember(c.of[kind], r.memory);
}

void count(const Region& r, size_t first, size_t last, size_t bytes, bool stores) {
  msl_buffer& b = launch->buffers[r.buffer];
  unsigned now = threadgroup_index + 1;
  if (!stores && launch->loaded_by_threadgroup)
    launch->loaded_by_threadgroup[(size_t)threadgroup_index * launch->buffer_count + r.buffer] += bytes;
  (stores ? b.stored : b.loaded) += bytes;
  for (size_t i = first; i <= last; i++) {
    unsigned& seen = stores ? r.counts[i].stored_in : r.counts[i].loaded_in;
    if (seen == now) continue;
    size_t granule = std::min(size_t(1) << r.shift, r.size - (i << r.shift));
    if (!seen) (stores ? b.stored_distinct : b.loaded_distinct) += granule;
    (stores ? b.stored_per_threadgroup : b.loaded_per_threadgroup) += granule;
    seen = now;
  }
}

Region* find(const char* address) {
  static size_t last;
  if (last < regions.size() && (size_t)(address - regions[last].begin) < regions[last].size) return &regions[last];
  for (last = 0; last < regions.size(); last++)
    if ((size_t)(address - regions[last].begin) < regions[last].size) return &regions[last];
  return nullptr;
}

[[gnu::noinline]] void stray(const char* address, size_t size, Kind kind, void* pc) {
  Dl_info module;
  if (kind == load && dladdr(address, &module)) return;  // a constant table of the kernel's library
  const Region* near = nullptr;
  for (auto& r : regions)
    if (address + guard > r.begin && address < r.begin + r.size + guard && (!near || r.buffer >= 0)) near = &r;
  if (near)
    fail(pc, "%s of %zu bytes outside %s: at byte %td of %zu", kind_names[kind], size, near->name, address - near->begin,
         near->size);
  else
    fail(pc, "%s of %zu bytes at %p, in no buffer and no threadgroup variable", kind_names[kind], size, address);
}

void access(const volatile void* at, size_t size, Kind kind, void* pc) {
  auto address = (const char*)at;
  if (!current || !size) return;
  if ((size_t)(address - current->fiber.stack) < current->fiber.stack_size) return;
  Region* r = find(address);
  if (!r || (size_t)(address - r->begin) + size > r->size) return stray(address, size, kind, pc);
  size_t first = (address - r->begin) >> r->shift, last = (address - r->begin + size - 1) >> r->shift;
  if (writes(kind) && !r->cells) return fail(pc, "%s to the input %s", kind_names[kind], r->name);
  if (r->cells)
    for (size_t i = first; i <= last; i++) check(*r, i, kind, pc);
  if (r->buffer < 0) return;
  if (reads(kind)) count(*r, first, last, size, false);
  if (writes(kind)) count(*r, first, last, size, true);
}

void add_region(const char* name, void* data, size_t size, unsigned element_size, Memory memory, int buffer, bool writable, bool written) {
  // A granule of 2 bytes tells neighbouring halves apart, even those inside a float; inputs can't race.
  unsigned shift = element_size == 1 ? 0 : writable || element_size == 2 ? 1 : 2;
  size_t granules = (size >> shift) + 1;
  regions.push_back({name, (char*)data, size, shift, memory, buffer,
                     writable ? (Cell*)calloc(granules, sizeof(Cell)) : nullptr,
                     buffer >= 0 ? (Count*)calloc(granules, sizeof(Count)) : nullptr});
  for (size_t i = 0; writable && written && i < granules; i++) regions.back().cells[i].written = true;
}
void drop_regions(size_t keep) {
  for (size_t i = keep; i < regions.size(); i++) free(regions[i].cells), free(regions[i].counts);
  regions.resize(keep);
}
size_t whole_pages(size_t size) { return (size + 4095) / 4096 * 4096 + 4096; }
}  // namespace

void trace_launch_begins() {
  originals.clear();
  epochs[in_device] = epochs[in_threadgroup] = 0;
  for (unsigned i = 0; i < launch->buffer_count; i++) {
    msl_buffer& b = launch->buffers[i];
    auto room = (char*)mmap(nullptr, whole_pages(b.size) + 2 * guard, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    mprotect(room + guard, whole_pages(b.size), PROT_READ | PROT_WRITE);
    originals.push_back(b.data);
    b.data = memcpy(room + guard, b.data, b.size);
    add_region(b.name, b.data, b.size, b.element_size, in_device, i, b.writable, b.initialised);
  }
}

void trace_launch_ends() {
  for (unsigned i = 0; i < launch->buffer_count; i++) {
    msl_buffer& b = launch->buffers[i];
    if (b.writable) memcpy(originals[i], b.data, b.size);
    munmap((char*)b.data - guard, whole_pages(b.size) + 2 * guard);
    b.data = originals[i];
  }
  drop_regions(0);
}

void trace_threadgroup_begins() {
  drop_regions(launch->buffer_count);
  epochs[in_device]++, epochs[in_threadgroup]++;
}
void trace_threadgroup_variable(const char* name, void* data, size_t size, unsigned element_size) {
  add_region(name, data, size, element_size, in_threadgroup, -1, true, false);
}
void trace_barrier(unsigned flags) {
  for (auto memory : {in_device, in_threadgroup}) epochs[memory] += flags >> memory & 1;
}
void trace_simdgroup_barrier(unsigned simdgroup, unsigned flags) {
  for (auto memory : {in_device, in_threadgroup}) simdgroup_epochs[simdgroup][memory] += flags >> memory & 1;
}

void msl_atomic_access(const volatile void* address, unsigned size, msl_atomic_kind kind, void* code_address) {
  access(address, size, Kind(atomic_load + kind), code_address);
}

#define CALLBACKS(size)                                                                                             \
  void __tsan_read##size(void* p) { access(p, size, load, __builtin_return_address(0)); }                           \
  void __tsan_write##size(void* p) { access(p, size, store, __builtin_return_address(0)); }                         \
  void __tsan_unaligned_read##size(void* p) { access(p, size, load, __builtin_return_address(0)); }                 \
  void __tsan_unaligned_write##size(void* p) { access(p, size, store, __builtin_return_address(0)); }
extern "C" {
CALLBACKS(1) CALLBACKS(2) CALLBACKS(4) CALLBACKS(8) CALLBACKS(16)
void __tsan_init() {}
void* __tsan_memcpy(void* to, const void* from, size_t n) {
  access(from, n, load, __builtin_return_address(0));
  access(to, n, store, __builtin_return_address(0));
  return memcpy(to, from, n);
}
void* __tsan_memmove(void* to, const void* from, size_t n) {
  access(from, n, load, __builtin_return_address(0));
  access(to, n, store, __builtin_return_address(0));
  return memmove(to, from, n);
}
void* __tsan_memset(void* to, int value, size_t n) {
  access(to, n, store, __builtin_return_address(0));
  return memset(to, value, n);
}
}
