// The write step on the CPU: each mask and masked weight in one pass, or zeros in place, in parts
// shared among threads.
#include <algorithm>
#include <cstring>
#include <vector>

#include "instruction_sets.h"
#include "share.h"

namespace lnprune::cpu {
namespace {

// Elements of a tile: large enough to amortise its start, small enough to share evenly. Zeroing
// columns takes more rows at once, since it works out the pattern of a row first.
constexpr int64_t kTileElements = 32768;
constexpr int64_t kZeroTileElements = 131072;
// A thread starts for this many elements, some ten microseconds of work, or more.
constexpr int64_t kThreadElements = 32768;

// The elements of a tile: at most so many, and fewer where there would be too few tiles for all
// threads.
int64_t tile_elements(int64_t elements, int64_t most, int64_t threads) {
  return std::min(task_elements(elements, kThreadElements, threads), most);
}

// How each matrix of an item is cut into tiles, ranges of rows and of columns. A task is one tile.
// Where channels are runs, the tensor counts as one row.
struct Tiles {
  bool runs;
  int64_t rows;
  int64_t columns;
  int64_t rows_per_tile;
  int64_t columns_per_tile;
  int64_t strips;  // tiles side by side
  int64_t count;
};

Tiles make_tiles(const Slices& slices, int64_t elements_per_tile) {
  Tiles tiles{};
  tiles.runs = slices.inner >= kShortestRun;
  if (tiles.runs) {
    tiles.rows = 1;
    tiles.columns = slices.matrix();
    tiles.columns_per_tile = elements_per_tile;
    tiles.rows_per_tile = 1;
  } else {
    tiles.rows = slices.outer;
    tiles.columns = slices.row();
    tiles.columns_per_tile = std::min(kColumns, elements_per_tile) / slices.inner * slices.inner;
    tiles.rows_per_tile =
        std::max<int64_t>(1, elements_per_tile / std::min(tiles.columns, tiles.columns_per_tile));
  }
  tiles.strips = divide_up(tiles.columns, tiles.columns_per_tile);
  tiles.count = tiles.strips * divide_up(tiles.rows, tiles.rows_per_tile);
  return tiles;
}

// The tiles of a call on one tensor.
int64_t write_tiles(const Slices& slices, int64_t most, int64_t threads) {
  const Slices view = folded(slices);
  return view.batch * make_tiles(view, tile_elements(view.elements(), most, threads)).count;
}

// Rows of consecutive whole channels that lie as columns; `element` is the first.
struct ColumnPart {
  int64_t element;
  int64_t rows;
  int64_t row_stride;
  int64_t columns;
  const bool* keep;
};

// Shares the tasks of all items among threads: on_columns(item, ColumnPart, non_temporal) where
// channels are columns, on_runs(item, element, length, non_temporal) for elements side by side.
template <class Item, class PastCaches, class OnColumns, class OnRuns>
void visit(const Item* items, size_t count, int64_t most_tile_elements, const Threads& threads,
           PastCaches non_temporal, OnColumns on_columns, OnRuns on_runs) {
  struct Cut {
    Item item;
    Tiles tiles;
    bool non_temporal;
  };
  std::vector<Cut> cuts(count);
  std::vector<int64_t> ends(count);
  int64_t tasks = 0;
  int64_t elements = 0;
  for (size_t i = 0; i < count; ++i) elements += items[i].slices.elements();
  const int64_t elements_per_tile = tile_elements(elements, most_tile_elements, threads.count);
  for (size_t i = 0; i < count; ++i) {
    cuts[i] = {items[i], {}, non_temporal(items[i])};
    const Slices& slices = cuts[i].item.slices = folded(items[i].slices);
    cuts[i].tiles = make_tiles(slices, elements_per_tile);
    ends[i] = tasks += slices.batch * cuts[i].tiles.count;
  }
  share_tasks(ends, elements, kThreadElements, threads, [&](size_t i, int64_t task) {
    const auto& [view, tiles, past_caches] = cuts[i];
    const Item item = matrix_of(view, task / tiles.count);
    const int64_t tile = task % tiles.count;
    const int64_t row = tile / tiles.strips * tiles.rows_per_tile;
    const int64_t column = tile % tiles.strips * tiles.columns_per_tile;
    const int64_t columns = std::min(tiles.columns_per_tile, tiles.columns - column);
    if (tiles.runs) {
      on_runs(item, column, columns, past_caches);
    } else {
      const int64_t rows = std::min(tiles.rows_per_tile, tiles.rows - row);
      const bool* keep = item.keep + column / item.slices.inner;
      const int64_t first = row * tiles.columns + column;
      on_columns(item, ColumnPart{first, rows, tiles.columns, columns, keep}, past_caches);
    }
    if (past_caches) finish_non_temporal();
  });
}

WritePart part_at(const WriteItem& item, int64_t element, bool non_temporal) {
  const int64_t offset = element * element_bytes(item.type);
  const auto at = [offset](const void* base) -> const void* {
    return base == nullptr ? nullptr : static_cast<const char*>(base) + offset;
  };
  const auto into = [offset](void* base) -> void* {
    return base == nullptr ? nullptr : static_cast<char*>(base) + offset;
  };
  return {at(item.mask), at(item.original), into(item.new_mask), into(item.weight), non_temporal};
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

// Zeros the pruned channels among `length` elements from this one on.
void zero_runs(const ZeroItem& item, int64_t element, int64_t length, bool non_temporal) {
  const int64_t inner = item.slices.inner;
  const int64_t bytes = element_bytes(item.type);
  const int64_t end = element + length;
  while (element < end) {
    const int64_t run = element / inner;
    const int64_t n = std::min((run + 1) * inner, end) - element;
    if (!item.keep[run % item.slices.channels]) {
      char* out = static_cast<char*>(item.elements) + element * bytes;
      if (non_temporal) {
        zero_non_temporal(out, n * bytes);
      } else {
        std::memset(out, 0, n * bytes);
      }
    }
    element += n;
  }
}

}  // namespace

void write(const WriteItem* items, size_t count, int64_t bytes_of_call, const Threads& threads) {
  visit(
      items, count, kTileElements, threads,
      [bytes_of_call](const WriteItem& item) {
        return pays_non_temporal(item.new_mask, item.slices.elements() * element_bytes(item.type),
                                 bytes_of_call);
      },
      [](const WriteItem& item, const ColumnPart& part, bool non_temporal) {
        instructions().write_columns[static_cast<int>(item.type)](
            part_at(item, part.element, non_temporal), part.rows, part.row_stride, part.columns,
            item.slices.inner, part.keep);
      },
      [](const WriteItem& item, int64_t element, int64_t length, bool non_temporal) {
        instructions().write_runs[static_cast<int>(item.type)](part_at(item, element, non_temporal),
                                                               element, length, item.slices.inner,
                                                               item.slices.channels, item.keep);
      });
}

void zero(const ZeroItem* items, size_t count, const Threads& threads) {
  int64_t bytes = 0;
  for (size_t i = 0; i < count; ++i) {
    bytes += items[i].slices.elements() * element_bytes(items[i].type);
  }
  visit(
      items, count, kZeroTileElements, threads,
      [bytes](const ZeroItem& item) {
        return pays_non_temporal(item.elements, item.slices.elements() * element_bytes(item.type),
                                 bytes);
      },
      [](const ZeroItem& item, const ColumnPart& part, bool) {
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
      zero_runs);
}

int64_t write_tasks(const Slices& slices, int64_t threads) {
  return write_tiles(slices, kTileElements, threads);
}

int64_t zero_tasks(const Slices& slices, int64_t threads) {
  return write_tiles(slices, kZeroTileElements, threads);
}

}  // namespace lnprune::cpu
