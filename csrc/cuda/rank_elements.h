// How the rank step reads elements: one of each dtype as a float or a double, as it is or times a
// factor.
#pragma once

#include "launches.h"

namespace lnprune::cuda {

// Eight bits of any format. What they stand for is looked up in a table of the block.
struct Float8 {
  uint8_t bits;
};

// Internal to each file of kernels, as all of their headers.
namespace {

template <class T>
constexpr int kVectorBytes = rank_vector_bytes(sizeof(T));
template <class T>
constexpr int kLength = kVectorBytes<T> / sizeof(T);

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

}  // namespace
}  // namespace lnprune::cuda
