// The rank step on the CPU: fixed chunks of each tensor shared among threads, folded in order.
#include <algorithm>
#include <memory>
#include <vector>

#include "instruction_sets.h"

namespace lnprune::cpu {
namespace {

// Constants of the algorithm: the result depends on them and the shape, never on the threads.
// Where channels are columns, a chunk is about an eighth of the rows, within these bounds; more
// rows where they are narrow, so that a chunk is worth its start.
constexpr int64_t kFewestRows = 64;
constexpr int64_t kMostRows = 512;
constexpr int64_t kNarrowChunkElements = 262144;
// Where channels are runs: a channel's share of a chunk.
constexpr int64_t kRunElementsPerChunk = 65536;
// A task is at least about this many elements where the shape allows: some ten microseconds of
// work.
constexpr int64_t kTaskElements = 65536;

// How one item is cut: outer_chunks * run_chunks chunks, each with one partial per channel; tasks
// are chunks further cut into strips of channels.
struct Cutting {
  int64_t rows_per_chunk;
  int64_t outer_chunks;
  int64_t run_per_chunk;
  int64_t run_chunks;
  int64_t channels_per_strip;
  int64_t strips;
  int64_t first_task;
  int64_t first_partial;

  int64_t chunks() const { return outer_chunks * run_chunks; }
  int64_t tasks() const { return chunks() * strips; }
};

Cutting cut(const Slices& slices) {
  Cutting cutting{};
  cutting.run_per_chunk = slices.inner;
  if (slices.inner < kShortestRun) {
    const int64_t most = std::max(kMostRows, kNarrowChunkElements / slices.row());
    cutting.rows_per_chunk = std::clamp(divide_up(slices.outer, 8), kFewestRows, most);
    cutting.channels_per_strip = kColumns / slices.inner;
  } else {
    if (slices.inner > kRunElementsPerChunk) cutting.run_per_chunk = kRunElementsPerChunk;
    cutting.rows_per_chunk = std::max<int64_t>(1, kRunElementsPerChunk / slices.inner);
    const int64_t rows = std::min(cutting.rows_per_chunk, slices.outer);
    cutting.channels_per_strip =
        std::max<int64_t>(1, kTaskElements / (rows * cutting.run_per_chunk));
  }
  cutting.channels_per_strip = std::min(cutting.channels_per_strip, slices.channels);
  cutting.outer_chunks = divide_up(slices.outer, cutting.rows_per_chunk);
  cutting.run_chunks = divide_up(slices.inner, cutting.run_per_chunk);
  cutting.strips = divide_up(slices.channels, cutting.channels_per_strip);
  return cutting;
}

struct Job {
  const RankItem* items;
  const Cutting* cuttings;
  size_t count;
  NormOrder order;
  uint64_t* partials;
};

size_t item_of_task(const Job& job, int64_t task) {
  size_t low = 0;
  size_t high = job.count;
  while (high - low > 1) {
    const size_t middle = (low + high) / 2;
    (job.cuttings[middle].first_task <= task ? low : high) = middle;
  }
  return low;
}

void reduce_tasks(void* context, int64_t begin, int64_t end) {
  const Job& job = *static_cast<const Job*>(context);
  size_t i = item_of_task(job, begin);
  for (int64_t task = begin; task < end; ++task) {
    while (task >= job.cuttings[i].first_task + job.cuttings[i].tasks()) ++i;
    const RankItem& item = job.items[i];
    const Cutting& cutting = job.cuttings[i];
    const int64_t local = task - cutting.first_task;
    const int64_t strip = local % cutting.strips;
    const int64_t chunk = local / cutting.strips;
    const int64_t row = chunk / cutting.run_chunks * cutting.rows_per_chunk;
    const int64_t run = chunk % cutting.run_chunks * cutting.run_per_chunk;
    const int64_t channel = strip * cutting.channels_per_strip;
    const int type = static_cast<int>(item.type);
    const int64_t offset = row * item.slices.row() + channel * item.slices.inner + run;
    const Chunk part{static_cast<const char*>(item.elements) + offset * element_bytes(item.type),
                     std::min(cutting.rows_per_chunk, item.slices.outer - row),
                     item.slices.row(),
                     std::min(cutting.channels_per_strip, item.slices.channels - channel),
                     item.slices.inner,
                     std::min(cutting.run_per_chunk, item.slices.inner - run)};
    uint64_t* partials =
        job.partials + cutting.first_partial + chunk * item.slices.channels + channel;
    instructions().reduce[type][static_cast<int>(job.order.kind)](part, job.order.p, partials);
  }
}

void finish_items(void* context, int64_t begin, int64_t end) {
  const Job& job = *static_cast<const Job*>(context);
  for (int64_t i = begin; i < end; ++i) {
    const RankItem& item = job.items[i];
    const Cutting& cutting = job.cuttings[i];
    instructions().finish[static_cast<int>(item.type)][static_cast<int>(job.order.kind)](
        job.partials + cutting.first_partial, cutting.chunks(), item.slices.channels,
        item.slices.channels, job.order.p, item.norms);
  }
}

}  // namespace

void rank(const RankItem* items, size_t count, NormOrder order, ParallelFor parallel_for) {
  std::vector<Cutting> cuttings(count);
  int64_t tasks = 0;
  int64_t partials = 0;
  int64_t elements = 0;
  for (size_t i = 0; i < count; ++i) {
    cuttings[i] = cut(items[i].slices);
    cuttings[i].first_task = tasks;
    cuttings[i].first_partial = partials;
    tasks += cuttings[i].tasks();
    partials += cuttings[i].chunks() * items[i].slices.channels;
    elements += items[i].slices.elements();
  }
  const std::unique_ptr<uint64_t[]> storage(new uint64_t[partials]);
  Job job{items, cuttings.data(), count, order, storage.get()};
  // So that no thread starts for less than a task's worth of elements.
  const int64_t grain =
      std::max<int64_t>(1, kTaskElements * tasks / std::max<int64_t>(1, elements));
  parallel_for(tasks, grain, reduce_tasks, &job);
  const int64_t items_per_thread = partials < kTaskElements ? static_cast<int64_t>(count) : 1;
  parallel_for(static_cast<int64_t>(count), items_per_thread, finish_items, &job);
}

}  // namespace lnprune::cpu
