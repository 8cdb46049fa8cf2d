// The ranking order of channels and the selection it implies, for host and device.
//
// NaN first, then the larger norm, then the lower index: what a stable descending sort gives.
#pragma once

#include "lp_norm.h"

namespace lnprune {

using RankingKey = uint64_t;

// Larger key, higher rank. Every NaN has the largest key; -0.0 and 0.0 have the same.
LNPRUNE_FUNCTION RankingKey ranking_key(double norm) {
  constexpr uint64_t kSign = 0x8000000000000000ull;
  if (norm != norm) return ~uint64_t{0};
  const uint64_t bits = bit_cast<uint64_t>(norm + 0.0);
  return (bits & kSign) != 0 ? ~bits : bits | kSign;
}

// How many of the channels that take part are pruned: `count`, or, where that is negative, the
// fraction of them rounded half to even, as Python's round() does.
LNPRUNE_FUNCTION int64_t pruned_channels(int64_t count, double fraction, int64_t participants) {
  const int64_t pruned =
      count >= 0 ? count
                 : static_cast<int64_t>(std::rint(fraction * static_cast<double>(participants)));
  return pruned < participants ? pruned : participants;
}

// Where the ranking is cut: channels above the threshold are kept, and of those on it the first
// `ties` by index.
struct Cut {
  RankingKey threshold;
  int64_t ties;
};

constexpr Cut kKeepNone{~RankingKey{0}, 0};

LNPRUNE_FUNCTION bool is_kept(RankingKey key, Cut cut, int64_t equal_keys_before) {
  // Without branches: which channels are kept is as good as random.
  const bool on_threshold = key == cut.threshold;
  return (key > cut.threshold) | (on_threshold & (equal_keys_before < cut.ties));
}

}  // namespace lnprune
