// The launches of one call: the tables that the kernels read as parameters, and their order.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

#include "../kernels.h"
#include "language.h"

namespace lnprune::cuda {

// Threads of a block in every step but the select step.
constexpr int kThreads = 256;

// Keys that a thread holds where the rank step selects, and the channels of a tensor up to which it
// does: what one block holds in its registers. docs/cuda.md says what more would cost.
constexpr int kRankKeys = 16;
constexpr int64_t kMostChannelsOfRank = kThreads * kRankKeys;

// The same of the select step, where a block reads all channels and writes the flags of a tile.
constexpr int kSelectThreads = 512;
constexpr int kSelectKeys = 16;
constexpr int64_t kSelectTile = kSelectThreads * kSelectKeys;

// Bytes of parameters that every kernel can have, and that kernels of CUDA 12.1 and later can,
// which ask for a driver of 530 or later. A launch moves all that its kernel was compiled for:
// calls on few tensors have kernels with little.
constexpr int kParameterBytes = 4096;
constexpr int kMostParameterBytes = 32764;
constexpr int kOtherParameters = 32;  // beside the table, with what aligns its parts

// Bytes of a vector in the rank step. Eight elements of one byte are as many as the registers of a
// thread have room to sum.
constexpr int rank_vector_bytes(int element_bytes) { return element_bytes == 1 ? 8 : 16; }

// How a tensor is cut whose channels are runs. A chunk is a part of each run, in some rows; in a
// strip, each channel has a team of lanes * groups threads.
struct RunCut {
  int64_t rows;
  int64_t row_elements;
  int rows_per_chunk;
  int run_per_chunk;
  int run_chunks;
  int lanes;   // threads side by side along a run
  int groups;  // groups of lanes, each with rows of its own
  int channels_per_strip;
};

// How a tensor is cut whose channels are columns. A chunk is some rows, which hold one or more rows
// of the tensor and follow one another without gaps, the last one possibly shorter.
struct ColumnCut {
  int64_t rows;
  int64_t row_elements;
  int64_t elements;  // of the tensor
  int rows_per_chunk;
  int lanes;               // threads side by side along a strip
  int groups;              // groups of lanes, each with rows of its own
  int channels_per_strip;  // of one row of the tensor
  int columns_per_strip;
};

// One tensor to rank. Each of its matrices is cut into chunks of rows, and its channels into
// strips; a block reduces one strip of one chunk. How a matrix is cut follows from its shape and
// dtype alone, so that the order of every sum does too.
struct RankTask {
  const void* elements;
  double* norms;
  int64_t first_partial;  // of [batch][chunks][channels], where there is more than one chunk
  unsigned first_ticket;  // of [batch][strips], where there is more than one chunk
  int batch;              // matrices
  int64_t matrix;         // elements of each
  int64_t channels;       // of a matrix, as all that follows
  int64_t inner;
  int chunks;
  int strips;
  union {
    RunCut run_cut;
    ColumnCut column_cut;
  };
  // Where the last block to rank a matrix, or its mask, selects as well; null flags elsewhere.
  SelectItem selection;
  unsigned selection_ticket;  // of [batch]
  int selection_strips;       // of a matrix and its mask
  ElementType type;
  bool runs;     // which of the two it is
  bool aligned;  // rows begin where vectors can; changes no order
  bool counts;   // how many elements are not zero, whatever the order
  bool rooted;   // norms, not the sums before the root
};

// The same of a tensor whose elements are multiplied by factors first.
struct ScaledRankTask : RankTask {
  Scaling scaling;
  int64_t row;  // elements of a row of the tensor
};

// What the blocks of a call to rank hand each other.
struct RankMemory {
  uint64_t* partials;
  unsigned* tickets;  // how many blocks of a strip, or strips of a tensor, have finished
};

// Sums to take the roots of: a thread for each channel.
struct RootTask {
  RootItem item;
};

// Rankings to cut. A block writes the flags of one tile of one of them.
struct SelectTask {
  SelectItem item;
};

// Of one ranking.
LNPRUNE_FUNCTION int64_t select_tiles(const SelectItem& item) {
  return item.channels > kSelectTile ? (item.channels - 1) / kSelectTile + 1 : 1;
}

// One tensor to write or to zero, each of its matrices cut into tiles. A block takes one of them.
template <class Item>
struct TileTask {
  Item item;
  int64_t elements;  // of a matrix, as the tiles
  int64_t tiles;
  bool vectors;  // threads take whole vectors, not single elements side by side
};
using WriteTask = TileTask<WriteItem>;
using ZeroTask = TileTask<ZeroItem>;

// The tasks of one launch, and the first block of each. It travels as a parameter of the kernel,
// which reads it from the constant bank.
template <class Task, int kBytes>
struct Table {
  static constexpr int kCapacity =
      (kBytes - kOtherParameters) / static_cast<int>(sizeof(Task) + sizeof(unsigned));
  int count;
  unsigned first_blocks[kCapacity];
  Task tasks[kCapacity];
};

// What a block works on: a task, the last that begins at or before it, and which of its blocks it
// is.
struct Place {
  int task;
  int64_t block;
};

// Each thread searches for itself: what the lanes of a warp read together is one access.
template <class Table>
__device__ __forceinline__ Place place_of_block(const Table& table, unsigned block) {
  int low = 0;
#pragma unroll 1
  for (int high = table.count; high - low > 1;) {
    const int middle = (low + high) / 2;
    (table.first_blocks[middle] <= block ? low : high) = middle;
  }
  return {low, static_cast<int64_t>(block) - table.first_blocks[low]};
}

// The most bytes of parameters that a step's kernels are compiled for.
template <class Task>
constexpr int kMostBytesOf = kMostParameterBytes;
template <>
constexpr int kMostBytesOf<ScaledRankTask> = kParameterBytes;

// One launch: tasks of one dtype; in the rank step, of any dtypes of eight bits, and in the zero
// step, of any dtypes of one size.
template <class Task>
struct Batch {
  using FewTasks = Table<Task, kParameterBytes>;
  using ManyTasks = Table<Task, kMostBytesOf<Task>>;

