// The select step on CUDA: one block per ranking finds its cut by histograms of its keys.
#include "../topk.h"
#include "launches.h"

namespace lnprune::cuda {
namespace {

constexpr int kSelectThreads = 512;
constexpr int kWarps = kSelectThreads / kWarp;
constexpr int kBucketBits = 11;
constexpr int kBuckets = 1 << kBucketBits;
constexpr int kBucketsPerThread = kBuckets / kSelectThreads;

// What the threads of a block tell each other.
struct Shared {
  int64_t counts[kWarps];
  RankingKey low[kWarps];
  RankingKey high[kWarps];
  int bucket;
  int64_t above;  // keys in higher buckets
};

__device__ __forceinline__ bool takes_part(const SelectItem& item, int64_t channel) {
  return item.mask_counts == nullptr || load_cached(item.mask_counts + channel) != 0;
}

__device__ __forceinline__ RankingKey key_of(const SelectItem& item, int64_t channel) {
  return ranking_key(load_cached(item.norms + channel));
}

// The sum of `value` over the threads before this one, and over all of them in `total`.
__device__ __forceinline__ int64_t sum_before(int64_t value, int64_t* total, int64_t* warp_sums) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  int64_t sum = value;
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const int64_t before = __shfl_up_sync(kAllLanes, sum, distance);
    if (lane >= distance) sum += before;
  }
  __syncthreads();
  if (lane == kWarp - 1) warp_sums[warp] = sum;
  __syncthreads();
  int64_t before = sum - value;
  int64_t all = 0;
#pragma unroll 1
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) before += warp_sums[w];
    all += warp_sums[w];
  }
  *total = all;
  return before;
}

// The channels that take part, and the least and the largest of their keys, for every thread.
__device__ __forceinline__ int64_t survey(const SelectItem& item, RankingKey* low, RankingKey* high,
                                          Shared* shared) {
  int64_t count = 0;
  RankingKey least = ~RankingKey{0};
  RankingKey most = 0;
#pragma unroll 1
  for (int64_t c = threadIdx.x; c < item.channels; c += kSelectThreads) {
    if (!takes_part(item, c)) continue;
    const RankingKey key = key_of(item, c);
    ++count;
    least = key < least ? key : least;
    most = key > most ? key : most;
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
  int64_t participants = 0;
  sum_before(count, &participants, shared->counts);
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
__device__ __forceinline__ Cut find_cut(const SelectItem& item, RankingKey low, RankingKey high,
                                        int64_t kept, int64_t* equal, unsigned* buckets,
                                        Shared* shared) {
  while (true) {
    const int bits = low == high ? 0 : 64 - __clzll(static_cast<long long>(high - low));
    const int shift = bits > kBucketBits ? bits - kBucketBits : 0;
#pragma unroll 1
    for (int b = threadIdx.x; b < kBuckets; b += kSelectThreads) buckets[b] = 0;
    __syncthreads();
#pragma unroll 1
    for (int64_t c = threadIdx.x; c < item.channels; c += kSelectThreads) {
      const RankingKey key = key_of(item, c);
      if (takes_part(item, c) && key >= low && key <= high) {
        atomicAdd(buckets + ((key - low) >> shift), 1u);
      }
    }
    __syncthreads();
    // Thread 0 has the highest buckets, so that the keys before a thread are the larger ones.
    const int first = kBuckets - 1 - static_cast<int>(threadIdx.x) * kBucketsPerThread;
    int64_t own = 0;
#pragma unroll
    for (int b = 0; b < kBucketsPerThread; ++b) own += buckets[first - b];
    int64_t all = 0;
    int64_t above = sum_before(own, &all, shared->counts);
    if (above < kept && kept <= above + own) {
      int bucket = first;
      while (above + buckets[bucket] < kept) above += buckets[bucket--];
      shared->bucket = bucket;
      shared->above = above;
    }
    __syncthreads();
    kept -= shared->above;
    const int64_t within = buckets[shared->bucket];
    low += static_cast<RankingKey>(shared->bucket) << shift;
    __syncthreads();
    if (shift == 0) {
      *equal = within;
      return {low, kept};
    }
    if (within == kept && low > 0) {
      *equal = 0;
      return {low - 1, 0};
    }
    // The last bucket may reach beyond the largest key, and beyond 64 bits.
    const RankingKey width = (RankingKey{1} << shift) - 1;
    high = high - low < width ? high : low + width;
  }
}

__global__ void __launch_bounds__(kSelectThreads) select_kernel(const SelectItem* items) {
  LNPRUNE_SHARED(unsigned, buckets, kBuckets);
  LNPRUNE_SHARED(Shared, shared, 1);
  const SelectItem item = load_cached(items + blockIdx.x);
  RankingKey low = 0;
  RankingKey high = 0;
  const int64_t participants = survey(item, &low, &high, shared);
  const int64_t kept = participants - pruned_channels(item.count, item.fraction, participants);
  int64_t equal = 0;
  Cut cut = kKeepNone;
  if (kept > 0) cut = find_cut(item, low, high, kept, &equal, buckets, shared);

  // Only where some of the keys on the cut stay and others do not does their order matter.
  const bool in_order = cut.ties > 0 && cut.ties < equal;
  int64_t equal_before_tile = 0;
#pragma unroll 1
  for (int64_t start = 0; start < item.channels; start += kSelectThreads) {
    const int64_t c = start + threadIdx.x;
    const bool counted = c < item.channels && takes_part(item, c);
    const RankingKey key = c < item.channels ? key_of(item, c) : 0;
    int64_t equal_before = 0;
    if (in_order) {
      int64_t in_tile = 0;
      const bool on_cut = counted && key == cut.threshold;
      equal_before = equal_before_tile + sum_before(on_cut ? 1 : 0, &in_tile, shared->counts);
      equal_before_tile += in_tile;
    }
    if (c < item.channels) store(item.keep + c, counted && is_kept(key, cut, equal_before));
  }
}

}  // namespace

cudaError_t launch_select(const SelectItem* items, int64_t count, cudaStream_t stream) {
  return launch(select_kernel, count, kSelectThreads, stream, items);
}

}  // namespace lnprune::cuda
