// The rank step of one block: it reduces one strip of channels over one chunk of rows, and the last
// block of a strip folds its chunks.
//
// An element's accumulator and the order of every fold follow from its index, never from alignment
// or from which block is last.
#pragma once

#include "rank_elements.h"

namespace lnprune::cuda {
namespace {

// Vectors that a thread loads before it adds.
constexpr int kVectorLoads = 4;

// Adds `count` vectors that lie `stride` elements apart; each element to the slot of its place.
template <class Norm, class T, class Read>
__device__ __forceinline__ void add_vectors(const Norm& norm, const T* elements, int64_t stride,
                                            int count, const Read& read,
                                            typename Norm::Accumulator (&slots)[kLength<T>]) {
#pragma unroll 1
  for (int i = 0; i < count; i += kVectorLoads) {
    Vector<T, kVectorBytes<T>> loaded[kVectorLoads];
#pragma unroll
    for (int u = 0; u < kVectorLoads; ++u) {
      if (i + u < count) loaded[u] = load_vector<kVectorBytes<T>>(elements + u * stride);
    }
#pragma unroll
    for (int u = 0; u < kVectorLoads; ++u) {
      if (i + u < count) {
        const auto& vectors = read.from(elements + u * stride);
#pragma unroll
        for (int s = 0; s < kLength<T>; ++s) slots[s] = norm.map(slots[s], vectors(loaded[u], s));
      }
    }
    elements += kVectorLoads * stride;
  }
}

// Adds the elements of [begin, end) among those at `elements`, `step` apart, to the slots of their
// numbers.
template <class Norm, class T, class Read>
__device__ __forceinline__ void add_elements(const Norm& norm, const T* elements, int step,
                                             int64_t begin, int64_t end, const Read& read,
                                             typename Norm::Accumulator (&slots)[kLength<T>]) {
#pragma unroll
  for (int s = 0; s < kLength<T>; ++s) {
    if (s >= begin && s < end) slots[s] = norm.map(slots[s], read.one(elements));
    elements += step;
  }
}

// Folds one value of each of `team` neighbouring threads, a power of two; the first of them gets
// the result. `shared` has room for one value per warp.
template <class Norm>
__device__ __forceinline__ typename Norm::Partial fold_team(const Norm& norm,
                                                            typename Norm::Partial value, int team,
                                                            typename Norm::Partial* shared) {
  const int within = team < kWarp ? team : kWarp;
#pragma unroll 1
  for (int distance = 1; distance < within; distance *= 2) {
    value = norm.combine(value, __shfl_xor_sync(kAllLanes, value, distance));
  }
  if (team > kWarp) {
    const int warp = threadIdx.x / kWarp;
    __syncthreads();
    if (threadIdx.x % kWarp == 0) shared[warp] = value;
    __syncthreads();
    if (threadIdx.x % team == 0) {
#pragma unroll 1
      for (int w = 1; w < team / kWarp; ++w) value = norm.combine(value, shared[warp + w]);
    }
  }
  return value;
}

// What a block works on: a strip of a chunk of a matrix. Where the loops over elements have come
// between, it is computed again, since they need the registers.
struct Work {
  int matrix;
  int chunk;
  int strip;

  __device__ __forceinline__ Work(const RankTask& task, int block) {
    const int blocks = task.chunks * task.strips;  // of a matrix
    matrix = task.batch == 1 ? 0 : block / blocks;
    const int rest = block - matrix * blocks;
    chunk = rest / task.strips;
    strip = rest - chunk * task.strips;
  }