  ElementType type;
  std::vector<Task> tasks;
  std::vector<unsigned> first_blocks;
  int64_t blocks = 0;

  bool is_full() const { return tasks.size() == ManyTasks::kCapacity; }

  // launch(table) with all tasks in a table of the smaller size that holds them.
  template <class Launch>
  cudaError_t with_table(Launch launch) const {
    if constexpr (!std::is_same_v<FewTasks, ManyTasks>) {
      if (tasks.size() > FewTasks::kCapacity) return launch(filled<ManyTasks>());
    }
    return launch(filled<FewTasks>());
  }

 private:
  template <class Table>
  Table filled() const {
    Table table;
    table.count = static_cast<int>(tasks.size());
    std::copy(tasks.begin(), tasks.end(), table.tasks);
    std::copy(first_blocks.begin(), first_blocks.end(), table.first_blocks);
    return table;
  }
};

class Launches {
 public:
  explicit Launches(const Steps& steps);

  // Device memory that the launches need, whatever it holds.
  size_t bytes() const { return partials_ * sizeof(uint64_t); }
  // Counters that are zero before the launches, and zero again after them.
  size_t tickets() const { return tickets_; }

  // Enqueues the kernels.
  cudaError_t run(void* partials, unsigned* tickets, cudaStream_t stream) const;

 private:
  std::vector<Batch<RankTask>> ranks_;
  std::vector<Batch<ScaledRankTask>> scaled_ranks_;
  std::vector<Batch<RootTask>> roots_;
  std::vector<Batch<SelectTask>> selections_;
  std::vector<Batch<WriteTask>> writes_;
  std::vector<Batch<ZeroTask>> zeros_;
  NormOrder order_;
  size_t tickets_ = 0;
  size_t partials_ = 0;
};

// The kernels of each step. Those of the rank step are of elements of type T; Float8 stands for all
// of eight bits.
struct Float8;
template <class T, class Task>
cudaError_t launch_rank_of(const Batch<Task>& batch, NormOrder order, RankMemory memory,
                           cudaStream_t stream);
cudaError_t launch_root(const Batch<RootTask>& batch, NormOrder order, cudaStream_t stream);
cudaError_t launch_select(const Batch<SelectTask>& batch, cudaStream_t stream);
cudaError_t launch_write(const Batch<WriteTask>& batch, cudaStream_t stream);
cudaError_t launch_zero(const Batch<ZeroTask>& batch, cudaStream_t stream);

// Elements of a tile of the write step or the zero step.
int64_t tile_elements(ElementType type);

}  // namespace lnprune::cuda
