// Fibers: flows of control, each on a stack of its own, that go on where they were when switched
// to.
//
// On x86-64 and aarch64 a switch is a few instructions. Elsewhere, and under AddressSanitizer,
// which has to know of every stack, it is swapcontext(), a system call each time.
#pragma once

#include <cstddef>
#include <cstdint>

#if (defined(__x86_64__) || defined(__aarch64__)) && !defined(__SANITIZE_ADDRESS__)
#define LNPRUNE_SWITCHES_IN_ASSEMBLY 1
#else
#include <ucontext.h>
#endif

namespace lnprune::emulation {

#if defined(LNPRUNE_SWITCHES_IN_ASSEMBLY)

// Saves what a call preserves on the stack and its top in `*from`; goes on with the stack whose top
// is `to`.
extern "C" __attribute__((visibility("hidden"))) void lnprune_switch_stacks(void** from, void* to);

class Context {
 public:
  // The first switch to this context calls `entry`, which must not return, on the stack.
  void start(char* stack, size_t bytes, void (*entry)()) {
    auto* top =
        reinterpret_cast<uintptr_t*>((reinterpret_cast<uintptr_t>(stack) + bytes) / 16 * 16);
    top -= kSaved;
    for (int i = 0; i < kSaved; ++i) top[i] = 0;
    top[kReturnAddress] = reinterpret_cast<uintptr_t>(entry);
    top_ = top;
  }

  void switch_to(Context& other) { lnprune_switch_stacks(&top_, other.top_); }

 private:
#if defined(__x86_64__)
  // Six registers, the return address, and the place of entry's own, which aligns its frame.
  static constexpr int kSaved = 8;
  static constexpr int kReturnAddress = 6;
#else
  static constexpr int kSaved = 20;
  static constexpr int kReturnAddress = 11;
#endif

  void* top_ = nullptr;
};

#if defined(__x86_64__)
asm(R"(
  .text
  .globl lnprune_switch_stacks
  .hidden lnprune_switch_stacks
  .type lnprune_switch_stacks, @function
lnprune_switch_stacks:
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
  .size lnprune_switch_stacks, .-lnprune_switch_stacks
)");
#else
asm(R"(
  .text
  .globl lnprune_switch_stacks
  .hidden lnprune_switch_stacks
  .type lnprune_switch_stacks, %function
lnprune_switch_stacks:
  stp x19, x20, [sp, #-160]!
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
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  ldp x19, x20, [sp], #160
  ret
  .size lnprune_switch_stacks, .-lnprune_switch_stacks
)");
#endif

#else

class Context {
 public:
  void start(char* stack, size_t bytes, void (*entry)()) {
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack;
    context_.uc_stack.ss_size = bytes;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
  }

  void switch_to(Context& other) { swapcontext(&context_, &other.context_); }

 private:
  ucontext_t context_;
};

#endif

}  // namespace lnprune::emulation
