// The write step on CUDA: masks and masked weights of all tensors, or zeros in place, in one flat
// pass of tiles.
#include "../masked_product.h"
#include "launches.h"

namespace lnprune::cuda {
namespace {

constexpr int kVectorsPerThread = 4;

template <class T>
constexpr int kLength = Vector<T>::kLength;

// A matrix of a tensor: its elements from `begin` to `end`, and its flags.
struct Matrix {
  int64_t begin;
  int64_t end;
  const bool* keep;

  template <class Item>
  __device__ __forceinline__ Matrix(const TileTask<Item>& task, int64_t number)
      : begin(number * task.elements),
        end(begin + task.elements),
        keep(task.item.keep + number * task.item.slices.channels) {}
};

// The keep flags of consecutive elements, from one position on. 32 bits hold any position in most
// tensors, and their divisions are several times faster.
template <class Index>
struct Flags {
  const bool* keep;
  Index channels;
  Index inner;
  Index channel;
  Index within;

  template <class Item>
  __device__ __forceinline__ Flags(const Item& item, const Matrix& matrix, int64_t element)
      : keep(matrix.keep),
        channels(static_cast<Index>(item.slices.channels)),
        inner(static_cast<Index>(item.slices.inner)) {
    const Index position = static_cast<Index>(element - matrix.begin);
    const Index run = position / inner;
    within = position - run * inner;
    channel = run % channels;
  }
  __device__ __forceinline__ bool kept() const { return load_cached(keep + channel); }
  __device__ __forceinline__ bool next() {
    const bool here = kept();
    if (++within == inner) {
      within = 0;
      if (++channel == channels) channel = 0;
    }
    return here;
  }
};

// Flags from positions `kStep` elements apart. Such a step is whole rows, which change nothing,
// whole runs and the rest; no step needs a division.
template <class Index, int kStep>
struct Walk {
  Flags<Index> flags;
  Index runs;
  Index rest;

  template <class Item>
  __device__ __forceinline__ Walk(const Item& item, const Matrix& matrix, int64_t element)
      : flags(item, matrix, element),
        runs(static_cast<Index>(kStep) / flags.inner % flags.channels),
        rest(static_cast<Index>(kStep) % flags.inner) {}
  __device__ __forceinline__ void step() {
    flags.within += rest;
    flags.channel += runs;
    if (flags.within >= flags.inner) {
      flags.within -= flags.inner;
      ++flags.channel;
    }
    if (flags.channel >= flags.channels) flags.channel -= flags.channels;
  }
};

// Whether each of the elements from a position on is pruned, the first one in the lowest bit.
template <int kCount, class Index>
__device__ __forceinline__ unsigned pruned_from(Flags<Index> flags) {
  if (flags.inner - flags.within >= kCount) return flags.kept() ? 0 : (1u << kCount) - 1;
  unsigned pruned = 0;
#pragma unroll
  for (int s = 0; s < kCount; ++s) pruned |= static_cast<unsigned>(!flags.next()) << s;
  return pruned;
}

// What a block works on: a tile of a matrix. Backwards: what the rank step read last is likely
// still in the cache.
template <class T>
struct Tile {
  Matrix matrix;
  int64_t begin;
  int64_t end;

  template <class Item>
  __device__ __forceinline__ Tile(const TileTask<Item>& task, int64_t block)
      : Tile(task, task.item.slices.batch * task.tiles - 1 - block,
             // Without a division where there is one matrix.
             task.item.slices.batch == 1
                 ? 0
                 : (task.item.slices.batch * task.tiles - 1 - block) / task.tiles) {}

