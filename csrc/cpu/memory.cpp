// What the CPU backend asks of the system about memory: huge pages, which pages are there, and
// whether they can be written.
#include "../kernels.h"
#include "non_temporal.h"

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#endif

namespace lnprune::cpu {
namespace {

constexpr uintptr_t kHugePage = uintptr_t{2} << 20;

#if defined(__linux__)
// Whether the system gives huge pages to those who ask for them.
bool has_huge_pages() {
  std::FILE* file = std::fopen("/sys/kernel/mm/transparent_hugepage/enabled", "r");
  if (file == nullptr) return false;
  char text[64] = {};
  const size_t read = std::fread(text, 1, sizeof(text) - 1, file);
  std::fclose(file);
  return read > 0 && std::strstr(text, "[never]") == nullptr;
}

// Whether the page in the middle of the block has been written or read before.
bool is_there(const void* block, int64_t bytes) {
  const uintptr_t page_bytes = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t middle = reinterpret_cast<uintptr_t>(block) + static_cast<uintptr_t>(bytes) / 2;
  unsigned char there = 0;
  return mincore(reinterpret_cast<void*>(middle / page_bytes * page_bytes), 1, &there) == 0 &&
         (there & 1) != 0;
}
#endif

}  // namespace

bool pays_non_temporal(const void* block, int64_t bytes, int64_t bytes_of_call) {
#if defined(__linux__)
  static const bool huge_pages = has_huge_pages();
  if (bytes_of_call < kNonTemporalBytes) return false;
  const bool gets_huge_pages = huge_pages && bytes >= 2 * static_cast<int64_t>(kHugePage);
  return gets_huge_pages || is_there(block, bytes);
#else
  (void)block;
  (void)bytes;
  return bytes_of_call >= kNonTemporalBytes;
#endif
}

void advise_huge_pages(void* block, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
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
