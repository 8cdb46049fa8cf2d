// Which channels of a mask have an element that is not zero: looking stops at the first.
#include <algorithm>
#include <vector>

#include "instruction_sets.h"
#include "share.h"

namespace lnprune::cpu {
namespace {

// Elements that are looked at before the next decision to stop.
constexpr int64_t kLook = 1024;
// Elements of a part of a mask whose channels are columns.
constexpr int64_t kPartElements = 65536;

// Zero has these bits zero, and nothing else has: a sign alone is zero but in fnuz types, where it
// is NaN.
template <class Word>
Word value_bits(ElementType type) {
  const bool unsigned_zero =
      type == ElementType::float8_e4m3fnuz || type == ElementType::float8_e5m2fnuz;
  const Word all = static_cast<Word>(~Word{0});
  return unsigned_zero ? all : static_cast<Word>(all >> 1);
}

template <class Word>
Word any_bits(const Word* words, int64_t count) {
  Word any = 0;
  for (int64_t i = 0; i < count; ++i) any |= words[i];
  return any;
}

template <class Word>
bool run_is_alive(const Word* words, int64_t count, Word bits) {
  for (int64_t start = 0; start < count; start += kLook) {
    if ((any_bits(words + start, std::min(kLook, count - start)) & bits) != 0) return true;
  }
  return false;
}

template <class Word>
double channel_is_alive(const RankItem& mask, int64_t channel) {
  const Slices& slices = mask.slices;
  const Word* words = static_cast<const Word*>(mask.elements) + channel * slices.inner;
  for (int64_t row = 0; row < slices.outer; ++row) {
    const Word bits = value_bits<Word>(mask.type);
    if (run_is_alive(words + row * slices.row(), slices.inner, bits)) return 1;
  }
  return 0;
}

// A part is some rows of some channels. Each that is found alive is noted; others may be alive in
// other parts, which other threads look at.
template <class Word>
void look_at_columns(const RankItem& mask, int64_t row, int64_t rows, int64_t channel,
                     int64_t channels) {
  const int64_t inner = mask.slices.inner;
  const int64_t columns = channels * inner;
  const int64_t rows_per_look = std::max<int64_t>(1, kLook * 16 / columns);
  const Word bits = value_bits<Word>(mask.type);
  const Word* words =
      static_cast<const Word*>(mask.elements) + row * mask.slices.row() + channel * inner;
  alignas(64) Word any[kColumns] = {};
  for (int64_t r = 0; r < rows;) {
    const int64_t stop = std::min(rows, r + rows_per_look);
    for (; r < stop; ++r) {
      const Word* __restrict at = words + r * mask.slices.row();
      for (int64_t j = 0; j < columns; ++j) any[j] |= at[j];
    }
    int64_t alive = 0;
    for (int64_t c = 0; c < channels; ++c) {
      alive += (any_bits(any + c * inner, inner) & bits) != 0 ? 1 : 0;
    }
    if (alive == channels) break;
  }
  const double one = 1;
  for (int64_t c = 0; c < channels; ++c) {
    if ((any_bits(any + c * inner, inner) & bits) != 0) {
      __atomic_store(mask.norms + channel + c, &one, __ATOMIC_RELAXED);
    }
  }
}

// How each matrix of a mask is shared: channels that are runs one by one, columns in parts.
struct Parts {
  bool runs;
  int64_t rows_per_part;
  int64_t channels_per_part;
  int64_t strips;
  int64_t count;
};

Parts make_parts(const Slices& slices) {
  Parts parts{};
  parts.runs = slices.inner >= kShortestRun;
  parts.rows_per_part = slices.outer;
  parts.channels_per_part = 1;
  if (!parts.runs) {
    parts.channels_per_part = std::min(slices.channels, kColumns / slices.inner);
    const int64_t columns = parts.channels_per_part * slices.inner;
    parts.rows_per_part = std::max<int64_t>(1, kPartElements / columns);
  }
  parts.strips = divide_up(slices.channels, parts.channels_per_part);
  parts.count = parts.strips * divide_up(slices.outer, parts.rows_per_part);
  return parts;
}

template <class Word>
void look_at_part(const RankItem& mask, const Parts& parts, int64_t part) {
  if (parts.runs) {
    mask.norms[part] = channel_is_alive<Word>(mask, part);
    return;
  }
  const int64_t row = part / parts.strips * parts.rows_per_part;
  const int64_t channel = part % parts.strips * parts.channels_per_part;
  look_at_columns<Word>(mask, row, std::min(parts.rows_per_part, mask.slices.outer - row), channel,
                        std::min(parts.channels_per_part, mask.slices.channels - channel));
}

}  // namespace

void find_alive(const RankItem* masks, size_t count, const Threads& threads) {
  std::vector<RankItem> views(masks, masks + count);
  std::vector<Parts> parts(count);
  std::vector<int64_t> ends(count);
  int64_t tasks = 0;
  int64_t elements = 0;
  for (size_t i = 0; i < count; ++i) {
    const Slices& slices = views[i].slices = folded(masks[i].slices);
    parts[i] = make_parts(slices);
    ends[i] = tasks += slices.batch * parts[i].count;
    elements += slices.elements();
    std::fill_n(masks[i].norms, slices.all_channels(), 0.0);
  }
  share_tasks(ends, elements, kPartElements, threads, [&](size_t i, int64_t task) {
    const RankItem mask = matrix_of(views[i], task / parts[i].count);
    const int64_t part = task % parts[i].count;
    switch (element_bytes(mask.type)) {
      case 8: return look_at_part<uint64_t>(mask, parts[i], part);
      case 4: return look_at_part<uint32_t>(mask, parts[i], part);
      case 2: return look_at_part<uint16_t>(mask, parts[i], part);
      default: return look_at_part<uint8_t>(mask, parts[i], part);
    }
  });
}

}  // namespace lnprune::cpu
