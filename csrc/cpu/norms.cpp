// The rank step on the CPU: fixed chunks of each tensor shared among threads, folded in order.
#include <algorithm>
#include <array>
#include <memory>
#include <vector>

#include "instruction_sets.h"
#include "share.h"

namespace lnprune::cpu {
namespace {

// Constants of the algorithm: the result depends on them and the shape, never on the threads.
// Where channels are columns, a chunk is about an eighth of the rows, within these bounds; more
// rows where they are narrow, so that a chunk is worth its start.
constexpr int64_t kFewestRows = 64;
constexpr int64_t kMostRows = 512;
constexpr int64_t kNarrowChunkElements = 262144;
// Narrow rows are taken several at a time, side by side, up to this many columns.
constexpr int64_t kWideEnough = 512;
// Where channels are runs: a channel's share of a chunk.
constexpr int64_t kRunElementsPerChunk = 65536;

// What depends on the threads, and so must not change a bit: how chunks are cut into strips. A
// thread starts for this many elements, some ten microseconds of work, or more.
constexpr int64_t kThreadElements = 65536;
// Scaled elements are written to memory that stays in the caches, a strip of a chunk at a time: at
// most so many, of so many rows where channels are columns.
constexpr int64_t kScaledElements = 8192;
constexpr int64_t kScaledRows = 64;
// A strip has at least about this many columns: a cache line of float32.
constexpr int64_t kFewestColumns = 16;

// How each matrix of an item is cut into chunks, outer_chunks * run_chunks of them, and these into
// strips. A task is one strip of one chunk.
//
// Where rows are narrow, `groups` of them lie side by side as columns of their own: column
// g * row + j takes place j of every groups-th row, from row g on. There a strip is a range of
// these columns, and each has a partial. Elsewhere a strip is a range of channels, and each has a
// partial.
struct Chunks {
  int64_t rows_per_chunk;
  int64_t outer_chunks;
  int64_t run_per_chunk;
  int64_t run_chunks;
  int64_t groups;  // 1 where rows are not narrow
  int64_t places;  // columns or channels of a chunk, each with a partial
  int64_t places_per_strip;
  int64_t strips;
  int64_t first_partial;  // of the first matrix

