// The select step on the CPU: the cut of each ranking by a partial sort of its keys.
#include <algorithm>
#include <functional>
#include <vector>

#include "../kernels.h"
#include "../topk.h"

namespace lnprune::cpu {
namespace {

bool takes_part(const SelectItem& item, int64_t channel) {
  return item.mask_counts == nullptr || item.mask_counts[channel] != 0;
}

void select_one(const SelectItem& item) {
  std::vector<RankingKey> keys;
  keys.reserve(item.channels);
  for (int64_t c = 0; c < item.channels; ++c) {
    if (takes_part(item, c)) keys.push_back(ranking_key(item.norms[c]));
  }
  const int64_t participants = static_cast<int64_t>(keys.size());
  const int64_t kept = participants - pruned_channels(item.count, item.fraction, participants);
  Cut cut = kKeepNone;
  if (kept > 0) {
    std::nth_element(keys.begin(), keys.begin() + (kept - 1), keys.end(), std::greater<>());
    cut.threshold = keys[kept - 1];
    const auto above = std::count_if(keys.begin(), keys.begin() + kept,
                                     [&](RankingKey key) { return key > cut.threshold; });
    cut.ties = kept - above;
  }
  int64_t equal_before = 0;
  for (int64_t c = 0; c < item.channels; ++c) {
    const RankingKey key = ranking_key(item.norms[c]);
    const bool counted = takes_part(item, c);
    item.keep[c] = counted && is_kept(key, cut, equal_before);
    equal_before += counted && key == cut.threshold ? 1 : 0;
  }
}

}  // namespace

void select(const SelectItem* items, size_t count, ParallelFor parallel_for) {
  int64_t channels = 0;
  for (size_t i = 0; i < count; ++i) channels += items[i].channels;
  // A few thousand channels take less time than to wake a thread.
  const int64_t grain = channels < 16384 ? static_cast<int64_t>(count) : 1;
  auto body = [](void* context, int64_t begin, int64_t end) {
    const SelectItem* all = static_cast<const SelectItem*>(context);
    for (int64_t i = begin; i < end; ++i) select_one(all[i]);
  };
  parallel_for(static_cast<int64_t>(count), grain, body, const_cast<SelectItem*>(items));
}

}  // namespace lnprune::cpu
