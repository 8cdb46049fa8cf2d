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

// How one item is cut into chunks, outer_chunks * run_chunks of them, each with one partial per
// channel. A task is one strip of channels of one chunk.
struct Chunks {
  int64_t rows_per_chunk;
  int64_t outer_chunks;
  int64_t run_per_chunk;
  int64_t run_chunks;
  int64_t channels_per_strip;
  int64_t strips;
  int64_t first_task;
  int64_t first_partial;

  int64_t count() const { return outer_chunks * run_chunks; }
  int64_t tasks() const { return count() * strips; }
};

Chunks make_chunks(const Slices& slices) {
  Chunks chunks{};
  chunks.run_per_chunk = slices.inner;
  if (slices.inner < kShortestRun) {
    const int64_t most = std::max(kMostRows, kNarrowChunkElements / slices.row());
    chunks.rows_per_chunk = std::clamp(divide_up(slices.outer, 8), kFewestRows, most);
    chunks.channels_per_strip = kColumns / slices.inner;
  } else {
    if (slices.inner > kRunElementsPerChunk) chunks.run_per_chunk = kRunElementsPerChunk;
    chunks.rows_per_chunk = std::max<int64_t>(1, kRunElementsPerChunk / slices.inner);
    const int64_t rows = std::min(chunks.rows_per_chunk, slices.outer);
    chunks.channels_per_strip = std::max<int64_t>(1, kTaskElements / (rows * chunks.run_per_chunk));
  }
  chunks.channels_per_strip = std::min(chunks.channels_per_strip, slices.channels);
  chunks.outer_chunks = divide_up(slices.outer, chunks.rows_per_chunk);
  chunks.run_chunks = divide_up(slices.inner, chunks.run_per_chunk);
  chunks.strips = divide_up(slices.channels, chunks.channels_per_strip);
  return chunks;
}

struct Job {
  const RankItem* items;
  const Chunks* chunks;
  size_t count;
  NormOrder order;
  bool rooted;
  uint64_t* partials;
};

size_t item_of_task(const Job& job, int64_t task) {
  size_t low = 0;
  size_t high = job.count;
  while (high - low > 1) {
    const size_t middle = (low + high) / 2;
    (job.chunks[middle].first_task <= task ? low : high) = middle;
  }
  return low;
}

void reduce_tasks(void* context, int64_t begin, int64_t end) {
  const Job& job = *static_cast<const Job*>(context);
  size_t i = item_of_task(job, begin);
  for (int64_t task = begin; task < end; ++task) {
    while (task >= job.chunks[i].first_task + job.chunks[i].tasks()) ++i;
    const RankItem& item = job.items[i];
    const Chunks& chunks = job.chunks[i];
    const int64_t local = task - chunks.first_task;
    const int64_t strip = local % chunks.strips;
    const int64_t chunk = local / chunks.strips;
    const int64_t row = chunk / chunks.run_chunks * chunks.rows_per_chunk;
    const int64_t run = chunk % chunks.run_chunks * chunks.run_per_chunk;
    const int64_t channel = strip * chunks.channels_per_strip;
    const int type = static_cast<int>(item.type);
    const int64_t offset = row * item.slices.row() + channel * item.slices.inner + run;
    const Chunk part{static_cast<const char*>(item.elements) + offset * element_bytes(item.type),
                     std::min(chunks.rows_per_chunk, item.slices.outer - row),
                     item.slices.row(),
                     std::min(chunks.channels_per_strip, item.slices.channels - channel),
                     item.slices.inner,
                     std::min(chunks.run_per_chunk, item.slices.inner - run)};
    uint64_t* partials =
        job.partials + chunks.first_partial + chunk * item.slices.channels + channel;
    instructions().reduce[type][static_cast<int>(job.order.kind)](part, job.order.p, partials);
  }
}

void finish_items(void* context, int64_t begin, int64_t end) {
  const Job& job = *static_cast<const Job*>(context);
  for (int64_t i = begin; i < end; ++i) {
    const RankItem& item = job.items[i];
    const Chunks& chunks = job.chunks[i];
    instructions().finish[static_cast<int>(item.type)][static_cast<int>(job.order.kind)](
        job.partials + chunks.first_partial, chunks.count(), item.slices.channels,
        item.slices.channels, job.order.p, job.rooted, item.norms);
  }
}

}  // namespace

void rank(const RankItem* items, size_t count, NormOrder order, bool rooted,
          ParallelFor parallel_for) {
  std::vector<Chunks> chunks(count);
  int64_t tasks = 0;
  int64_t partials = 0;
  int64_t elements = 0;
  for (size_t i = 0; i < count; ++i) {
    chunks[i] = make_chunks(items[i].slices);
    chunks[i].first_task = tasks;
    chunks[i].first_partial = partials;
    tasks += chunks[i].tasks();
    partials += chunks[i].count() * items[i].slices.channels;
    elements += items[i].slices.elements();
  }
  const std::unique_ptr<uint64_t[]> storage(new uint64_t[partials]);
  Job job{items, chunks.data(), count, order, rooted, storage.get()};
  // So that no thread starts for less than a task's worth of elements.
  const int64_t grain =
      std::max<int64_t>(1, kTaskElements * tasks / std::max<int64_t>(1, elements));
  parallel_for(tasks, grain, reduce_tasks, &job);
  const int64_t items_per_thread = partials < kTaskElements ? static_cast<int64_t>(count) : 1;
  parallel_for(static_cast<int64_t>(count), items_per_thread, finish_items, &job);
}

void root(const RootItem* items, size_t count, NormOrder order, ParallelFor parallel_for) {
  struct Roots {
    const RootItem* items;
    NormOrder order;
  };
  int64_t channels = 0;
  for (size_t i = 0; i < count; ++i) channels += items[i].channels;
  const auto take_roots = [](void* context, int64_t begin, int64_t end) {
    const auto& [all, order] = *static_cast<const Roots*>(context);
    for (int64_t i = begin; i < end; ++i) {
      instructions().root[static_cast<int>(order.kind)](all[i].sums, all[i].channels, order.p,
                                                        all[i].norms);
    }
  };
  Roots roots{items, order};
  const int64_t items_per_thread = channels < kTaskElements ? static_cast<int64_t>(count) : 1;
  parallel_for(static_cast<int64_t>(count), items_per_thread, take_roots, &roots);
}

}  // namespace lnprune::cpu
