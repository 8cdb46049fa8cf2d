// Stores past the caches: a line that is overwritten whole need not be read first. And when they
// pay.
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

// memset to zero, whole lines past the caches where the processor has such stores.
inline void zero_past_caches(void* to, int64_t bytes) {
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

// So that other threads see the stores past the caches no later than what follows them.
inline void finish_past_caches() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// From this many bytes of stores in a call on, what is stored would push itself out of the caches.
constexpr int64_t kPastCachesBytes = int64_t{16} << 20;

// Whether stores past the caches pay in a block that a call of so many bytes of stores overwrites:
// where its pages are there already, or come as huge ones. Small pages that are not there yet are
// zeroed by the system, into the caches.
bool pays_past_caches(const void* block, int64_t bytes, int64_t bytes_of_call);

}  // namespace lnprune::cpu
