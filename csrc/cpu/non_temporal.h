// Non-temporal stores, and when they pay: they write whole cache lines to memory, without reading
// them first and without a place in the caches.
#pragma once

#include <cstdint>
#include <cstring>

#include "../lp_norm.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace lnprune::cpu {

constexpr int64_t kCacheLine = 64;

// Bytes of a line that stand before the first whole one, at most `bytes`.
inline int64_t bytes_to_line(const void* address, int64_t bytes) {
  const int64_t beyond = static_cast<int64_t>(reinterpret_cast<uintptr_t>(address) % kCacheLine);
  const int64_t head = beyond == 0 ? 0 : kCacheLine - beyond;
  return head < bytes ? head : bytes;
}

// memset to zero, by non-temporal stores for whole lines where the processor has them.
inline void zero_non_temporal(void* to, int64_t bytes) {
#if defined(__SSE2__)
  char* out = static_cast<char*>(to);
  const int64_t head = bytes_to_line(out, bytes);
  const int64_t lines = (bytes - head) / kCacheLine;
  std::memset(out, 0, head);
  __m128i* places = reinterpret_cast<__m128i*>(out + head);
  for (int64_t i = 0; i < 4 * lines; ++i) _mm_stream_si128(places + i, _mm_setzero_si128());
  const int64_t written = head + lines * kCacheLine;
  std::memset(out + written, 0, bytes - written);
#else
  std::memset(to, 0, bytes);
#endif
}

// After it, other threads see the non-temporal stores no later than any store that follows.
inline void finish_non_temporal() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// A call that stores this many bytes or more would displace from the caches what it has just
// stored.
constexpr int64_t kNonTemporalBytes = int64_t{16} << 20;

// Whether non-temporal stores pay in a block of memory, which a call overwrites that stores so many
// bytes in all: where the pages of the block are there already, or come as huge ones. Small pages
// that are not there yet are zeroed by the system first, which brings them into the caches.
bool pays_non_temporal(const void* block, int64_t bytes, int64_t bytes_of_call);

}  // namespace lnprune::cpu