  bool narrow() const { return groups > 1; }
  int64_t count() const { return outer_chunks * run_chunks; }
  int64_t tasks() const { return count() * strips; }  // of a matrix, as the partials
  int64_t partials() const { return count() * places; }
};

// `task_elements` is what a task should have, so that there are enough for all threads.
Chunks make_chunks(const Slices& slices, int64_t task_elements, bool merges_rows = true) {
  Chunks chunks{};
  chunks.run_per_chunk = slices.inner;
  chunks.groups = 1;
  chunks.places = slices.channels;
  if (slices.inner < kShortestRun) {
    const int64_t most = std::max(kMostRows, kNarrowChunkElements / slices.row());
    chunks.rows_per_chunk = std::clamp(divide_up(slices.outer, 8), kFewestRows, most);
    const int64_t rows = std::min(chunks.rows_per_chunk, slices.outer);
    int64_t inner = slices.inner;
    if (merges_rows && slices.row() < kWideEnough) {
      chunks.groups = std::min(kWideEnough / slices.row(), rows);
      if (chunks.narrow()) {
        chunks.places = chunks.groups * slices.row();
        inner = 1;
      }
    }
    const int64_t fewest = divide_up(kFewestColumns, inner);
    const int64_t wanted = task_elements * chunks.groups / rows / inner;
    chunks.places_per_strip =
        std::min(std::max(wanted / fewest, int64_t{1}) * fewest, kColumns / inner);
  } else {
    if (slices.inner > kRunElementsPerChunk) chunks.run_per_chunk = kRunElementsPerChunk;
    chunks.rows_per_chunk = std::max<int64_t>(1, kRunElementsPerChunk / slices.inner);
    const int64_t rows = std::min(chunks.rows_per_chunk, slices.outer);
    chunks.places_per_strip = std::max<int64_t>(
        1, std::min(task_elements, kThreadElements) / (rows * chunks.run_per_chunk));
  }
  chunks.places_per_strip = std::min(chunks.places_per_strip, chunks.places);
  chunks.outer_chunks = divide_up(slices.outer, chunks.rows_per_chunk);
  chunks.run_chunks = divide_up(slices.inner, chunks.run_per_chunk);
  chunks.strips = divide_up(chunks.places, chunks.places_per_strip);
  return chunks;
}

// The same of scaled elements that go through memory, whose strips depend on the shape alone.
Chunks make_buffered_chunks(const Slices& slices) {
  Chunks chunks{};
  chunks.groups = 1;
  chunks.places = slices.channels;
  chunks.run_per_chunk = std::min(slices.inner, kScaledElements);
  chunks.rows_per_chunk = slices.inner < kShortestRun
                              ? kScaledRows
                              : std::max<int64_t>(1, kScaledElements / slices.inner);
  const int64_t rows = std::min(chunks.rows_per_chunk, slices.outer);
  chunks.places_per_strip = std::min(
      chunks.places, std::max<int64_t>(1, kScaledElements / (rows * chunks.run_per_chunk)));
  chunks.outer_chunks = divide_up(slices.outer, chunks.rows_per_chunk);
  chunks.run_chunks = divide_up(slices.inner, chunks.run_per_chunk);
  chunks.strips = divide_up(chunks.places, chunks.places_per_strip);
  return chunks;
}

// The factors of each place in a run, one matrix after another, where they are not so already.
std::vector<double> expanded(const RankItem& item) {
  const DimInView& place = item.scaling.place;
  const int64_t inner = item.slices.inner;
  if (item.scaling.factors == nullptr || place.in_rows || place.length == inner) return {};
  const int64_t matrices = item.scaling.matrix == 0 ? 1 : item.slices.batch;
  std::vector<double> factors(matrices * inner);
  for (int64_t m = 0; m < matrices; ++m) {
    for (int64_t i = 0; i < inner; ++i) {
      const int64_t index = i / place.step % place.length;
      factors[m * inner + i] = item.scaling.factors[m * item.scaling.matrix + index];
    }
  }
  return factors;
}

// The same with a factor for each place in a run.
void use_expanded(RankItem& item, const std::vector<double>& factors) {
  if (factors.empty()) return;
  const int64_t inner = item.slices.inner;
  item.scaling = {factors.data(), {false, 1, inner}, item.scaling.matrix == 0 ? 0 : inner};
}

using ScaledLoop = void (*)(const Chunk&, const ChunkFactors&, double, void*);

// The loop that multiplies where it reads; null where scaled elements go through memory.
ScaledLoop scaled_loop(ElementType type, NormKind kind) {
  if (kind != NormKind::sum && kind != NormKind::sum_of_squares) return nullptr;
  return instructions().reduce_scaled[static_cast<int>(type)][kind == NormKind::sum ? 0 : 1];
}

// A part of one task: its rows begin at `row`, its runs at `run`.
void reduce_fused(const RankItem& item, const Chunk& part, int64_t row, int64_t run,
                  ScaledLoop reduce, double p, uint64_t* partials) {
  const DimInView& place = item.scaling.place;
  ChunkFactors factors{item.scaling.factors, place.in_rows, row, place.step, place.length};
  alignas(64) double of_columns[kColumns];
  if (!place.in_rows) {
    factors.values += run;
    if (part.run < kShortestRun) {
      const int64_t columns = part.channels * part.run;
      for (int64_t start = 0; start < columns; start += part.run) {
        std::copy_n(factors.values, part.run, of_columns + start);
      }
      factors.values = of_columns;
    }
  }
  reduce(part, factors, p, partials);
}

// The same through memory: scaled elements are ranked as those of a tensor of float64.
void reduce_buffered(const RankItem& item, const Chunk& part, int64_t row, int64_t run,
                     NormOrder order, uint64_t* partials) {
  alignas(64) double scaled[kScaledElements];
  alignas(64) double of_row[kScaledElements];
  const auto scale = instructions().scale[static_cast<int>(item.type)];
  const DimInView& place = item.scaling.place;
  const double* factors = item.scaling.factors + run;
  // Short runs are taken together, long ones one by one.
  int64_t runs = part.channels;
  int64_t length = part.run;
  if (part.run < kShortestRun && part.run == part.channel_stride) {
    length *= runs;
    runs = 1;
    for (int64_t j = 0; !place.in_rows && j < length; ++j) of_row[j] = factors[j % part.run];
    factors = of_row;
  }
  double* out = scaled;
  for (int64_t r = 0; r < part.rows; ++r) {
    if (place.in_rows) {
      factors = item.scaling.factors + (row + r) / place.step % place.length;
    }
    const char* elements =
        static_cast<const char*>(part.elements) + r * part.row_stride * element_bytes(item.type);
    for (int64_t c = 0; c < runs; ++c) {
      const int64_t offset = c * part.channel_stride * element_bytes(item.type);
      scale(elements + offset, length, factors, place.in_rows ? 0 : 1, out);
      out += length;
    }
  }
  const Chunk made{scaled, part.rows, part.channels * part.run, part.channels, part.run, part.run};
  const auto reduce = instructions().reduce[static_cast<int>(ElementType::float64)];
  reduce[static_cast<int>(order.kind)](made, order.p, partials);
}

// One strip of one chunk of narrow rows: those of its columns that meet one row more, and the
// others.
template <class Reduce>
void reduce_narrow(const RankItem& item, const Chunks& chunks, int64_t row, int64_t first,
                   int64_t end, Reduce reduce, double p, uint64_t* partials) {
  const int64_t rows = std::min(chunks.rows_per_chunk, item.slices.outer - row);
  const int64_t sweeps = rows / chunks.groups;
  const int64_t longer = std::clamp(rows % chunks.groups * item.slices.row(), first, end);
  const char* elements = static_cast<const char*>(item.elements);
  for (const auto& [begin, stop, of] : {std::array{first, longer, sweeps + 1},  //
                                        std::array{longer, end, sweeps}}) {
    if (begin == stop) continue;
    const int64_t offset = row * item.slices.row() + begin;
    reduce({elements + offset * element_bytes(item.type), of, chunks.places, stop - begin, 1, 1}, p,
           partials + begin - first);
  }
}

// One task of one matrix, whose partials these are.
void reduce_strip(const RankItem& item, const Chunks& chunks, int64_t task, NormOrder order,
                  uint64_t* partials) {
  const int64_t strip = task % chunks.strips;
  const int64_t chunk = task / chunks.strips;
  const int64_t row = chunk / chunks.run_chunks * chunks.rows_per_chunk;
  const int64_t run = chunk % chunks.run_chunks * chunks.run_per_chunk;
  const int64_t place = strip * chunks.places_per_strip;
  const int64_t places = std::min(chunks.places_per_strip, chunks.places - place);
  partials += chunk * chunks.places + place;
  const auto reduce =
      instructions().reduce[static_cast<int>(item.type)][static_cast<int>(order.kind)];
  if (chunks.narrow()) {
    reduce_narrow(item, chunks, row, place, place + places, reduce, order.p, partials);
    return;
  }
  const int64_t offset = row * item.slices.row() + place * item.slices.inner + run;
  const Chunk part{static_cast<const char*>(item.elements) + offset * element_bytes(item.type),
                   std::min(chunks.rows_per_chunk, item.slices.outer - row),
                   item.slices.row(),
                   places,
                   item.slices.inner,
                   std::min(chunks.run_per_chunk, item.slices.inner - run)};
  if (item.scaling.factors != nullptr) {
    const ScaledLoop fused = scaled_loop(item.type, order.kind);
    if (fused != nullptr) {
      reduce_fused(item, part, row, run, fused, order.p, partials);
    } else {
      reduce_buffered(item, part, row, run, order, partials);
    }
  } else {
    reduce(part, order.p, partials);
  }
}

}  // namespace

void rank(const RankItem* items, size_t count, NormOrder order, bool rooted,
          const Threads& threads) {
  std::vector<RankItem> views(items, items + count);
  std::vector<std::vector<double>> factors(count);
  std::vector<Chunks> chunks(count);
  std::vector<int64_t> ends(count);
  std::vector<int64_t> ends_of_matrices(count);
  int64_t tasks = 0;
  int64_t matrices = 0;
  int64_t partials = 0;
  int64_t elements = 0;
  for (size_t i = 0; i < count; ++i) elements += items[i].slices.elements();
  const int64_t elements_per_task = task_elements(elements, kThreadElements, threads.count);
  for (size_t i = 0; i < count; ++i) {
    factors[i] = expanded(items[i]);
    use_expanded(views[i], factors[i]);
    const Slices& slices = views[i].slices = folded(items[i]);
    const bool is_scaled = items[i].scaling.factors != nullptr;
    const bool is_buffered = is_scaled && scaled_loop(items[i].type, order.kind) == nullptr;
    chunks[i] = is_buffered ? make_buffered_chunks(slices)
                            : make_chunks(slices, elements_per_task, !is_scaled);
    chunks[i].first_partial = partials;
    ends[i] = tasks += slices.batch * chunks[i].tasks();
    ends_of_matrices[i] = matrices += slices.batch;
    partials += slices.batch * chunks[i].partials();
  }
  const std::unique_ptr<uint64_t[]> storage(new uint64_t[partials]);
  const auto partials_of = [&](size_t i, int64_t matrix) {
    return storage.get() + chunks[i].first_partial + matrix * chunks[i].partials();
  };
  share_tasks(ends, elements, kThreadElements, threads, [&](size_t i, int64_t task) {
    const int64_t matrix = task / chunks[i].tasks();
    reduce_strip(matrix_of(views[i], matrix), chunks[i], task % chunks[i].tasks(), order,
                 partials_of(i, matrix));
  });
  share_tasks(ends_of_matrices, partials, kThreadElements, threads, [&](size_t i, int64_t matrix) {
    const RankItem item = matrix_of(views[i], matrix);
    const Chunks& cut = chunks[i];
    const Partials folded{partials_of(i, matrix), cut.count(), cut.groups, item.slices.channels,
                          cut.narrow() ? item.slices.inner : 1};
    const ElementType type = item.scaling.factors == nullptr ? item.type : ElementType::float64;
    instructions().finish[static_cast<int>(type)][static_cast<int>(order.kind)](folded, order.p,
                                                                                rooted, item.norms);
  });
}

int64_t rank_tasks(const Slices& slices, int64_t threads) {
  const Slices view = folded(slices);
  const int64_t elements = task_elements(view.elements(), kThreadElements, threads);
  return view.batch * make_chunks(view, elements).tasks();
}

void root(const RootItem* items, size_t count, NormOrder order, const Threads& threads) {
  int64_t channels = 0;
  for (size_t i = 0; i < count; ++i) channels += items[i].channels;
  share_items(count, channels >= kThreadElements, threads, [&](int64_t i) {
    instructions().root[static_cast<int>(order.kind)](items[i].sums, items[i].channels, order.p,
                                                      items[i].norms);
  });
}

}  // namespace lnprune::cpu
