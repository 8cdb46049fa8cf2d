// What the CPU backend asks of the system about memory: huge pages, and whether it can be written.
#include "../kernels.h"

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#endif

namespace lnprune::cpu {

void advise_huge_pages(void* block, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
  const uintptr_t address = reinterpret_cast<uintptr_t>(block);
  const uintptr_t begin = (address + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t end = (address + bytes) & ~(kHugePage - 1);
  // Advice only: where it is refused the block is as usable as before.
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)block;
  (void)bytes;
#endif
}

size_t first_unwritable(void* const* blocks, size_t count) {
#if defined(__linux__)
  const uintptr_t page_bytes = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  uintptr_t known_page = 0;
  for (size_t i = 0; i < count; ++i) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(blocks[i]);
    if (address / page_bytes == known_page) continue;
    // The kernel makes an atomic OR of a word with 0: where a store would be a fault, this is an
    // error code. It changes nothing, whatever other threads write meanwhile, and wakes nobody.
    uint32_t waited_for_by_none = 0;
    const uintptr_t word = address / sizeof(uint32_t) * sizeof(uint32_t);
    const long result = syscall(SYS_futex, &waited_for_by_none, FUTEX_WAKE_OP_PRIVATE, 0, nullptr,
                                word, FUTEX_OP(FUTEX_OP_OR, 0, FUTEX_OP_CMP_EQ, 0));
    if (result < 0 && errno == EFAULT) return i;
    known_page = address / page_bytes;
  }
#else
  (void)blocks;
#endif
  return count;
}

}  // namespace lnprune::cpu
