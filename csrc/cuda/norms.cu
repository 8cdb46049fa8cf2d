// The rank step on CUDA: a block reduces one strip of channels over one chunk of rows, and the last
// block of a strip folds its chunks.
//
// An element's accumulator and the order of every fold follow from its index, never from alignment
// or from which block is last.
#include "../lp_norm.h"
#include "launches.h"
#include "select_block.h"

namespace lnprune::cuda {
namespace {

// Squares of what is narrower than float64 are exact: multiplied and added in one instruction.
template <class Real>
using SumOfSquares = lnprune::SumOfSquares<Real, true>;

// Vectors that a thread loads before it adds.
constexpr int kVectorLoads = 4;

template <class T>
constexpr int kVectorBytes = rank_vector_bytes(sizeof(T));
template <class T>
constexpr int kLength = kVectorBytes<T> / sizeof(T);

// Eight bits of any format. What they stand for is looked up in a table of the block.
struct Float8 {
  uint8_t bits;
};
template <class T>
constexpr bool kHasTable = std::is_same_v<T, Float8>;
static_assert(kThreads == 256, "each thread looks after one of the 256 floats");

__device__ __forceinline__ float float8_value(ElementType type, unsigned bits) {
  const uint8_t x = static_cast<uint8_t>(bits);
  switch (type) {
    case ElementType::float8_e4m3fn: return c10::Float8_e4m3fn(x, c10::Float8_e4m3fn::from_bits());
    case ElementType::float8_e4m3fnuz:
      return c10::Float8_e4m3fnuz(x, c10::Float8_e4m3fnuz::from_bits());
    case ElementType::float8_e5m2: return c10::Float8_e5m2(x, c10::Float8_e5m2::from_bits());
    default: return c10::Float8_e5m2fnuz(x, c10::Float8_e5m2fnuz::from_bits());
  }
}

__device__ __forceinline__ double widen(double x, const float*) { return x; }
__device__ __forceinline__ float widen(float x, const float*) { return x; }
__device__ __forceinline__ float widen(c10::Half x, const float*) { return static_cast<float>(x); }
__device__ __forceinline__ float widen(c10::BFloat16 x, const float*) {
  return bit_cast<float>(static_cast<uint32_t>(x.x) << 16);
}
__device__ __forceinline__ float widen(Float8 x, const float* values) { return values[x.bits]; }

__device__ __forceinline__ int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T, int kBytes>
__device__ __forceinline__ auto widen(const Vector<T, kBytes>& vector, int slot,
                                      const float* values) {
  return widen(vector.elements[slot], values);
}
// By words of two elements: one instruction for each, and fewer registers.
template <int kBytes>
__device__ __forceinline__ float widen(const Vector<c10::BFloat16, kBytes>& vector, int slot,
                                       const float*) {
  const auto words = lnprune::bit_cast<Vector<uint32_t, kBytes>>(vector);
  const uint32_t word = words.elements[slot / 2];
  return bit_cast<float>(slot % 2 == 0 ? word << 16 : word & 0xffff0000u);
}

// How elements are read: as they are.
struct Plain {
  const float* values;  // of the table of floats

  template <class T>
  __device__ __forceinline__ const Plain& from(const T*) const {
    return *this;
  }
  template <class V>
  __device__ __forceinline__ auto operator()(const V& vector, int slot) const {
    return widen(vector, slot, values);
  }
  template <class T>
  __device__ __forceinline__ auto one(const T* address) const {
    return widen(load(address), values);
  }
};

// How elements are read: times a factor, as doubles. Factors follow from the place of an element in
// its matrix.
template <class T>
struct Scaled {
  const float* values;
  const T* matrix;
  const double* factors;
  DimInView place;
  int64_t inner;
  int64_t row;

  // How far an element is from the first of its period, which is a run, or a row.
  __device__ __forceinline__ int64_t after_first(int64_t element) const {
    const int64_t period = place.in_rows ? row : inner;
    // 32 bits hold any place in most tensors, and their divisions are several times faster.
    if (element <= 0x7fffffffll && period <= 0x7fffffffll) {
      return static_cast<uint32_t>(element) % static_cast<uint32_t>(period);
    }
    return element % period;
  }
  // The factor of a row's number, or of a place in a run.
  __device__ __forceinline__ double factor_at(int64_t number) const {
    const int64_t index = place.step == 1 ? number : number / place.step;
    return load_cached(factors + (index < place.length ? index : index % place.length));
  }
  __device__ __forceinline__ double factor_of(int64_t element) const {
    return factor_at(place.in_rows ? element / row : after_first(element));
  }

