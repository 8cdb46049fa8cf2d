// The select step of one block: the cut of a ranking by histograms of its keys, and keep flags.
#pragma once

#include "../kernels.h"
#include "../topk.h"
#include "language.h"

namespace lnprune::cuda {
namespace {

// Stands for a channel that takes no part: no norm has this key.
constexpr RankingKey kNoKey = 0;

// Keys that are left are held by the threads once they fit: from then on no pass reads memory.
enum class Channels { of_one_tile, any };

// A block of kCount threads. Together they hold a tile of keys: kKeys each, neighbouring channels
// in neighbouring threads. A histogram has 2^kBits buckets.
template <int kCount, int kKeys, int kBits, Channels kChannels>
struct SelectBlock {
  static constexpr int64_t kTile = kCount * kKeys;
  static constexpr int kWarps = kCount / kWarp;
  static constexpr int kBuckets = 1 << kBits;
  static constexpr int kBucketsPerThread = kBuckets / kCount;
  static constexpr int kRounds =
      (64 + kBits - 1) / kBits;  // histograms that tell a key from all others
  // Keys that may move closer together after a histogram, where the channels are more than a tile.
  static constexpr unsigned kSurvivors = kChannels == Channels::any ? 4096 : 1;
  static_assert(kSurvivors <= kTile, "a tile holds them");
  static_assert(kBuckets % kCount == 0, "every thread adds up as many buckets");

  using Keys = RankingKey[kKeys];
  using Count = std::conditional_t<kChannels == Channels::any, int64_t, int>;

  // What the threads tell each other.
  struct Shared {
    Count counts[kWarps];
    RankingKey low[kWarps];
    RankingKey high[kWarps];
    Count above;  // keys in higher buckets
    int bucket;
    unsigned survivors;
    int ranking;  // of the item's
  };

  const SelectItem& item;  // as the launch put it there: none of it takes a register
  unsigned* buckets;       // [kBuckets], shared
  RankingKey* survivors;   // [kSurvivors], shared; of channels of one tile, none
  Shared* shared;

  // Writes the keep flags of one tile; the blocks of a ranking find the same cut, each by itself.
  // Every thread of the block calls it.
  __device__ __forceinline__ void write_flags_of(int64_t tile) const {
    Keys keys;
    RankingKey low = 0;
    RankingKey high = 0;
    const Count participants = survey(keys, &low, &high);
    const Count kept =
        participants - static_cast<Count>(pruned_channels(item.count, item.fraction, participants));
    Count equal = 0;
    const Cut cut = kept > 0 ? find_cut(keys, low, high, kept, &equal) : kKeepNone;

    if (tiles() > 1) load_tile(tile, keys);
    unsigned flags = 0;
    unsigned on_cut = 0;
#pragma unroll
    for (int k = 0; k < kKeys; ++k) {
      flags |= static_cast<unsigned>(is_kept(keys[k], cut, 0)) << k;
      on_cut |= static_cast<unsigned>(keys[k] == cut.threshold) << k;
    }
    // Only where some of the keys on the cut stay and others do not does their order matter.
    if (cut.ties > 0 && cut.ties < equal) {
      Count before_row = on_cut_before(tile, cut.threshold);
#pragma unroll 1
      for (int k = 0; k < kKeys; ++k) {
        Count in_row = 0;
        const Count before = before_row + sum_before(on_cut >> k & 1, &in_row);
        if ((on_cut >> k & 1) != 0 && !is_kept(cut.threshold, cut, before)) flags &= ~(1u << k);
        before_row += in_row;
      }
    }
    const int left = channels_left(tile);
    bool* keep = item.keep + ranked_before() + first_channel(tile);
#pragma unroll
    for (int k = 0; k < kKeys; ++k) {
      if (k * kCount < left) store(keep + k * kCount, (flags >> k & 1) != 0);
    }
  }

 private:
  static __device__ __forceinline__ int64_t first_channel(int64_t tile) {
    return tile * kTile + threadIdx.x;
  }

