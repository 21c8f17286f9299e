// One GPU thread = one fiber: a stack of its own that can be left and entered again.
#pragma once
#include <cstddef>

struct Fiber {
  void* stack_pointer = nullptr;  // where it was left
  char* stack = nullptr;
  size_t stack_size = 0;
};
void fiber_prepare(Fiber&, void (*entry)());  // entry must never return
extern "C" void msl_switch(void** leave, void* enter);
inline void fiber_switch(Fiber& from, Fiber& to) { msl_switch(&from.stack_pointer, to.stack_pointer); }
