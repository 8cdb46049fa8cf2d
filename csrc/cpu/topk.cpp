// The select step on the CPU: the cut of each ranking by histograms of its keys.
#include <algorithm>
#include <functional>
#include <vector>

#include "../topk.h"
#include "share.h"

namespace lnprune::cpu {
namespace {

bool takes_part(const SelectItem& item, int64_t channel) {
  return item.mask_counts == nullptr || item.mask_counts[channel] != 0;
}

// Few enough keys that sorting a part of them beats a histogram.
constexpr size_t kFewKeys = 128;
constexpr int kBucketBits = 11;

// The cut that keeps the `kept` largest of the keys, at least one of them. Each round keeps only
// the keys of the bucket that the cut falls into: a range of keys kBucketBits shorter.
Cut find_cut(std::vector<RankingKey>& keys, int64_t kept) {
  while (keys.size() > kFewKeys) {
    RankingKey low = keys[0];
    RankingKey high = low;
    for (RankingKey key : keys) {
      low = std::min(low, key);
      high = std::max(high, key);
    }
    if (low == high) return {low, kept};
    int shift = 0;
    while ((high - low) >> shift >> kBucketBits != 0) ++shift;
    int64_t counts[1 << kBucketBits] = {};
    for (RankingKey key : keys) ++counts[(key - low) >> shift];
    size_t bucket = (high - low) >> shift;
    for (; kept > counts[bucket]; --bucket) kept -= counts[bucket];
    const auto outside = [=](RankingKey key) { return (key - low) >> shift != bucket; };
    keys.erase(std::remove_if(keys.begin(), keys.end(), outside), keys.end());
  }
  std::nth_element(keys.begin(), keys.begin() + (kept - 1), keys.end(), std::greater<>());
  const RankingKey threshold = keys[kept - 1];
  const auto above = std::count_if(keys.begin(), keys.begin() + kept,
                                   [=](RankingKey key) { return key > threshold; });
  return {threshold, kept - above};
}

void select_one(const SelectItem& item) {
  std::vector<RankingKey> keys(item.channels);
  int64_t participants = 0;
  for (int64_t c = 0; c < item.channels; ++c) {
    keys[participants] = ranking_key(item.norms[c]);
    participants += takes_part(item, c) ? 1 : 0;
  }
  keys.resize(participants);
  const int64_t kept = participants - pruned_channels(item.count, item.fraction, participants);
  const Cut cut = kept > 0 ? find_cut(keys, kept) : kKeepNone;
  int64_t equal_before = 0;
  for (int64_t c = 0; c < item.channels; ++c) {
    const RankingKey key = ranking_key(item.norms[c]);
    const bool counted = takes_part(item, c);
    item.keep[c] = counted & is_kept(key, cut, equal_before);
    equal_before += counted & (key == cut.threshold);
  }
}

}  // namespace

void select(const SelectItem* items, size_t count, const Threads& threads) {
  std::vector<int64_t> ends(count);
  int64_t rankings = 0;
  int64_t channels = 0;
  for (size_t i = 0; i < count; ++i) {
    ends[i] = rankings += items[i].rankings;
    channels += items[i].rankings * items[i].channels;
  }
  // Some thousand channels take less time than a thread may take to wake on a busy machine.
  share_tasks(ends, channels, 32768, threads,
              [items](size_t i, int64_t ranking) { select_one(ranking_of(items[i], ranking)); });
}

}  // namespace lnprune::cpu
