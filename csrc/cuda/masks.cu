// The write step on CUDA: masks and masked weights of all tensors in one flat pass of tiles.
#include "../masked_product.h"
#include "launches.h"

namespace lnprune::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kVectorsPerThread = 4;

template <class T>
constexpr int kLength = Vector<T>::kLength;

// The keep flags of consecutive elements, from one position on. 32 bits hold any position in most
// tensors, and their divisions are several times faster.
template <class Index>
struct Flags {
  const bool* keep;
  Index channels;
  Index inner;
  Index channel;
  Index within;

  __device__ __forceinline__ Flags(const WriteItem& item, Index position)
      : keep(item.keep),
        channels(static_cast<Index>(item.slices.channels)),
        inner(static_cast<Index>(item.slices.inner)) {
    const Index run = position / inner;
    within = position - run * inner;
    channel = run % channels;
  }
  __device__ __forceinline__ bool next() {
    const bool kept = load_cached(keep + channel);
    if (++within == inner) {
      within = 0;
      if (++channel == channels) channel = 0;
    }
    return kept;
  }
};

// One element: the new mask, and from it the weight.
template <class T>
__device__ __forceinline__ T masked(bool has_mask, bool kept, T mask) {
  const T flag = static_cast<T>(kept ? 1.0f : 0.0f);
  return has_mask ? masked_product(mask, flag) : flag;
}

template <class T, class Index>
__device__ __forceinline__ void write_elements(const WriteItem& item, int64_t begin, int64_t end,
                                               int64_t step) {
  const T* mask = static_cast<const T*>(item.mask);
  const T* original = static_cast<const T*>(item.original);
#pragma unroll 1
  for (int64_t i = begin; i < end; i += step) {
    const bool kept = Flags<Index>(item, static_cast<Index>(i)).next();
    const T flag = masked<T>(mask != nullptr, kept, mask != nullptr ? load(mask + i) : T(0.0f));
    store(static_cast<T*>(item.new_mask) + i, flag);
    if (item.weight != nullptr) {
      store(static_cast<T*>(item.weight) + i, masked_product(flag, load(original + i)));
    }
  }
}

template <class T, class Index>
__device__ __forceinline__ void write_vectors(const WriteItem& item, int64_t begin, int64_t end) {
  constexpr int L = kLength<T>;
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
#pragma unroll
  for (int u = 0; u < kVectorsPerThread; ++u) {
    const int64_t i = begin + u * kThreads * L;
    if (i < end) {
      Flags<Index> flags(item, static_cast<Index>(i));
#pragma unroll
      for (int s = 0; s < L; ++s) {
        masks[u].elements[s] = masked(mask != nullptr, flags.next(), masks[u].elements[s]);
      }
      store_vector(static_cast<T*>(item.new_mask) + i, masks[u]);
      if (item.weight != nullptr) {
#pragma unroll
        for (int s = 0; s < L; ++s) {
          originals[u].elements[s] = masked_product(masks[u].elements[s], originals[u].elements[s]);
        }
        store_vector(static_cast<T*>(item.weight) + i, originals[u]);
      }
    }
  }
}

template <class T, class Index>
__device__ __forceinline__ void write_tile_of(const WriteTask& task) {
  constexpr int L = kLength<T>;
  constexpr int64_t kTile = kThreads * kVectorsPerThread * L;
  // Backwards: what the rank step read last is likely still in the cache.
  const int64_t tile = task.tiles - 1 - (blockIdx.x - task.first_block);
  const int64_t begin = tile * kTile;
  const int64_t end = begin + kTile < task.elements ? begin + kTile : task.elements;
  const int thread = static_cast<int>(threadIdx.x);
  int64_t written = begin;
  if (task.aligned) {
    written = begin + (end - begin) / L * L;
    write_vectors<T, Index>(task.item, begin + thread * L, written);
  }
  write_elements<T, Index>(task.item, written + thread, end, kThreads);
}

// At least so many blocks on a multiprocessor, which caps the registers.
template <class T>
constexpr int kBlocks = sizeof(T) == 1 ? 1 : 2;

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    write_kernel(const WriteTask* tasks, int count) {
  LNPRUNE_SHARED(WriteTask, task, 1);
  if (threadIdx.x == 0) task[0] = task_of_block(tasks, count, blockIdx.x);
  __syncthreads();
  if (task->elements <= 0xffffffffll) {
    write_tile_of<T, uint32_t>(*task);
  } else {
    write_tile_of<T, uint64_t>(*task);
  }
}

using Kernel = void (*)(const WriteTask*, int);
constexpr Kernel kKernels[kElementTypes] = {
    write_kernel<double>,
    write_kernel<float>,
    write_kernel<c10::Half>,
    write_kernel<c10::BFloat16>,
    write_kernel<c10::Float8_e4m3fn>,
    write_kernel<c10::Float8_e4m3fnuz>,
    write_kernel<c10::Float8_e5m2>,
    write_kernel<c10::Float8_e5m2fnuz>,
};

}  // namespace

cudaError_t launch_write(ElementType type, const WriteTask* tasks, int count, int64_t blocks,
                         cudaStream_t stream) {
  return launch(kKernels[static_cast<int>(type)], blocks, kThreads, stream, tasks, count);
}

int64_t write_tile(ElementType type) {
  constexpr int64_t kLengths[kElementTypes] = {2, 4, 8, 8, 16, 16, 16, 16};
  return kThreads * kVectorsPerThread * kLengths[static_cast<int>(type)];
}

}  // namespace lnprune::cuda