  template <class Item>
  __device__ __forceinline__ Tile(const TileTask<Item>& task, int64_t tile, int64_t number)
      : matrix(task, number) {
    constexpr int64_t kTile = kThreads * kVectorsPerThread * kLength<T>;
    begin = matrix.begin + (tile - number * task.tiles) * kTile;
    end = begin + kTile < matrix.end ? begin + kTile : matrix.end;
  }
};

// For elements of one byte, a table of the block with what a mask of zero makes of each of the 256,
// and then what a mask of one does. Wider elements are multiplied.
template <class T>
constexpr bool kHasTable = sizeof(T) == 1;
static_assert(kThreads == 256, "each thread looks after one of the 256 elements");

template <class T>
__device__ __forceinline__ T one_or_zero(bool kept) {
  return static_cast<T>(kept ? 1.0f : 0.0f);
}

template <class T>
__device__ __forceinline__ bool is_one_or_zero(T mask) {
  return mask.x == 0 || mask.x == one_or_zero<T>(true).x;
}

template <class T>
__device__ __forceinline__ void fill_table(T* products) {
  const T x(static_cast<uint8_t>(threadIdx.x), T::from_bits());
  products[threadIdx.x] = masked_product(one_or_zero<T>(false), x);
  products[256 + threadIdx.x] = masked_product(one_or_zero<T>(true), x);
}

// masked_product(mask, x) for a mask of one or zero.
template <class T>
__device__ __forceinline__ T product_with_flag(bool kept, T x, const T* products) {
  if constexpr (kHasTable<T>) {
    return products[(kept ? 256 : 0) + x.x];
  } else {
    return masked_product(one_or_zero<T>(kept), x);
  }
}

template <class T, class Index>
__device__ __forceinline__ void write_elements(const WriteItem& item, const Matrix& matrix,
                                               const T* products, int64_t begin, int64_t end,
                                               int64_t step) {
  const T* mask = static_cast<const T*>(item.mask);
  const T* original = static_cast<const T*>(item.original);
#pragma unroll 1
  for (int64_t i = begin; i < end; i += step) {
    const bool kept = Flags<Index>(item, matrix, i).kept();
    T flag = one_or_zero<T>(kept);
    if (mask != nullptr) flag = product_with_flag(kept, load(mask + i), products);
    store(static_cast<T*>(item.new_mask) + i, flag);
    if (item.weight == nullptr) continue;
    T weight = load(original + i);
    if (mask == nullptr) {
      weight = product_with_flag(kept, weight, products);
    } else {
      weight = masked_product(flag, weight);
    }
    store(static_cast<T*>(item.weight) + i, weight);
  }
}

// kept(s) of each element of a vector: the new mask in place of the old one, and the weight in
// place of the original. False: masks of one byte that are neither one nor zero, and no weight.
template <class T, class Kept>
__device__ __forceinline__ bool mask_vector(const WriteItem& item, Kept kept, Vector<T>& mask,
                                            Vector<T>& original, const T* products) {
  constexpr int L = kLength<T>;
  const bool has_mask = item.mask != nullptr;
  bool known = true;
#pragma unroll
  for (int s = 0; s < L; ++s) {
    mask.elements[s] =
        has_mask ? product_with_flag(kept(s), mask.elements[s], products) : one_or_zero<T>(kept(s));
    if constexpr (kHasTable<T>) known = known && is_one_or_zero(mask.elements[s]);
  }
  if (item.weight == nullptr) return true;
#pragma unroll
  for (int s = 0; s < L; ++s) {
    T& x = original.elements[s];
    if constexpr (kHasTable<T>) {
      x = product_with_flag(mask.elements[s].x != 0, x, products);
    } else {
      x = masked_product(mask.elements[s], x);
    }
  }
  return known;
}

// Where all elements of a vector are kept, or all are pruned, they share one flag.
template <class T, class Index>
__device__ __forceinline__ void write_vectors(const WriteItem& item, const Matrix& matrix,
                                              const T* products, int64_t begin, int64_t end) {
  constexpr int L = kLength<T>;
  constexpr unsigned kAll = (1u << L) - 1;
  const T* mask = static_cast<const T*>(item.mask);
  const T* original = static_cast<const T*>(item.original);
  Vector<T> masks[kVectorsPerThread];
  Vector<T> originals[kVectorsPerThread];
#pragma unroll
  for (int u = 0; u < kVectorsPerThread; ++u) {
    const int64_t i = begin + u * kThreads * L;
    if (i < end && mask != nullptr) masks[u] = load_vector<16>(mask + i);
    if (i < end && item.weight != nullptr) originals[u] = load_vector<16>(original + i);
  }
  Walk<Index, kThreads * L> walk(item, matrix, begin);
  unsigned pruned[kVectorsPerThread];
#pragma unroll
  for (int u = 0; u < kVectorsPerThread; ++u) {
    pruned[u] = begin + u * kThreads * L < end ? pruned_from<L>(walk.flags) : 0;
    walk.step();
  }
#pragma unroll
  for (int u = 0; u < kVectorsPerThread; ++u) {
    const int64_t i = begin + u * kThreads * L;
    if (i >= end) continue;
    bool known = false;
    if (pruned[u] == 0 || pruned[u] == kAll) {
      const bool kept = pruned[u] == 0;
      known = mask_vector(item, [&](int) { return kept; }, masks[u], originals[u], products);
    } else {
      const auto kept = [&](int s) { return (pruned[u] >> s & 1) == 0; };
      known = mask_vector(item, kept, masks[u], originals[u], products);
    }
    if (!known) {
      write_elements<T, Index>(item, matrix, products, i, i + L, 1);
      continue;
    }
    store_vector(static_cast<T*>(item.new_mask) + i, masks[u]);
    if (item.weight != nullptr) store_vector(static_cast<T*>(item.weight) + i, originals[u]);
  }
}

template <class T, class Index>
__device__ __forceinline__ void write_tile_of(const WriteTask& task, const T* products,
                                              int64_t block) {
  constexpr int L = kLength<T>;
  const Tile<T> tile(task, block);
  const auto& [matrix, begin, end] = tile;
  const int thread = static_cast<int>(threadIdx.x);
  int64_t written = begin;
  if (task.vectors) {
    written = begin + (end - begin) / L * L;
    write_vectors<T, Index>(task.item, matrix, products, begin + thread * L, written);
  }
  write_elements<T, Index>(task.item, matrix, products, written + thread, end, kThreads);
}

// At least so many blocks on a multiprocessor, which caps the registers.
template <class T>
constexpr int kBlocks = sizeof(T) == 1 ? 1 : 2;

template <class T, class Table>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    write_kernel(LNPRUNE_PARAMETER(Table, table)) {
  LNPRUNE_SHARED(T, products, kHasTable<T> ? 512 : 1);
  const Place place = place_of_block(table, blockIdx.x);
  const WriteTask& task = table.tasks[place.task];
  if constexpr (kHasTable<T>) {
    fill_table(products);
    __syncthreads();
  }
  // A step beyond the last element fits too.
  if (task.elements <= 0x7fffffffll) {
    write_tile_of<T, uint32_t>(task, products, place.block);
  } else {
    write_tile_of<T, uint64_t>(task, products, place.block);
  }
}

template <class Table>
using Kernel = void (*)(Parameter<Table>);

template <class Table>
constexpr Kernel<Table> kWriteKernels[kElementTypes] = {
    write_kernel<double, Table>,
    write_kernel<float, Table>,
    write_kernel<c10::Half, Table>,
    write_kernel<c10::BFloat16, Table>,
    write_kernel<c10::Float8_e4m3fn, Table>,
    write_kernel<c10::Float8_e4m3fnuz, Table>,
    write_kernel<c10::Float8_e5m2, Table>,
    write_kernel<c10::Float8_e5m2fnuz, Table>,
};

// Flags are asked for ahead of the stores: the compiler cannot know that these change none of them.
template <class Word, class Index>
__device__ __forceinline__ void zero_elements(const ZeroItem& item, const Matrix& matrix,
                                              int64_t begin, int64_t end) {
  constexpr int L = kLength<Word>;
  Word* words = static_cast<Word*>(item.elements);
  Walk<Index, kThreads> walk(item, matrix, begin);
#pragma unroll 1
  for (int64_t i = begin; i < end; i += kThreads * L) {
    unsigned pruned = 0;
#pragma unroll
    for (int s = 0; s < L; ++s) {
      if (i + s * kThreads < end) pruned |= static_cast<unsigned>(!walk.flags.kept()) << s;
      walk.step();
    }
#pragma unroll
    for (int s = 0; s < L; ++s) {
      store_if((pruned >> s & 1) != 0, words + i + s * kThreads, Word{0});
    }
  }
}

template <class Word, class Index>
__device__ __forceinline__ void zero_vectors(const ZeroItem& item, const Matrix& matrix,
                                             int64_t begin, int64_t end) {
  constexpr int L = kLength<Word>;
  Word* words = static_cast<Word*>(item.elements);
  Walk<Index, kThreads * L> walk(item, matrix, begin);
  unsigned pruned[kVectorsPerThread];
#pragma unroll
  for (int u = 0; u < kVectorsPerThread; ++u) {
    pruned[u] = begin + u * kThreads * L < end ? pruned_from<L>(walk.flags) : 0;
    walk.step();
  }
#pragma unroll
  for (int u = 0; u < kVectorsPerThread; ++u) {
    const int64_t i = begin + u * kThreads * L;
    if (pruned[u] == (1u << L) - 1) {
      store_vector(words + i, Vector<Word>{});
    } else if (pruned[u] != 0) {
#pragma unroll
      for (int s = 0; s < L; ++s) {
        store_if((pruned[u] >> s & 1) != 0, words + i + s, Word{0});
      }
    }
  }
}

template <class Word, class Index>
__device__ __forceinline__ void zero_tile_of(const ZeroTask& task, int64_t block) {
  constexpr int L = kLength<Word>;
  const Tile<Word> tile(task, block);
  const auto& [matrix, begin, end] = tile;
  const int thread = static_cast<int>(threadIdx.x);
  int64_t zeroed = begin;
  if (task.vectors) {
    zeroed = begin + (end - begin) / L * L;
    zero_vectors<Word, Index>(task.item, matrix, begin + thread * L, zeroed);
  }
  if (zeroed < end) zero_elements<Word, Index>(task.item, matrix, zeroed + thread, end);
}

// Reads flags alone, and touches no element that stays.
template <class Word, class Table>
__global__ void __launch_bounds__(kThreads) zero_kernel(LNPRUNE_PARAMETER(Table, table)) {
  const Place place = place_of_block(table, blockIdx.x);
  const ZeroTask& task = table.tasks[place.task];
  // A step beyond the last element fits too.
  if (task.elements <= 0x7fffffffll) {
    zero_tile_of<Word, uint32_t>(task, place.block);
  } else {
    zero_tile_of<Word, uint64_t>(task, place.block);
  }
}

template <class Table>
Kernel<Table> zero_kernel_of(ElementType type) {
  switch (element_bytes(type)) {
    case 8: return zero_kernel<uint64_t, Table>;
    case 4: return zero_kernel<uint32_t, Table>;
    case 2: return zero_kernel<uint16_t, Table>;
    default: return zero_kernel<uint8_t, Table>;
  }
}

}  // namespace

cudaError_t launch_write(const Batch<WriteTask>& batch, cudaStream_t stream) {
  return batch.with_table([&](const auto& table) {
    using Table = std::decay_t<decltype(table)>;
    const Kernel<Table> kernel = kWriteKernels<Table>[static_cast<int>(batch.type)];
    return launch(kernel, batch.blocks, kThreads, stream, table);
  });
}

cudaError_t launch_zero(const Batch<ZeroTask>& batch, cudaStream_t stream) {
  return batch.with_table([&](const auto& table) {
    using Table = std::decay_t<decltype(table)>;
    return launch(zero_kernel_of<Table>(batch.type), batch.blocks, kThreads, stream, table);
  });
}

int64_t tile_elements(ElementType type) {
  return kThreads * kVectorsPerThread * (16 / element_bytes(type));
}

}  // namespace lnprune::cuda
