// The part of CUDA that the kernels use, run on the host: a fiber per thread, several blocks at a
// time, in any order; it finds what a GPU would hide, and counts memory traffic.
//
// What is checked: every thread of a block reaches the same barrier, every lane of a warp the same
// shuffle; vector accesses are aligned. What is made visible: shared memory starts as garbage,
// other blocks see a thread's stores only after its __threadfence(), threads and blocks run in an
// order that changes with the schedule.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <type_traits>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define LNPRUNE_PARAMETER(Type, name) const Type& name
#define LNPRUNE_SHARED(Type, name, count) \
  auto* name = reinterpret_cast<Type*>(   \
      ::lnprune::emulation::shared(__FILE__, __LINE__, sizeof(Type) * (count)))

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
constexpr cudaError_t cudaErrorLaunchFailure = 719;

struct EmulatedIndex {
  unsigned x;
};
extern EmulatedIndex threadIdx;
extern EmulatedIndex blockIdx;

namespace lnprune::emulation {

// What the launches since the last reset did. Traffic of a warp's access number k is what its
// lanes' accesses number k touch together; cached reads count once per block.
struct Meter {
  int64_t launches = 0;
  int64_t bytes_read = 0;
  int64_t bytes_written = 0;
  int64_t sectors_read = 0;  // of 32 bytes
  int64_t sectors_written = 0;
  int64_t cached_sectors = 0;
};

enum class Schedule : int { ascending, descending, shuffled };
constexpr int kSchedules = 3;

// Set before launches; one process, one launch at a time.
void set_schedule(Schedule schedule, uint64_t seed);
void set_metering(bool on);
Meter& meter();

// What went wrong in the launch that last failed.
std::string error_message();

cudaError_t run(const std::function<void()>& thread, int64_t blocks, int threads);

// Called by the threads of a launch.
enum class Access { read, write, cached };
void* shared(const char* file, int line, size_t bytes);
void record(Access access, const void* address, size_t bytes);
void record_nothing(Access access);  // this lane's part of an access of its warp
void store(void* address, const void* value, size_t bytes);
void flush_stores();
void fence();
void block_barrier(int line);
// Gives this lane's value to the warp and returns those of all its lanes.
const uint64_t* exchange(uint64_t value, int line);
[[noreturn]] void fail(const std::string& message);

}  // namespace lnprune::emulation

// Line numbers tell barriers and shuffles apart.
#define __syncthreads() ::lnprune::emulation::block_barrier(__LINE__)
#define __threadfence() ::lnprune::emulation::fence()
#define __shfl_xor_sync(mask, value, distance) \
  ::lnprune::emulation::shuffle((value), (distance), true, __LINE__)
#define __shfl_up_sync(mask, value, distance) \
  ::lnprune::emulation::shuffle((value), (distance), false, __LINE__)

namespace lnprune::emulation {

template <class T>
T shuffle(T value, int distance, bool exclusive_or, int line) {
  static_assert(sizeof(T) <= 8, "shuffles move at most 64 bits");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  const uint64_t* lanes = exchange(bits, line);
  const int lane = static_cast<int>(threadIdx.x % 32);
  int source = exclusive_or ? lane ^ distance : lane - distance;
  if (source < 0) source = lane;
  std::memcpy(&value, &lanes[source], sizeof(T));
  return value;
}

}  // namespace lnprune::emulation

inline unsigned atomicAdd(unsigned* address, unsigned value) {
  const unsigned before = *address;
  *address = before + value;
  return before;
}

// Counts from zero to `most` and then to zero again.
inline unsigned atomicInc(unsigned* address, unsigned most) {
  const unsigned before = *address;
  *address = before >= most ? 0 : before + 1;
  return before;
}

inline int __clzll(long long value) {
  return value == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(value));
}

namespace lnprune::cuda {

template <class T>
using Parameter = const T&;

template <class T, int kBytes>
struct Vector;

template <int kBytes, class T>
Vector<T, kBytes> load_vector(const T* address) {
  if (reinterpret_cast<uintptr_t>(address) % kBytes != 0) emulation::fail("misaligned vector load");
  emulation::record(emulation::Access::read, address, kBytes);
  Vector<T, kBytes> value;
  std::memcpy(static_cast<void*>(&value), address, kBytes);
  return value;
}

template <class T>
T load(const T* address) {
  emulation::record(emulation::Access::read, address, sizeof(T));
  return *address;
}

template <class T, int kBytes>
void store_vector(T* address, const Vector<T, kBytes>& value) {
  if (reinterpret_cast<uintptr_t>(address) % kBytes != 0)
    emulation::fail("misaligned vector store");
  emulation::record(emulation::Access::write, address, kBytes);
  emulation::store(address, &value, kBytes);
}

template <class T>
void store(T* address, T value) {
  emulation::record(emulation::Access::write, address, sizeof(T));
  emulation::store(address, &value, sizeof(T));
}

template <class T>
void store_if(bool condition, T* address, T value) {
  if (condition) {
    store(address, value);
  } else {
    emulation::record_nothing(emulation::Access::write);
  }
}

template <class T>
T load_cached(const T* address) {
  emulation::record(emulation::Access::cached, address, sizeof(T));
  return *address;
}

template <class T>
T load_from_other_blocks(const T* address) {
  return load(address);
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, cudaStream_t,
                   const Arguments&... arguments) {
  static_assert((std::is_same_v<std::decay_t<Parameters>, Arguments> && ...),
                "as for a launch on a GPU");
  static_assert((sizeof(Arguments) + ...) <= 32764, "more parameters than a kernel can have");
  return emulation::run([&] { kernel(arguments...); }, blocks, threads);
}

}  // namespace lnprune::cuda
