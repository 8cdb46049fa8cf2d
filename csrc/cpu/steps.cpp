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

int64_t part_bytes(int64_t threads) {
  return std::max(kFewestPartBytes, kPartBytesPerThread * threads);
}

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

// Whether an item of every step is about the same matrices, each with a ranking of its own.
bool has_same_matrices(const Steps& steps, size_t i) {
  const int64_t batch = steps.scores[i].slices.batch;
  return batch > 1 && steps.selections[i].rankings == batch &&
         (steps.masks.empty() || steps.masks[i].slices.batch == batch) &&
         (steps.writes.empty() || steps.writes[i].slices.batch == batch) &&
         (steps.zeros.empty() || steps.zeros[i].slices.batch == batch);
}

template <class Item>
void add(std::vector<Item>& items, const std::vector<Item>& from, size_t i) {
  if (!from.empty()) items.push_back(from[i]);
}

template <class Item>
void add_matrices(std::vector<Item>& items, const std::vector<Item>& from, size_t i, int64_t first,
                  int64_t count) {
  if (from.empty()) return;
  items.push_back(matrix_of(from[i], first));
  items.back().slices.batch = count;
}

// The same work, where items with many matrices are several with fewer, about so many bytes each.
Steps in_pieces(const Steps& steps, int64_t bytes) {
  Steps pieces;
  pieces.order = steps.order;
  pieces.rooted = steps.rooted;
  for (size_t i = 0; i < steps.scores.size(); ++i) {
    if (!has_same_matrices(steps, i)) {
      add(pieces.scores, steps.scores, i);
      add(pieces.masks, steps.masks, i);
      add(pieces.selections, steps.selections, i);
      add(pieces.writes, steps.writes, i);
      add(pieces.zeros, steps.zeros, i);
      continue;
    }
    const RankItem& item = steps.scores[i];
    const int64_t batch = item.slices.batch;
    const int64_t each = item.slices.matrix() * element_bytes(item.type);
    const int64_t most = std::max<int64_t>(1, bytes / each);
    for (int64_t first = 0; first < batch; first += most) {
      const int64_t count = std::min(most, batch - first);
      add_matrices(pieces.scores, steps.scores, i, first, count);
      add_matrices(pieces.masks, steps.masks, i, first, count);
      add_matrices(pieces.writes, steps.writes, i, first, count);
      add_matrices(pieces.zeros, steps.zeros, i, first, count);
      pieces.selections.push_back(ranking_of(steps.selections[i], first));
      pieces.selections.back().rankings = count;
    }
  }
  return pieces;
}

// Whether each tensor is ranked, selected from and written: items of all steps belong together.
bool is_whole(const Steps& steps) {
  const size_t count = steps.scores.size();
  return count > 0 && steps.selections.size() == count && steps.sums.empty() &&
         (steps.masks.empty() || steps.masks.size() == count) &&
         steps.writes.size() + steps.zeros.size() == count;
}

std::vector<Part> parts_of(const Steps& steps, int64_t threads) {
  const size_t written = std::max(steps.writes.size(), steps.zeros.size());
  if (steps.scores.empty() || written == 0 || !zeros_are_apart(steps)) return {{0, SIZE_MAX}};
  const int64_t most = part_bytes(threads);
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

void run(const Steps& call, const Threads& threads) {
  const bool has_batches =
      is_whole(call) && std::any_of(call.scores.begin(), call.scores.end(),
                                    [](const RankItem& item) { return item.slices.batch > 1; });
  Steps pieces;
  if (has_batches) pieces = in_pieces(call, part_bytes(threads.count));
  const Steps& steps = has_batches ? pieces : call;
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
