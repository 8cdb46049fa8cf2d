// The write step on the CPU: each mask and masked weight in one pass, or zeros in place, in parts
// shared among threads.
#include <algorithm>
#include <cstring>
#include <vector>

#include "instruction_sets.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace lnprune::cpu {
namespace {

// Elements of a tile: large enough to amortise its start, small enough to share evenly. Zeroing
// columns takes more rows at once, since it works out the pattern of a row first.
constexpr int64_t kTileElements = 32768;
constexpr int64_t kZeroTileElements = 131072;

// How one item is cut into tiles, ranges of rows and of columns. A task is one tile. Where channels
// are runs, the tensor counts as one row.
struct Tiles {
  bool runs;
  int64_t rows;
  int64_t columns;
  int64_t rows_per_tile;
  int64_t columns_per_tile;
  int64_t strips;  // tiles side by side
  int64_t count;
  int64_t first_task;
};

Tiles make_tiles(const Slices& slices, int64_t elements_per_tile) {
  Tiles tiles{};
  tiles.runs = slices.inner >= kShortestRun;
  if (tiles.runs) {
    tiles.rows = 1;
    tiles.columns = slices.elements();
    tiles.columns_per_tile = elements_per_tile;
    tiles.rows_per_tile = 1;
  } else {
    tiles.rows = slices.outer;
    tiles.columns = slices.row();
    tiles.columns_per_tile = kColumns / slices.inner * slices.inner;
    tiles.rows_per_tile =
        std::max<int64_t>(1, elements_per_tile / std::min(tiles.columns, tiles.columns_per_tile));
  }
  tiles.strips = divide_up(tiles.columns, tiles.columns_per_tile);
  tiles.count = tiles.strips * divide_up(tiles.rows, tiles.rows_per_tile);
  return tiles;
}

// Rows of consecutive whole channels that lie as columns; `element` is the first.
struct ColumnPart {
  int64_t element;
  int64_t rows;
  int64_t row_stride;
  int64_t columns;
  const bool* keep;
};

// Shares the tasks of all items among threads: on_columns(item, ColumnPart) where channels are
// columns, on_run(item, element, length, kept) for each piece of a run, and at_end() when a thread
// has done its share.
template <class Item, class OnColumns, class OnRun, class AtEnd>
void visit(const Item* items, size_t count, int64_t elements_per_tile, ParallelFor parallel_for,
           OnColumns on_columns, OnRun on_run, AtEnd at_end) {
  std::vector<Tiles> tiles(count);
  int64_t tasks = 0;
  int64_t elements = 0;
  for (size_t i = 0; i < count; ++i) {
    tiles[i] = make_tiles(items[i].slices, elements_per_tile);
    tiles[i].first_task = tasks;
    tasks += tiles[i].count;
    elements += items[i].slices.elements();
  }
  const auto run_tasks = [&](int64_t begin, int64_t end) {
    size_t i = 0;
    for (int64_t task = begin; task < end; ++task) {
      while (task >= tiles[i].first_task + tiles[i].count) ++i;
      const Item& item = items[i];
      const Tiles& cut = tiles[i];
      const int64_t inner = item.slices.inner;
      const int64_t local = task - cut.first_task;
      const int64_t row = local / cut.strips * cut.rows_per_tile;
      const int64_t column = local % cut.strips * cut.columns_per_tile;
      const int64_t columns = std::min(cut.columns_per_tile, cut.columns - column);
      if (!cut.runs) {
        on_columns(item, ColumnPart{row * cut.columns + column,
                                    std::min(cut.rows_per_tile, cut.rows - row), cut.columns,
                                    columns, item.keep + column / inner});
        continue;
      }
      for (int64_t element = column; element < column + columns;) {
        const int64_t run = element / inner;
        const int64_t length = std::min((run + 1) * inner, column + columns) - element;
        on_run(item, element, length, item.keep[run % item.slices.channels]);
        element += length;
      }
    }
    at_end();
  };
  using RunTasks = decltype(run_tasks);
  const auto body = [](void* context, int64_t begin, int64_t end) {
    (*static_cast<RunTasks*>(context))(begin, end);
  };
  // So that no thread starts for less than some ten microseconds of work.
  const int64_t grain = std::max<int64_t>(1, 32768 * tasks / std::max<int64_t>(1, elements));
  parallel_for(tasks, grain, body, const_cast<void*>(static_cast<const void*>(&run_tasks)));
}

WritePart part_at(const WriteItem& item, int64_t element) {
  const int64_t offset = element * element_bytes(item.type);
  const auto at = [offset](const void* base) -> const void* {
    return base == nullptr ? nullptr : static_cast<const char*>(base) + offset;
  };
  const auto into = [offset](void* base) -> void* {
    return base == nullptr ? nullptr : static_cast<char*>(base) + offset;
  };
  return {at(item.mask), at(item.original), into(item.new_mask), into(item.weight)};
}

// Weights beyond the caches are zeroed past them: a line that is overwritten whole need not be
// read.
constexpr int64_t kUncachedBytes = int64_t{16} << 20;

// So that other threads see the stores past the caches no later than what follows them.
void finish_uncached_stores() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

void zero_run(char* bytes, int64_t count, bool uncached) {
#if defined(__SSE2__)
  if (uncached) {
    constexpr int64_t kVector = sizeof(__m128i);
    const int64_t misaligned = reinterpret_cast<uintptr_t>(bytes) % kVector;
    const int64_t head = std::min(count, misaligned == 0 ? 0 : kVector - misaligned);
    const int64_t vectors = (count - head) / kVector;
    std::memset(bytes, 0, head);
    __m128i* aligned = reinterpret_cast<__m128i*>(bytes + head);
    for (int64_t i = 0; i < vectors; ++i) _mm_stream_si128(aligned + i, _mm_setzero_si128());
    const int64_t written = head + vectors * kVector;
    std::memset(bytes + written, 0, count - written);
    return;
  }
#endif
  (void)uncached;
  std::memset(bytes, 0, count);
}

// Zeros the pruned columns of a part, on words of the elements' size. A cache line that holds none
// of them is not touched.
template <class Word>
void zero_columns(Word* words, const ColumnPart& part, int64_t inner) {
  constexpr int64_t kLine = 64 / sizeof(Word);
  alignas(64) Word kept[kColumns];
  struct Span {
    int64_t begin;
    int64_t end;
  };
  std::vector<Span> spans;
  for (int64_t c = 0, j = 0; j < part.columns; ++c) {
    const Word bits = part.keep[c] ? static_cast<Word>(~Word{0}) : Word{0};
    for (int64_t i = 0; i < inner; ++i, ++j) kept[j] = bits;
  }
  for (int64_t begin = 0; begin < part.columns; begin += kLine) {
    const int64_t end = std::min(begin + kLine, part.columns);
    Word all = static_cast<Word>(~Word{0});
    for (int64_t j = begin; j < end; ++j) all &= kept[j];
    if (all == static_cast<Word>(~Word{0})) continue;
    if (!spans.empty() && spans.back().end == begin) {
      spans.back().end = end;
    } else {
      spans.push_back({begin, end});
    }
  }
  for (int64_t r = 0; r < part.rows; ++r) {
    Word* row = words + r * part.row_stride;
    for (const Span& span : spans) {
      for (int64_t j = span.begin; j < span.end; ++j) row[j] &= kept[j];
    }
  }
}

}  // namespace

