// The launches of one call: the tables that the kernels read, built on the host, and their order.
#pragma once

#include <cstddef>
#include <vector>

#include "../kernels.h"
#include "language.h"

namespace lnprune::cuda {

// Threads of a block in every step but the select step.
constexpr int kThreads = 256;

// Bytes of a vector in the rank step. Eight elements of one byte are as many as the registers of a
// thread have room to sum.
constexpr int rank_vector_bytes(int element_bytes) { return element_bytes == 1 ? 8 : 16; }

// How a tensor is cut whose channels are runs. A chunk is a part of each run, in some rows; in a
// strip, each channel has a team of lanes * groups threads.
struct RunCut {
  int64_t rows;
  int64_t row_elements;
  int64_t rows_per_chunk;
  int64_t run_per_chunk;
  int64_t run_chunks;
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
  int64_t rows_per_chunk;
  int lanes;               // threads side by side along a strip
  int groups;              // groups of lanes, each with rows of its own
  int channels_per_strip;  // of one row of the tensor
  int columns_per_strip;
};

// One tensor to rank. It is cut into chunks of rows, and its channels into strips; a block reduces
// one strip of one chunk. How it is cut follows from shape and dtype alone, so that the order of
// every sum does too.
struct RankTask {
  const void* elements;
  const float* float8_values;  // [256], what the bits of eight-bit elements stand for
  double* norms;
  uint64_t* partials;  // [chunks][channels], where there is more than one chunk
  unsigned* tickets;   // [strips], zero: how many blocks of the strip have finished
  int64_t first_block;
  int64_t channels;
  int64_t inner;
  int64_t chunks;
  int64_t strips;
  union {
    RunCut run_cut;
    ColumnCut column_cut;
  };
  ElementType type;
  bool runs;     // which of the two it is
  bool aligned;  // rows begin where vectors can; changes no order
  bool counts;   // how many elements are not zero, whatever the order
  bool rooted;   // norms, not the sums before the root
};

// Sums to take the roots of: a thread for each channel.
struct RootTask {
  RootItem item;
  int64_t first_block;
};

// One tensor to write or to zero, cut into tiles. A block takes one of them.
template <class Item>
struct TileTask {
  Item item;
  int64_t elements;
  int64_t tiles;
  int64_t first_block;
  bool vectors;  // threads take whole vectors, not single elements side by side
};
using WriteTask = TileTask<WriteItem>;
using ZeroTask = TileTask<ZeroItem>;

// One launch: tasks of one dtype; in the rank step, of any dtypes of eight bits, and in the zero
// step, of any dtypes of one size.
template <class Task>
struct Batch {
  ElementType type;
  std::vector<Task> tasks;
  int64_t blocks = 0;
};

class Launches {
 public:
  explicit Launches(const Steps& steps);

  // Device memory that the launches need, and how much of it is the table at its beginning.
  size_t bytes() const { return bytes_; }
  size_t table_bytes() const { return table_bytes_; }

  // The table, to be copied from `host` to `device` before the launches on the same stream.
  void write_table(void* host, void* device) const;

  // Enqueues the kernels. `device` holds the table.
  cudaError_t run(void* device, cudaStream_t stream) const;

 private:
  std::vector<Batch<RankTask>> ranks_;
  std::vector<Batch<RootTask>> roots_;
  std::vector<SelectItem> selections_;
  std::vector<Batch<WriteTask>> writes_;
  std::vector<Batch<ZeroTask>> zeros_;
  std::vector<ElementType> float8_types_;
  NormOrder order_;
  size_t tickets_at_ = 0;
  size_t table_bytes_ = 0;
  size_t bytes_ = 0;
};

// The task that a block works on: the last that begins at or before it.
template <class Task>
__device__ __forceinline__ Task task_of_block(const Task* tasks, int count, unsigned block) {
  int low = 0;
#pragma unroll 1
  for (int high = count; high - low > 1;) {
    const int middle = (low + high) / 2;
    (load_cached(&tasks[middle].first_block) <= block ? low : high) = middle;
  }
  return load_cached(tasks + low);
}

// The kernels of each step, on tables in device memory.
cudaError_t launch_rank(ElementType type, NormOrder order, const RankTask* tasks, int count,
                        int64_t blocks, cudaStream_t stream);
cudaError_t launch_root(NormOrder order, const RootTask* tasks, int count, int64_t blocks,
                        cudaStream_t stream);
cudaError_t launch_select(const SelectItem* items, int64_t count, cudaStream_t stream);
cudaError_t launch_write(ElementType type, const WriteTask* tasks, int count, int64_t blocks,
                         cudaStream_t stream);
cudaError_t launch_zero(ElementType type, const ZeroTask* tasks, int count, int64_t blocks,
                        cudaStream_t stream);

// Copies a table, a multiple of 8 bytes, to the device by launches that carry it as parameters.
cudaError_t upload(const void* host, size_t bytes, void* device, cudaStream_t stream);

// Elements of a tile of the write step or the zero step.
int64_t tile_elements(ElementType type);

}  // namespace lnprune::cuda
