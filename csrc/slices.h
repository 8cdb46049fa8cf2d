// The view of a dense tensor along one dim as [outer, channels, inner] in memory order.
//
// The words for its parts, here, in the kernels and in docs/:
//   row     all that one index of `outer` holds: channels * inner elements side by side.
//   run     the `inner` elements of one channel in one row, side by side too. A channel is `outer`
//           runs. Where runs are long, the rank step sums along them.
//   column  one place in a row: `outer` elements, each a row after the other. A channel is `inner`
//           columns. Where runs are short, the rank step sums all columns of a row at once.
//   chunk   some rows, or, where runs are very long, a part of the runs of one row. Each chunk has
//           one partial result per channel. Its size follows from shape and dtype alone, so the
//           order of a sum does too.
//   strip   channels side by side. A task of the CPU or a block of the GPU reduces one strip of one
//           chunk.
//   lane    of the CPU: one of the 32 accumulators of a run, which takes every 32nd element. Of the
//           GPU: one of the threads side by side along a run, or along the columns of a strip.
//   group   of the GPU: the lanes that work on one row together; each group of a block has rows of
//           its own. (In Python, group_size is another matter: channels that are kept or pruned
//           together.)
//   team    of the GPU, where channels are runs: all groups of one channel.
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
