// The steps of a call on the CPU: a list that is ranked and written goes through them part by part.
#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "../kernels.h"

namespace lnprune::cpu {
namespace {

// Bytes of weights in a part, for each thread and at least: what the rank step has read of it is
// in the caches still when it is written, and threads meet seldom enough.
constexpr int64_t kPartBytesPerThread = int64_t{2} << 20;
constexpr int64_t kFewestPartBytes = int64_t{4} << 20;

template <class Item>
int64_t bytes_of(const Item& item) {
  return item.slices.elements() * element_bytes(item.type);
}

// Items that follow one another.
struct Part {
  size_t begin;
  size_t end;

  template <class Item>
  const Item* first(const std::vector<Item>& items) const {
    return items.data() + std::min(begin, items.size());
  }
  template <class Item>
  size_t count(const std::vector<Item>& items) const {
    return std::min(end, items.size()) - std::min(begin, items.size());
  }
};

// Whether no tensor is zeroed that another item ranks or zeroes.
bool zeros_are_apart(const Steps& steps) {
  std::vector<std::pair<uintptr_t, uintptr_t>> ranges;
  for (size_t i = 0; i < steps.zeros.size(); ++i) {
    const ZeroItem& zero = steps.zeros[i];
    if (steps.scores[i].elements != zero.elements) return false;
    const uintptr_t begin = reinterpret_cast<uintptr_t>(zero.elements);
    ranges.emplace_back(begin, begin + std::max(bytes_of(zero), bytes_of(steps.scores[i])));
  }
  std::sort(ranges.begin(), ranges.end());
  for (size_t i = 1; i < ranges.size(); ++i) {
    if (ranges[i].first < ranges[i - 1].second) return false;
  }
  return true;
}

std::vector<Part> parts_of(const Steps& steps, int64_t threads) {
  const size_t written = std::max(steps.writes.size(), steps.zeros.size());
  if (steps.scores.empty() || written == 0 || !zeros_are_apart(steps)) return {{0, SIZE_MAX}};
  const int64_t most = std::max(kFewestPartBytes, kPartBytesPerThread * threads);
  std::vector<Part> parts{{0, 0}};
  int64_t bytes = 0;
  for (size_t i = 0; i < written; ++i) {
    const int64_t item = bytes_of(steps.scores[i]);
    if (i > parts.back().begin && bytes + item > most) {
      parts.push_back({i, i});
      bytes = 0;
    }
    bytes += item;
    parts.back().end = i + 1;
  }
  return parts;
}

}  // namespace

void run(const Steps& steps, const Threads& threads) {
  int64_t written_bytes = 0;
  for (const WriteItem& item : steps.writes) {
    written_bytes += bytes_of(item) * (item.weight == nullptr ? 1 : 2);
  }
  for (const Part& part : parts_of(steps, threads.count)) {
    rank(part.first(steps.scores), part.count(steps.scores), steps.order, steps.rooted, threads);
    find_alive(part.first(steps.masks), part.count(steps.masks), threads);
    root(part.first(steps.sums), part.count(steps.sums), steps.order, threads);
    select(part.first(steps.selections), part.count(steps.selections), threads);
    write(part.first(steps.writes), part.count(steps.writes), written_bytes, threads);
    zero(part.first(steps.zeros), part.count(steps.zeros), threads);
  }
}

}  // namespace lnprune::cpu
