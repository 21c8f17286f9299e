#include "fiber.h"

#if defined(__x86_64__)
// Callee-saved registers of the System V ABI; the kernel's floating-point control word is never changed.
asm(R"(
.text
.globl msl_switch
.type msl_switch,@function
msl_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size msl_switch, .-msl_switch
)");

void fiber_prepare(Fiber& fiber, void (*entry)()) {
  auto top = (void**)(fiber.stack + fiber.stack_size);
  *--top = nullptr;  // the return address of entry, which also aligns the stack as after a call
  *--top = (void*)entry;
  for (int saved = 0; saved < 6; saved++) *--top = nullptr;
  fiber.stack_pointer = top;
}
#else
#error "metal_host switches fibers on x86-64 only"
#endif