  template <class T>
  __device__ __forceinline__ const T* elements(const RankTask& task) const {
    return static_cast<const T*>(task.elements) + matrix * task.matrix;
  }
  __device__ __forceinline__ double* norms(const RankTask& task) const {
    return task.norms + matrix * task.channels;
  }
  // Of [chunks][channels], where there is more than one chunk.
  template <class Partial>
  __device__ __forceinline__ Partial* partials(const RankTask& task,
                                               const RankMemory& memory) const {
    return reinterpret_cast<Partial*>(memory.partials) + task.first_partial +
           matrix * task.chunks * task.channels;
  }
  // Of the strip, where there is more than one chunk.
  __device__ __forceinline__ unsigned* ticket(const RankTask& task,
                                              const RankMemory& memory) const {
    return memory.tickets + task.first_ticket + matrix * task.strips + strip;
  }
};

// What is asked for of a channel: its norm, or the sum before the root.
template <class Norm>
__device__ __forceinline__ double result_of(const RankTask& task, const Norm& norm,
                                            typename Norm::Partial partial) {
  const double total = norm.total(partial);
  return task.rooted ? norm.root(total) : total;
}

// A chunk's partial, or, where that is all there is, the result.
template <class Norm>
__device__ __forceinline__ void put(const RankTask& task, const RankMemory& memory,
                                    const Work& work, const Norm& norm, int64_t channel,
                                    typename Norm::Partial partial) {
  if (task.chunks == 1) {
    store(work.norms(task) + channel, result_of(task, norm, partial));
  } else {
    auto* partials = work.partials<typename Norm::Partial>(task, memory);
    store(partials + work.chunk * task.channels + channel, partial);
  }
}

// Whether this block draws the last of so many tickets, and has all that was stored before the
// others were drawn. Every thread of the block calls it.
__device__ __forceinline__ bool draws_last(unsigned* ticket, int tickets, int* shared_last) {
  // The stores of every thread are visible before its block's ticket is drawn.
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    // The last ticket makes the counter zero again, for the launch after this one.
    const unsigned last = static_cast<unsigned>(tickets - 1);
    *shared_last = last == 0 || atomicInc(ticket, last) == last;
  }
  __syncthreads();
  __threadfence();
  return *shared_last != 0;
}

template <class Norm>
__device__ __forceinline__ typename Norm::Partial partial_of(const RankTask& task,
                                                             const RankMemory& memory,
                                                             const Work& work, int64_t chunk,
                                                             int64_t channel) {
  const auto* partials = work.partials<const typename Norm::Partial>(task, memory);
  return load_from_other_blocks(partials + chunk * task.channels + channel);
}

// The ways to rank return whether this block has finished its strip, to which the norms or sums of
// all its channels belong. Every thread of the block gets the same answer.

// Channels are runs: a team of lanes * groups threads for each channel of the strip. A lane adds
// every lanes-th vector of a run to slots, one for each place in a vector.
//
// Where a run begins within a vector, `shift` elements after its start, the vectors at both ends
// are taken element by element, and what belongs to one slot of one lane lies `shift` slots further
// on. That is put right when all is added, so that the sums are those of a run without a shift.
template <class Norm, class T, class Read>
__device__ __forceinline__ bool rank_runs(const RankTask& task, const RankMemory& memory,
                                          const Norm& norm, int block, const Read& read,
                                          typename Norm::Partial* shared, int* shared_last) {
  using Partial = typename Norm::Partial;
  constexpr int L = kLength<T>;
  const RunCut& cut = task.run_cut;
  const int thread = static_cast<int>(threadIdx.x);
  const int team = cut.lanes * cut.groups;
  const int lane = thread % cut.lanes;
  const Work before(task, block);
  const int64_t channel_before = int64_t{before.strip} * cut.channels_per_strip + thread / team;

  typename Norm::Accumulator slots[L];
#pragma unroll
  for (int s = 0; s < L; ++s) slots[s] = norm.identity();
  int shift = 0;
  if (channel_before < task.channels) {
    const int64_t begin = int64_t{before.chunk % cut.run_chunks} * cut.run_per_chunk;
    const int64_t first_row = int64_t{before.chunk / cut.run_chunks} * cut.rows_per_chunk;
    const int64_t end_row = smaller(first_row + cut.rows_per_chunk, cut.rows);
    int64_t row = first_row + thread % team / cut.lanes;
    const T* run =
        before.elements<T>(task) + row * cut.row_elements + channel_before * task.inner + begin;
    // The same in every row: all rows of a chunk begin alike.
    shift = static_cast<int>(reinterpret_cast<uintptr_t>(run) % kVectorBytes<T> / sizeof(T));
    run -= shift;
    const int end = static_cast<int>(smaller(cut.run_per_chunk, task.inner - begin)) + shift;
    const int first = shift > 0 && lane == 0 ? cut.lanes : lane;
    const int vectors = (end / L - first + cut.lanes - 1) / cut.lanes;
#pragma unroll 1
    for (; row < end_row; row += cut.groups) {
      if (first != lane) add_elements(norm, run, 1, shift, end, read, slots);
      add_vectors(norm, run + first * L, cut.lanes * L, vectors, read, slots);
      const int last = first + vectors * cut.lanes;
      if (last == end / L) {
        add_elements(norm, run + last * L, 1, 0, end - last * L, read, slots);
      }
      run += cut.groups * cut.row_elements;
    }
  }

  const Work work(task, computed_again(block));
  const int64_t channel = int64_t{work.strip} * cut.channels_per_strip + thread / team;
  Partial partials[L];
#pragma unroll
  for (int s = 0; s < L; ++s) partials[s] = norm.partial(slots[s]);
  if (!task.aligned) {
    Partial* group_slots = shared + (thread - lane) * L;
    const int mask = cut.lanes * L - 1;
#pragma unroll
    for (int s = 0; s < L; ++s) group_slots[(lane * L + s - shift) & mask] = partials[s];
    __syncthreads();
#pragma unroll
    for (int s = 0; s < L; ++s) partials[s] = shared[thread * L + s];
    __syncthreads();
  }
#pragma unroll
  for (int width = 1; width < L; width *= 2) {
#pragma unroll
    for (int s = 0; s < L; s += 2 * width)
      partials[s] = norm.combine(partials[s], partials[s + width]);
  }
  const Partial total = fold_team(norm, partials[0], team, shared);
  const bool first_of_team = thread % team == 0 && channel < task.channels;
  if (first_of_team) put(task, memory, work, norm, channel, total);

  if (task.chunks == 1) return true;
  unsigned* ticket = work.ticket(task, memory);
  if (!draws_last(ticket, task.chunks, shared_last)) return false;
  Partial sum = norm.partial(norm.identity());
  if (channel < task.channels) {
#pragma unroll 1
    for (int64_t c = thread % team; c < task.chunks; c += team) {
      sum = norm.combine(sum, partial_of<Norm>(task, memory, work, c, channel));
    }
  }
  sum = fold_team(norm, sum, team, shared);
  if (first_of_team) store(work.norms(task) + channel, result_of(task, norm, sum));
  return true;
}

// Channels are columns: lanes own vectors of columns, groups of lanes own rows.
template <class Norm, class T, class Read>
__device__ __forceinline__ bool rank_columns(const RankTask& task, const RankMemory& memory,
                                             const Norm& norm, int block, const Read& read,
                                             typename Norm::Partial* shared, int* shared_last) {
  using Partial = typename Norm::Partial;
  constexpr int L = kLength<T>;
  const ColumnCut& cut = task.column_cut;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % cut.lanes;
  const int group = thread / cut.lanes;
  const Work before(task, block);
  const int64_t first_column = int64_t{before.strip} * cut.columns_per_strip;
  const int columns =
      static_cast<int>(smaller(cut.columns_per_strip, cut.row_elements - first_column));
  // The columns of the thread: side by side in one vector, or `lanes` apart.
  const int step = task.aligned ? 1 : cut.lanes;
  const int column = task.aligned ? lane * L : lane;

  typename Norm::Accumulator slots[L];
#pragma unroll
  for (int s = 0; s < L; ++s) slots[s] = norm.identity();
  if (group < cut.groups && column < columns) {
    // Where merged rows do not divide the tensor, the last row is short.
    const int64_t full_rows = cut.elements / cut.row_elements;
    const int64_t end_row = smaller((int64_t{before.chunk} + 1) * cut.rows_per_chunk, full_rows);
    int64_t row = int64_t{before.chunk} * cut.rows_per_chunk + group;
    const T* elements = before.elements<T>(task) + row * cut.row_elements + first_column + column;
    const int64_t stride = cut.groups * cut.row_elements;
    if (task.aligned && row < end_row) {
      const int rows = static_cast<int>((end_row - row + cut.groups - 1) / cut.groups);
      add_vectors(norm, elements, stride, rows, read, slots);
      row += rows * cut.groups;
      elements += rows * stride;
    }
    const int64_t rows_with_short_one =
        smaller((int64_t{before.chunk} + 1) * cut.rows_per_chunk, cut.rows);
#pragma unroll 1
    for (; row < rows_with_short_one; row += cut.groups) {
      const int64_t end = smaller(columns, cut.elements - row * cut.row_elements - first_column);
      add_elements(norm, elements, step, 0, (end - column + step - 1) / step, read, slots);
      elements += stride;
    }
#pragma unroll
    for (int s = 0; s < L; ++s) {
      // Neighbouring threads write neighbouring places: no two of a warp meet in one bank.
      const int c = column + s * step;
      if (c < columns)
        shared[c % L * kThreads + group * cut.lanes + c / L] = norm.partial(slots[s]);
    }
  }
  __syncthreads();
#pragma unroll 1
  for (int c = thread; c < columns; c += kThreads) {
    Partial* sums = shared + c % L * kThreads + c / L;
    Partial sum = sums[0];
#pragma unroll 1
    for (int g = 1; g < cut.groups; ++g) sum = norm.combine(sum, sums[g * cut.lanes]);
    sums[0] = sum;
  }
  __syncthreads();

  const Work work(task, computed_again(block));
  // A channel's columns are `inner` side by side, in each of the rows that a merged row holds.
  const int64_t first_channel = int64_t{work.strip} * cut.channels_per_strip;
  const int channels =
      static_cast<int>(smaller(cut.channels_per_strip, task.channels - first_channel));
  const int inner = static_cast<int>(task.inner);
  const int row_columns = static_cast<int>(smaller(task.channels * task.inner, columns));
#pragma unroll 1
  for (int c = thread; c < channels; c += kThreads) {
    Partial sum = norm.partial(norm.identity());
#pragma unroll 1
    for (int start = c * inner; start < columns; start += row_columns) {
#pragma unroll 1
      for (int i = start; i < start + inner; ++i) {
        sum = norm.combine(sum, shared[i % L * kThreads + i / L]);
      }
    }
    put(task, memory, work, norm, first_channel + c, sum);
  }

  if (task.chunks == 1) return true;
  unsigned* ticket = work.ticket(task, memory);
  if (!draws_last(ticket, task.chunks, shared_last)) return false;
  // From the width of a full strip, so that the last strip folds in the same order.
  const int width = cut.channels_per_strip < kThreads ? cut.channels_per_strip : kThreads;
  const int helpers = kThreads / width;
#pragma unroll 1
  for (int first = 0; first < channels; first += width) {
    const int c = first + thread % width;
    const int helper = thread / width;
    Partial sum = norm.partial(norm.identity());
    if (helper < helpers && c < channels) {
#pragma unroll 1
      for (int64_t k = helper; k < task.chunks; k += helpers) {
        sum = norm.combine(sum, partial_of<Norm>(task, memory, work, k, first_channel + c));
      }
    }
    __syncthreads();
    shared[thread] = sum;
    __syncthreads();
    if (helper == 0 && c < channels) {
#pragma unroll 1
      for (int h = 1; h < helpers; ++h) sum = norm.combine(sum, shared[h * width + thread]);
      store(work.norms(task) + first_channel + c, result_of(task, norm, sum));
    }
  }
  return true;
}

template <class Norm, class T, class Read>
__device__ __forceinline__ bool rank_block(const RankTask& task, const RankMemory& memory, double p,
                                           int block, const Read& read, uint64_t* shared,
                                           int* shared_last) {
  static_assert(sizeof(typename Norm::Partial) == 8, "partials lie 8 bytes apart");
  const Norm norm(p);
  auto* partials = reinterpret_cast<typename Norm::Partial*>(shared);
  if (task.runs) {
    return rank_runs<Norm, T>(task, memory, norm, block, read, partials, shared_last);
  } else {
    return rank_columns<Norm, T>(task, memory, norm, block, read, partials, shared_last);
  }
}

}  // namespace
}  // namespace lnprune::cuda