  // From a thread's first channel of a tile to the end of the tile or of all channels.
  __device__ __forceinline__ int channels_left(int64_t tile) const {
    const int64_t left = item.channels - first_channel(tile);
    return static_cast<int>(left < kTile ? left : kTile);
  }

  __device__ __forceinline__ int64_t tiles() const {
    if (kChannels == Channels::of_one_tile || item.channels <= kTile) return 1;
    return (item.channels + kTile - 1) / kTile;
  }

  // Norms of other blocks of this launch where they are of one tile, of an earlier launch else.
  static __device__ __forceinline__ double load_norm(const double* address) {
    return kChannels == Channels::of_one_tile ? load_from_other_blocks(address)
                                              : load_cached(address);
  }

  // Channels of the rankings before this one.
  __device__ __forceinline__ int64_t ranked_before() const {
    return shared->ranking * item.channels;
  }

  // All of a thread's norms are under way before the first is needed.
  __device__ __forceinline__ void load_tile(int64_t tile, Keys& keys) const {
    const int left = channels_left(tile);
    const double* norms = item.norms + ranked_before() + first_channel(tile);
    double values[kKeys];
#pragma unroll
    for (int k = 0; k < kKeys; ++k)
      values[k] = k * kCount < left ? load_norm(norms + k * kCount) : 0;
#pragma unroll
    for (int k = 0; k < kKeys; ++k) keys[k] = k * kCount < left ? ranking_key(values[k]) : kNoKey;
    if (item.mask_counts == nullptr) return;
    // Fewer at a time: the keys are in registers already.
    constexpr int kAtOnce = kKeys / 2;
    const double* counts = item.mask_counts + ranked_before() + first_channel(tile);
#pragma unroll
    for (int start = 0; start < kKeys; start += kAtOnce) {
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const int at = (start + k) * kCount;
        values[k] = at < left ? load_norm(counts + at) : 0;
      }
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        if (values[k] == 0) keys[start + k] = kNoKey;
      }
    }
  }

  // The sum of `value` over the threads before this one, and over all of them in `total`.
  __device__ __forceinline__ Count sum_before(Count value, Count* total) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
    Count sum = value;
#pragma unroll
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const Count before = __shfl_up_sync(kAllLanes, sum, distance);
      if (lane >= distance) sum += before;
    }
    __syncthreads();
    if (lane == kWarp - 1) shared->counts[warp] = sum;
    __syncthreads();
    Count before = sum - value;
    Count all = 0;
#pragma unroll 1
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) before += shared->counts[w];
      all += shared->counts[w];
    }
    *total = all;
    return before;
  }

  // The channels that take part, and the least and the largest of their keys, for every thread.
  // Leaves the last tile in `keys`.
  __device__ __forceinline__ Count survey(Keys& keys, RankingKey* low, RankingKey* high) const {
    Count count = 0;
    RankingKey least = ~RankingKey{0};
    RankingKey most = 0;
#pragma unroll 1
    for (int64_t tile = 0; tile < tiles(); ++tile) {
      load_tile(tile, keys);
#pragma unroll
      for (int k = 0; k < kKeys; ++k) {
        if (keys[k] == kNoKey) continue;
        ++count;
        least = keys[k] < least ? keys[k] : least;
        most = keys[k] > most ? keys[k] : most;
      }
    }
#pragma unroll
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const RankingKey other_least = __shfl_xor_sync(kAllLanes, least, distance);
      const RankingKey other_most = __shfl_xor_sync(kAllLanes, most, distance);
      least = other_least < least ? other_least : least;
      most = other_most > most ? other_most : most;
    }
    if (threadIdx.x % kWarp == 0) {
      shared->low[threadIdx.x / kWarp] = least;
      shared->high[threadIdx.x / kWarp] = most;
    }
    Count participants = 0;
    sum_before(count, &participants);