void write(const WriteItem* items, size_t count, ParallelFor parallel_for) {
  visit(
      items, count, kTileElements, parallel_for,
      [](const WriteItem& item, const ColumnPart& part) {
        instructions().write_columns[static_cast<int>(item.type)](
            part_at(item, part.element), part.rows, part.row_stride, part.columns,
            item.slices.inner, part.keep);
      },
      [](const WriteItem& item, int64_t element, int64_t length, bool kept) {
        instructions().write_run[static_cast<int>(item.type)](part_at(item, element), length, kept);
      },
      [] {});
}

void zero(const ZeroItem* items, size_t count, ParallelFor parallel_for) {
  int64_t bytes_in_all = 0;
  for (size_t i = 0; i < count; ++i) {
    bytes_in_all += items[i].slices.elements() * element_bytes(items[i].type);
  }
  const bool uncached = bytes_in_all >= kUncachedBytes;
  visit(
      items, count, kZeroTileElements, parallel_for,
      [](const ZeroItem& item, const ColumnPart& part) {
        const int64_t inner = item.slices.inner;
        switch (element_bytes(item.type)) {
          case 8:
            return zero_columns(static_cast<uint64_t*>(item.elements) + part.element, part, inner);
          case 4:
            return zero_columns(static_cast<uint32_t*>(item.elements) + part.element, part, inner);
          case 2:
            return zero_columns(static_cast<uint16_t*>(item.elements) + part.element, part, inner);
          default:
            return zero_columns(static_cast<uint8_t*>(item.elements) + part.element, part, inner);
        }
      },
      [uncached](const ZeroItem& item, int64_t element, int64_t length, bool kept) {
        const int64_t bytes = element_bytes(item.type);
        if (!kept) {
          zero_run(static_cast<char*>(item.elements) + element * bytes, length * bytes, uncached);
        }
      },
      finish_uncached_stores);
}

}  // namespace lnprune::cpu
