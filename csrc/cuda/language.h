// What the kernels use of CUDA: memory access, shared memory, launches. Replaced in tests by an
// emulation of the same on the host.
#pragma once

#if defined(LNPRUNE_EMULATED_CUDA)
#include "emulation.h"
#else
#include <cuda_runtime.h>
#endif

#include <cstdint>
#include <type_traits>

#include "../lp_norm.h"

namespace lnprune::cuda {

// Squares of what is narrower than float64 are exact: multiplied and added in one instruction.
template <class Real>
using SumOfSquares = lnprune::SumOfSquares<Real, true>;

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// What a thread loads or stores at once: at most 16 bytes, from an address that is a multiple of
// them.
template <class T, int kBytes = 16>
struct alignas(kBytes) Vector {
  static constexpr int kLength = kBytes / sizeof(T);
  T elements[kLength];
};

// The same number, which the compiler takes for another one: what follows from it is computed
// again, and takes no register meanwhile.
__device__ __forceinline__ int computed_again(int number) {
#if !defined(LNPRUNE_EMULATED_CUDA)
  asm volatile("" : "+r"(number));
#endif
  return number;
}

#if !defined(LNPRUNE_EMULATED_CUDA)

// A large parameter of a kernel: read where the launch put it, never copied.
#define LNPRUNE_PARAMETER(Type, name) const __grid_constant__ Type name
template <class T>
using Parameter = const T;

// An array in the memory of the block.
#define LNPRUNE_SHARED(Type, name, count) __shared__ Type name[count]

// Elements of a tensor, each read once by a kernel.
template <int kBytes, class T>
__device__ __forceinline__ Vector<T, kBytes> load_vector(const T* address) {
  using Bits = std::conditional_t<kBytes == 16, uint4, uint2>;
  return lnprune::bit_cast<Vector<T, kBytes>>(__ldg(reinterpret_cast<const Bits*>(address)));
}

template <class T>
__device__ __forceinline__ T load(const T* address) {
  return *address;
}

// Written once and not read again by the kernel: not worth a place in the caches.
template <class T>
__device__ __forceinline__ void store_vector(T* address, const Vector<T>& value) {
  __stcs(reinterpret_cast<uint4*>(address), lnprune::bit_cast<uint4>(value));
}

template <class T>
__device__ __forceinline__ void store(T* address, T value) {
  *address = value;
}

// One instruction for all lanes of a warp, those that store nothing among them.
template <class T>
__device__ __forceinline__ void store_if(bool condition, T* address, T value) {
  if (condition) *address = value;
}

// Small and read by many threads: flags, descriptions, results of earlier launches.
template <class T>
__device__ __forceinline__ T load_cached(const T* address) {
  return *address;
}

// What another block of the same launch wrote: from the cache that all share.
template <class T>
__device__ __forceinline__ T load_from_other_blocks(const T* address) {
  return __ldcg(address);
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, cudaStream_t stream,
                   const Arguments&... arguments) {
  static_assert((std::is_same_v<Parameters, Arguments> && ...), "arguments are passed by address");
  void* addresses[] = {const_cast<Arguments*>(&arguments)...};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel),
                          dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)),
                          addresses, 0, stream);
}

#endif

}  // namespace lnprune::cuda