#pragma unroll 1
    for (int w = 0; w < kWarps; ++w) {
      least = shared->low[w] < least ? shared->low[w] : least;
      most = shared->high[w] > most ? shared->high[w] : most;
    }
    *low = least;
    *high = most;
    return participants;
  }

  // The cut that keeps the `kept` largest keys, at least one; `equal` is how many lie on it.
  // Each round tells kBits more of it. Where another stream overwrites the norms meanwhile, the cut
  // is of no use, but it is found in as many rounds.
  __device__ __forceinline__ Cut find_cut(Keys& keys, RankingKey low, RankingKey high, Count kept,
                                          Count* equal) const {
    bool held = tiles() == 1;
    Count within = 0;
    if (threadIdx.x == 0) shared->survivors = 0;
#pragma unroll 1
    for (int round = 0; round < kRounds; ++round) {
      const int bits = low == high ? 0 : 64 - __clzll(static_cast<long long>(high - low));
      const int shift = bits > kBits ? bits - kBits : 0;
      if (threadIdx.x == 0) {
        shared->bucket = 0;
        shared->above = 0;
      }
#pragma unroll
      for (int b = 0; b < kBucketsPerThread; ++b) buckets[b * kCount + threadIdx.x] = 0;
      __syncthreads();
#pragma unroll 1
      for (int64_t tile = 0; tile < (held ? 1 : tiles()); ++tile) {
        if (!held) load_tile(tile, keys);
#pragma unroll
        for (int k = 0; k < kKeys; ++k) {
          if (keys[k] >= low && keys[k] <= high)
            atomicAdd(buckets + ((keys[k] - low) >> shift), 1u);
        }
      }
      __syncthreads();
      // Thread 0 has the highest buckets, so that the keys before a thread are the larger ones.
      const int first = kBuckets - 1 - static_cast<int>(threadIdx.x) * kBucketsPerThread;
      Count own = 0;
#pragma unroll
      for (int b = 0; b < kBucketsPerThread; ++b) own += buckets[first - b];
      Count all = 0;
      Count above = sum_before(own, &all);
      if (above < kept && kept <= above + own) {
        int bucket = first;
        while (above + buckets[bucket] < kept) above += buckets[bucket--];
        shared->bucket = bucket;
        shared->above = above;
      }
      __syncthreads();
      kept -= shared->above;
      within = buckets[shared->bucket];
      low += static_cast<RankingKey>(shared->bucket) << shift;
      __syncthreads();
      if (shift == 0) break;
      if (within == kept && low > 0) {
        *equal = 0;
        return {low - 1, 0};
      }
      // The last bucket may reach beyond the largest key, and beyond 64 bits.
      const RankingKey width = (RankingKey{1} << shift) - 1;
      high = high - low < width ? high : low + width;
      if (!held && within <= kSurvivors) {
        hold_survivors(keys, low, high);
        held = true;
      }
    }
    *equal = within;
    return {low, kept};
  }

  // Moves the keys from `low` to `high` from memory to the threads, in any order.
  __device__ __forceinline__ void hold_survivors(Keys& keys, RankingKey low,
                                                 RankingKey high) const {
#pragma unroll 1
    for (int64_t tile = 0; tile < tiles(); ++tile) {
      load_tile(tile, keys);
#pragma unroll
      for (int k = 0; k < kKeys; ++k) {
        if (keys[k] >= low && keys[k] <= high) {
          const unsigned at = atomicAdd(&shared->survivors, 1u);
          if (at < kSurvivors) survivors[at] = keys[k];
        }
      }
    }
    __syncthreads();
    const unsigned count = shared->survivors < kSurvivors ? shared->survivors : kSurvivors;
#pragma unroll
    for (int k = 0; k < kKeys; ++k) {
      const unsigned at = k * kCount + threadIdx.x;
      keys[k] = at < count ? survivors[at] : kNoKey;
    }
  }

  // How many of the channels before a tile have this key.
  __device__ __forceinline__ Count on_cut_before(int64_t tile, RankingKey threshold) const {
    if (kChannels == Channels::of_one_tile) return 0;
    Count count = 0;
#pragma unroll 1
    for (int64_t earlier = 0; earlier < tile; ++earlier) {
      Keys keys;
      load_tile(earlier, keys);
#pragma unroll
      for (int k = 0; k < kKeys; ++k) count += keys[k] == threshold ? 1 : 0;
    }
    Count all = 0;
    sum_before(count, &all);
    return all;
  }
};

}  // namespace
}  // namespace lnprune::cuda
