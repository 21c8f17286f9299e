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
#elif defined(__aarch64__)
asm(R"(
.text
.globl msl_switch
.type msl_switch,@function
msl_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size msl_switch, .-msl_switch
)");

void fiber_prepare(Fiber& fiber, void (*entry)()) {
  auto frame = (void**)(fiber.stack + fiber.stack_size - 160);
  for (int i = 0; i < 20; i++) frame[i] = nullptr;
  frame[11] = (void*)entry;  // x30, the link register
  fiber.stack_pointer = frame;
}
#else
#error "metal_host switches fibers on x86-64 and 64-bit Arm only"
#endif
