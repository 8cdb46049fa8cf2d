// The view of a dense tensor along one dim as [outer, channels, inner] in memory order.
#pragma once

#include <cstdint>

namespace lnprune {

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Slices {
  int64_t outer;
  int64_t channels;
  int64_t inner;

  int64_t row() const { return channels * inner; }
  int64_t elements() const { return outer * channels * inner; }
};

// True where the elements fill one block of memory without gaps or overlaps, in any order of the
// dims.
inline bool is_dense(const int64_t* sizes, const int64_t* strides, int64_t dims) {
  // Each step finds the dim that continues the block; dims are few.
  int64_t filled = 1;
  for (int64_t step = 0; step < dims; ++step) {
    int64_t next = 0;
    for (int64_t d = 0; d < dims; ++d) {
      if (sizes[d] == 0) return true;
      if (sizes[d] > 1 && strides[d] == filled) next = sizes[d];
    }
    if (next == 0) break;
    filled *= next;
  }
  int64_t elements = 1;
  for (int64_t d = 0; d < dims; ++d) elements *= sizes[d];
  return filled == elements;
}

// Requires is_dense. In a dense tensor the dims with smaller strides than dim's are its inner
// block.
inline Slices make_slices(const int64_t* sizes, const int64_t* strides, int64_t dims, int64_t dim) {
  Slices slices{1, sizes[dim], 1};
  for (int64_t d = 0; d < dims; ++d) {
    if (d == dim || sizes[d] == 1) continue;
    // A dim of one channel can have any stride: all others are its inner block.
    const bool is_outer = sizes[dim] > 1 && strides[d] > strides[dim];
    (is_outer ? slices.outer : slices.inner) *= sizes[d];
  }
  return slices;
}

}  // namespace lnprune