  // Of a vector that begins at an element.
  struct Vectors {
    const Scaled& read;
    int64_t element;
    int64_t first;  // place of the element in its period
    double of_row;  // the factor of its row
    template <class V>
    __device__ __forceinline__ double operator()(const V& vector, int slot) const {
      const double x = widen(vector, slot, read.values);
      const int64_t period = read.place.in_rows ? read.row : read.inner;
      if (first + slot >= period) return x * read.factor_of(element + slot);
      return x * (read.place.in_rows ? of_row : read.factor_at(first + slot));
    }
  };
  __device__ __forceinline__ Vectors from(const T* address) const {
    const int64_t element = address - matrix;
    return {*this, element, after_first(element), place.in_rows ? factor_of(element) : 0.0};
  }
  __device__ __forceinline__ double one(const T* address) const {
    return static_cast<double>(widen(load(address), values)) * factor_of(address - matrix);
  }
};

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

// Blocks that a multiprocessor should hold at once, which caps the registers.
template <class Norm, class T>
constexpr int kBlocks = Norm::kCostly || sizeof(T) == 1 ? 2 : 3;

// The select step of the last block of a tensor.
using Select = SelectBlock<kThreads, kRankKeys, 10, Channels::of_one_tile>;
static_assert(Select::kTile == kMostChannelsOfRank, "a tile holds all channels");

template <template <class> class Norm, class T, class Table>
__global__ void __launch_bounds__(kThreads, kBlocks<Norm<typename RealOf<T>::Type>, T>)
    rank_kernel(LNPRUNE_PARAMETER(Table, table), RankMemory memory, double p) {
  using Real = typename RealOf<T>::Type;
  LNPRUNE_SHARED(uint64_t, shared, kThreads* kLength<T>);
  LNPRUNE_SHARED(Select::Shared, shared_of_select, 1);
  LNPRUNE_SHARED(float, values, kHasTable<T> ? 256 : 1);
  LNPRUNE_SHARED(int, shared_last, 1);
  const Place place = place_of_block(table, blockIdx.x);
  const RankTask& task = table.tasks[place.task];
  if constexpr (kHasTable<T>) {
    values[threadIdx.x] = float8_value(task.type, threadIdx.x);
    __syncthreads();
  }
  const int block = static_cast<int>(place.block);
  const Plain read{values};
  bool finished = false;
  if (std::is_same_v<Norm<Real>, NonzeroCount<Real>> || task.counts) {
    finished = rank_block<NonzeroCount<Real>, T>(task, memory, 0, block, read, shared, shared_last);
  } else {
    finished = rank_block<Norm<Real>, T>(task, memory, p, block, read, shared, shared_last);
  }
  if (!finished || task.selection.keep == nullptr) return;
  const Work work(task, computed_again(block));
  unsigned* ticket = memory.tickets + task.selection_ticket + work.matrix;
  if (threadIdx.x == 0) shared_of_select->ranking = work.matrix;
  if (!draws_last(ticket, task.selection_strips, shared_last)) return;
  static_assert(Select::kBuckets * sizeof(unsigned) <= kThreads * kLength<T> * sizeof(uint64_t),
                "the histogram takes the place of the partials");
  auto* buckets = reinterpret_cast<unsigned*>(shared);
  Select{task.selection, buckets, nullptr, shared_of_select}.write_flags_of(0);
}

template <template <class> class Norm, class T, class Table>
__global__ void __launch_bounds__(kThreads, 1)
    scaled_rank_kernel(LNPRUNE_PARAMETER(Table, table), RankMemory memory, double p) {
  LNPRUNE_SHARED(uint64_t, shared, kThreads* kLength<T>);
  LNPRUNE_SHARED(float, values, kHasTable<T> ? 256 : 1);
  LNPRUNE_SHARED(int, shared_last, 1);
  const Place place = place_of_block(table, blockIdx.x);
  const ScaledRankTask& task = table.tasks[place.task];
  if constexpr (kHasTable<T>) {
    values[threadIdx.x] = float8_value(task.type, threadIdx.x);
    __syncthreads();
  }
  const int block = static_cast<int>(place.block);
  const Work work(task, block);
  const Scaled<T> read{values,
                       work.elements<T>(task),
                       task.scaling.factors + work.matrix * task.scaling.matrix,
                       task.scaling.place,
                       task.inner,
                       task.row};
  rank_block<Norm<double>, T>(task, memory, p, block, read, shared, shared_last);
}

template <template <class> class Norm, class Table>
__global__ void __launch_bounds__(kThreads) root_kernel(LNPRUNE_PARAMETER(Table, table), double p) {
  const Place place = place_of_block(table, blockIdx.x);
  const RootItem& item = table.tasks[place.task].item;
  const int64_t channel = place.block * kThreads + threadIdx.x;
  if (channel >= item.channels) return;
  const Norm<double> norm(p);
  store(item.norms + channel, norm.root(load(item.sums + channel)));
}

template <class Table>
using RankKernel = void (*)(Parameter<Table>, RankMemory, double);

template <class T, class Table>
RankKernel<Table> rank_kernel_of(NormKind kind) {
  constexpr RankKernel<Table> kKernels[kNormKinds] = {
      rank_kernel<NonzeroCount, T, Table>, rank_kernel<Sum, T, Table>,
      rank_kernel<SumOfSquares, T, Table>, rank_kernel<Maximum, T, Table>,
      rank_kernel<Minimum, T, Table>,      rank_kernel<HalfIntegerPowerSum, T, Table>,
      rank_kernel<PowerSum, T, Table>};
  return kKernels[static_cast<int>(kind)];
}

template <class Table>
RankKernel<Table> rank_kernel_of(ElementType type, NormKind kind) {
  switch (type) {
    case ElementType::float64: return rank_kernel_of<double, Table>(kind);
    case ElementType::float32: return rank_kernel_of<float, Table>(kind);
    case ElementType::float16: return rank_kernel_of<c10::Half, Table>(kind);
    case ElementType::bfloat16: return rank_kernel_of<c10::BFloat16, Table>(kind);
    default: return rank_kernel_of<Float8, Table>(kind);
  }
}

template <class T, class Table>
RankKernel<Table> scaled_rank_kernel_of(NormKind kind) {
  constexpr RankKernel<Table> kKernels[kNormKinds] = {
      scaled_rank_kernel<NonzeroCount, T, Table>, scaled_rank_kernel<Sum, T, Table>,
      scaled_rank_kernel<SumOfSquares, T, Table>, scaled_rank_kernel<Maximum, T, Table>,
      scaled_rank_kernel<Minimum, T, Table>,      scaled_rank_kernel<HalfIntegerPowerSum, T, Table>,
      scaled_rank_kernel<PowerSum, T, Table>};
  return kKernels[static_cast<int>(kind)];
}

template <class Table>
RankKernel<Table> scaled_rank_kernel_of(ElementType type, NormKind kind) {
  switch (type) {
    case ElementType::float64: return scaled_rank_kernel_of<double, Table>(kind);
    case ElementType::float32: return scaled_rank_kernel_of<float, Table>(kind);
    case ElementType::float16: return scaled_rank_kernel_of<c10::Half, Table>(kind);
    case ElementType::bfloat16: return scaled_rank_kernel_of<c10::BFloat16, Table>(kind);
    default: return scaled_rank_kernel_of<Float8, Table>(kind);
  }
}

template <class Table>
using RootKernel = void (*)(Parameter<Table>, double);

template <class Table>
RootKernel<Table> root_kernel_of(NormKind kind) {
  constexpr RootKernel<Table> kKernels[kNormKinds] = {
      root_kernel<NonzeroCount, Table>, root_kernel<Sum, Table>,
      root_kernel<SumOfSquares, Table>, root_kernel<Maximum, Table>,
      root_kernel<Minimum, Table>,      root_kernel<HalfIntegerPowerSum, Table>,
      root_kernel<PowerSum, Table>};
  return kKernels[static_cast<int>(kind)];
}

}  // namespace

cudaError_t launch_rank(const Batch<RankTask>& batch, NormOrder order, RankMemory memory,
                        cudaStream_t stream) {
  return batch.with_table([&](const auto& table) {
    using Table = std::decay_t<decltype(table)>;
    const RankKernel<Table> kernel = rank_kernel_of<Table>(batch.type, order.kind);
    return launch(kernel, batch.blocks, kThreads, stream, table, memory, order.p);
  });
}

cudaError_t launch_scaled_rank(const Batch<ScaledRankTask>& batch, NormOrder order,
                               RankMemory memory, cudaStream_t stream) {
  return batch.with_table([&](const auto& table) {
    using Table = std::decay_t<decltype(table)>;
    const RankKernel<Table> kernel = scaled_rank_kernel_of<Table>(batch.type, order.kind);
    return launch(kernel, batch.blocks, kThreads, stream, table, memory, order.p);
  });
}

cudaError_t launch_root(const Batch<RootTask>& batch, NormOrder order, cudaStream_t stream) {
  return batch.with_table([&](const auto& table) {
    using Table = std::decay_t<decltype(table)>;
    return launch(root_kernel_of<Table>(order.kind), batch.blocks, kThreads, stream, table,
                  order.p);
  });
}

}  // namespace lnprune::cuda
