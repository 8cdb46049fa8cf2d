// How tensors are cut into blocks, and the order of the launches.
#include "launches.h"

#include <algorithm>
#include <numeric>

namespace lnprune::cuda {
namespace {

// Runs at least this long are reduced along themselves, shorter ones as columns.
constexpr int64_t kShortestRun = 64;
// Where channels are runs: a channel's share of a chunk, in elements.
constexpr int64_t kRunChunk = 16384;
// Vectors that a thread should find in a run: as many loads are in flight. More in large tensors,
// which have blocks enough, so that a block's start and end weigh less.
constexpr int64_t kVectorsPerLane = 4;
constexpr int64_t kMostVectorsPerLane = 16;
// Where channels are columns: vectors along a strip, half a kilobyte, and rows that a group should
// find.
constexpr int64_t kStripVectors = 32;
constexpr int64_t kRowsPerGroup = 4;
// How many times as many rows a large tensor's chunks have at most.
constexpr int64_t kMostChunkGrowth = 4;
// Blocks that keep every multiprocessor busy for several turns.
constexpr int64_t kManyBlocks = 2048;
// With fewer rows than this a block is one wide strip.
constexpr int64_t kFewRows = 32;
// A chunk's partials are written and read once, 8 bytes each: at most a 64th of its elements.
constexpr int64_t kBytesPerPartial = 2 * 8 * 64;

int64_t power_of_two_below(int64_t n) {
  int64_t power = 1;
  while (2 * power <= n) power *= 2;
  return power;
}

bool is_aligned(const void* address, int64_t bytes = 16) {
  return reinterpret_cast<uintptr_t>(address) % bytes == 0;
}

// Elements of a vector of the rank step.
int64_t vector_length(int64_t bytes) { return rank_vector_bytes(static_cast<int>(bytes)) / bytes; }

// Rows whose runs begin at different places within a vector cannot share a chunk of runs.
bool is_uneven(const Slices& slices, int64_t bytes) {
  return slices.outer > 1 && slices.inner % vector_length(bytes) != 0;
}

void cut_runs(RankTask& task, const Slices& slices, int64_t bytes) {
  RunCut& cut = task.run_cut;
  const int64_t vector = vector_length(bytes);
  const bool whole_vectors = slices.inner % vector == 0;
  const bool has_one_run = slices.batch * slices.outer * slices.channels == 1;
  cut.rows = slices.outer;
  cut.row_elements = slices.row();
  cut.run_per_chunk = static_cast<int>(std::min(slices.inner, kRunChunk));
  cut.run_chunks = static_cast<int>(divide_up(slices.inner, cut.run_per_chunk));
  cut.rows_per_chunk = static_cast<int>(
      is_uneven(slices, bytes) ? 1 : std::max<int64_t>(1, kRunChunk / slices.inner));
  const int64_t vectors_per_lane = std::clamp(slices.elements() / (kManyBlocks * kThreads * vector),
                                              kVectorsPerLane, kMostVectorsPerLane);
  const int64_t lanes = power_of_two_below(cut.run_per_chunk / (vectors_per_lane * vector));
  cut.lanes = static_cast<int>(std::clamp<int64_t>(lanes, 4, kThreads));
  const int64_t rows = power_of_two_below(std::min<int64_t>(cut.rows_per_chunk, slices.outer));
  cut.groups = static_cast<int>(std::min<int64_t>(kThreads / cut.lanes, rows));
  cut.channels_per_strip = kThreads / (cut.lanes * cut.groups);
  task.chunks = static_cast<int>(divide_up(slices.outer, cut.rows_per_chunk) * cut.run_chunks);
  task.strips = static_cast<int>(divide_up(slices.channels, cut.channels_per_strip));
  task.aligned = is_aligned(task.elements, vector * bytes) && (has_one_run || whole_vectors);
}

void cut_columns(RankTask& task, const Slices& slices, int64_t bytes) {
  ColumnCut& cut = task.column_cut;
  const int64_t vector = vector_length(bytes);
  const int64_t row = slices.row();
  // Narrow rows are taken several at a time, as many as make a row of whole vectors.
  const int64_t whole = vector / std::gcd(vector, row);
  int64_t merged = 1;
  if (whole * row <= 2 * kStripVectors * vector && whole <= slices.outer) {
    merged = whole * std::max<int64_t>(1, kStripVectors * vector / (whole * row));
    merged = std::min(merged, slices.outer / whole * whole);
  }
  cut.row_elements = merged * row;
  cut.rows = divide_up(slices.outer, merged);
  cut.elements = slices.matrix();
  const bool few_rows = cut.rows < kFewRows;
  // Strips of whole channels and whole vectors.
  const int64_t strip_vectors = few_rows ? kThreads : kStripVectors;
  if (cut.row_elements <= strip_vectors * vector || merged > 1) {
    cut.columns_per_strip = static_cast<int>(cut.row_elements);
    cut.channels_per_strip = static_cast<int>(slices.channels);
    task.strips = 1;
  } else {
    // Vectors stay whole where rows are aligned and a block is wide enough for it.
    const int64_t whole_unit = std::lcm(slices.inner, vector);
    const bool keeps_vectors = row % vector == 0 && whole_unit <= kThreads * vector;
    const int64_t unit = keeps_vectors ? whole_unit : slices.inner;
    cut.columns_per_strip =
        static_cast<int>(std::max<int64_t>(1, strip_vectors * vector / unit) * unit);
    cut.channels_per_strip = cut.columns_per_strip / static_cast<int>(slices.inner);
    task.strips = static_cast<int>(divide_up(slices.channels, cut.channels_per_strip));
  }
  cut.lanes = static_cast<int>(divide_up(cut.columns_per_strip, vector));
  cut.groups = few_rows ? 1 : kThreads / cut.lanes;
  const int64_t merged_inner = slices.inner * merged;
  const int64_t fewest =
      std::max(divide_up(kBytesPerPartial, merged_inner * bytes), kRowsPerGroup * cut.groups);
  cut.rows_per_chunk = static_cast<int>(few_rows ? cut.rows
                                                 : std::clamp(cut.rows * task.strips / kManyBlocks,
                                                              fewest, kMostChunkGrowth * fewest));
  task.chunks = static_cast<int>(divide_up(cut.rows, cut.rows_per_chunk));
  task.aligned = is_aligned(task.elements, vector * bytes) && cut.row_elements % vector == 0 &&
                 (task.strips == 1 || cut.columns_per_strip % vector == 0) &&
                 (slices.batch == 1 || slices.matrix() % vector == 0);
}

ScaledRankTask make_task(const RankItem& item, const Slices& slices, bool counts, bool rooted) {
  ScaledRankTask task{};
  task.scaling = item.scaling;
  task.row = slices.row();
  const int64_t bytes = element_bytes(item.type);
  task.type = item.type;
  task.elements = item.elements;
  task.norms = item.norms;
  task.batch = static_cast<int>(slices.batch);
  task.matrix = slices.matrix();
  task.channels = slices.channels;
  task.inner = slices.inner;
  task.counts = counts;
  task.rooted = rooted;
  // Uneven runs that fit a block are columns too.
  task.runs =
      slices.inner >= (is_uneven(slices, bytes) ? kThreads * vector_length(bytes) : kShortestRun);
  (task.runs ? cut_runs : cut_columns)(task, slices, bytes);
  return task;
}

template <class Item>
TileTask<Item> make_tiles(const Item& item) {
  TileTask<Item> task{};
  task.item = item;
  task.item.slices = folded(item.slices);
  task.elements = task.item.slices.matrix();
  task.tiles = divide_up(task.elements, tile_elements(item.type));
  return task;
}

// Whether all matrices begin where vectors of 16 bytes can.
bool has_vectors(const Slices& slices, ElementType type) {
  return slices.batch == 1 || slices.matrix() * element_bytes(type) % 16 == 0;
}

WriteTask make_task(const WriteItem& item) {
  WriteTask task = make_tiles(item);
  task.vectors = is_aligned(item.mask) && is_aligned(item.original) && is_aligned(item.new_mask) &&
                 is_aligned(item.weight) && has_vectors(task.item.slices, item.type);
  return task;
}

ZeroTask make_task(const ZeroItem& item) {
  ZeroTask task = make_tiles(item);
  // Where runs end within vectors there is a store for each element of these, and lanes store far
  // from one another: worth it where few vectors are such.
  const int64_t length = 16 / element_bytes(item.type);
  const int64_t inner = item.slices.inner;
  task.vectors = is_aligned(item.elements) && (inner % length == 0 || inner >= 2 * length * length);
  task.vectors = task.vectors && has_vectors(task.item.slices, item.type);
  return task;
}

bool is_float8(ElementType type) { return element_bytes(type) == 1; }

// One dtype for all of its size: zero has the same bits in each.
ElementType type_of_size(ElementType type) {
  switch (element_bytes(type)) {
    case 2: return ElementType::float16;
    case 1: return ElementType::float8_e4m3fn;
    default: return type;
  }
}

template <class Task>
void add(std::vector<Batch<Task>>& batches, ElementType type, const Task& task, int64_t blocks) {
  auto batch = std::find_if(batches.begin(), batches.end(), [type](const Batch<Task>& other) {
    return other.type == type && !other.is_full();
  });
  if (batch == batches.end()) batch = batches.insert(batch, {type, {}, {}, 0});
  batch->tasks.push_back(task);
  batch->first_blocks.push_back(static_cast<unsigned>(batch->blocks));
  batch->blocks += blocks;
}

// Whether the rank step makes a selection too: of what it ranks itself, and of few enough channels.
bool is_of_rank(const Steps& steps, size_t i) {
  const SelectItem& item = steps.selections[i];
  const bool scored = i < steps.scores.size() && steps.scores[i].norms == item.norms;
  const bool counted = item.mask_counts == nullptr ||
                       (i < steps.masks.size() && steps.masks[i].norms == item.mask_counts);
  if (!scored || !counted) return false;
  // Each ranking has to be a matrix of its own.
  const auto is_apart = [&](const RankItem& ranked) {
    return ranked.slices.batch == item.rankings;
  };
  const bool apart =
      is_apart(steps.scores[i]) && (item.mask_counts == nullptr || is_apart(steps.masks[i]));
  return apart && item.channels <= kMostChannelsOfRank;
}

template <class Task>
cudaError_t launch_rank(const Batch<Task>& batch, NormOrder order, RankMemory memory,
                        cudaStream_t stream) {
  switch (batch.type) {
    case ElementType::float64: return launch_rank_of<double>(batch, order, memory, stream);
    case ElementType::float32: return launch_rank_of<float>(batch, order, memory, stream);
    case ElementType::float16: return launch_rank_of<c10::Half>(batch, order, memory, stream);
    case ElementType::bfloat16: return launch_rank_of<c10::BFloat16>(batch, order, memory, stream);
    default: return launch_rank_of<Float8>(batch, order, memory, stream);
  }
}

// launch(batch) for each batch, up to the first that fails.
template <class Task, class Launch>
cudaError_t run_batches(const std::vector<Batch<Task>>& batches, Launch launch) {
  cudaError_t error = cudaSuccess;
  for (size_t b = 0; b < batches.size() && error == cudaSuccess; ++b) error = launch(batches[b]);
  return error;
}

}  // namespace

Launches::Launches(const Steps& steps) : order_(steps.order) {
  std::vector<bool> selects(steps.selections.size());
  for (size_t i = 0; i < selects.size(); ++i) selects[i] = is_of_rank(steps, i);
  std::vector<ScaledRankTask> tasks;
  for (const auto* items : {&steps.scores, &steps.masks}) {
    for (size_t i = 0; i < items->size(); ++i) {
      const RankItem& item = (*items)[i];
      const bool is_apart = i < selects.size() && selects[i];
      tasks.push_back(make_task(item, is_apart ? item.slices : folded(item), items == &steps.masks,
                                steps.rooted));
    }
  }
  for (ScaledRankTask& task : tasks) {
    if (task.chunks == 1) continue;
    task.first_ticket = static_cast<unsigned>(tickets_);
    task.first_partial = static_cast<int64_t>(partials_);
    tickets_ += static_cast<size_t>(task.batch) * task.strips;
    partials_ += task.batch * task.chunks * task.channels;
  }
  for (size_t i = 0; i < steps.selections.size(); ++i) {
    const SelectItem& item = steps.selections[i];
    if (!selects[i]) {
      const int64_t tiles = select_tiles(item);
      // Norms are all of one type.
      add(selections_, ElementType::float64, SelectTask{item}, item.rankings * tiles);
      continue;
    }
    std::vector<RankTask*> parts{&tasks[i]};
    if (item.mask_counts != nullptr) parts.push_back(&tasks[steps.scores.size() + i]);
    int strips = 0;
    for (const RankTask* part : parts) strips += part->strips;
    for (RankTask* part : parts) {
      part->selection = item;
      part->selection_ticket = static_cast<unsigned>(tickets_);
      part->selection_strips = strips;
    }
    if (strips > 1) tickets_ += item.rankings;
  }
  for (const ScaledRankTask& task : tasks) {
    const ElementType type = is_float8(task.type) ? ElementType::float8_e4m3fn : task.type;
    const int64_t blocks = int64_t{task.batch} * task.chunks * task.strips;
    if (task.scaling.factors == nullptr) {
      add<RankTask>(ranks_, type, task, blocks);
    } else {
      add(scaled_ranks_, type, task, blocks);
    }
  }
  for (const RootItem& item : steps.sums) {
    add(roots_, ElementType::float64, RootTask{item}, divide_up(item.channels, kThreads));
  }
  for (const WriteItem& item : steps.writes) {
    const WriteTask task = make_task(item);
    add(writes_, item.type, task, task.item.slices.batch * task.tiles);
  }
  for (const ZeroItem& item : steps.zeros) {
    const ZeroTask task = make_task(item);
    add(zeros_, type_of_size(item.type), task, task.item.slices.batch * task.tiles);
  }
}

cudaError_t Launches::run(void* partials, unsigned* tickets, cudaStream_t stream) const {
  const RankMemory memory{static_cast<uint64_t*>(partials), tickets};
  const auto rank = [&](const auto& batch) { return launch_rank(batch, order_, memory, stream); };
  const auto root = [&](const auto& batch) { return launch_root(batch, order_, stream); };
  const auto select = [&](const auto& batch) { return launch_select(batch, stream); };
  const auto write = [&](const auto& batch) { return launch_write(batch, stream); };
  const auto zero = [&](const auto& batch) { return launch_zero(batch, stream); };
  cudaError_t error = run_batches(ranks_, rank);
  if (error == cudaSuccess) error = run_batches(scaled_ranks_, rank);
  if (error == cudaSuccess) error = run_batches(roots_, root);
  if (error == cudaSuccess) error = run_batches(selections_, select);
  if (error == cudaSuccess) error = run_batches(writes_, write);
  if (error == cudaSuccess) error = run_batches(zeros_, zero);
  return error;
}

}  // namespace lnprune::cuda
