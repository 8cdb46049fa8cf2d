// The view of a dense tensor along one dim as [batch, outer, channels, inner] in memory order.
//
// The words for its parts, here, in the kernels and in docs/:
//   matrix  all that one index of `batch` holds: a tensor of its own, with channels and a ranking
//   of
//           its own. Where nobody asks for a batch, there is one matrix: [outer, channels, inner].
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

#include "lp_norm.h"

namespace lnprune {

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Slices {
  int64_t batch;
  int64_t outer;
  int64_t channels;
  int64_t inner;

  int64_t row() const { return channels * inner; }
  LNPRUNE_FUNCTION int64_t matrix() const { return outer * channels * inner; }
  int64_t elements() const { return batch * matrix(); }
  // Of all matrices: so many norms and flags there are, those of a matrix side by side.
  int64_t all_channels() const { return batch * channels; }
};

// The same elements and channels in fewer matrices: matrices of one row each are a row together.
inline Slices folded(const Slices& slices) {
  if (slices.outer > 1) return slices;
  return {1, 1, slices.all_channels(), slices.inner};
}

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
  Slices slices{1, 1, sizes[dim], 1};
  for (int64_t d = 0; d < dims; ++d) {
    if (d == dim || sizes[d] == 1) continue;
    // A dim of one channel can have any stride: all others are its inner block.
    const bool is_outer = sizes[dim] > 1 && strides[d] > strides[dim];
    (is_outer ? slices.outer : slices.inner) *= sizes[d];
  }
  return slices;
}

// A dim that counts as two: so many matrices, and what is left of it within each.
struct Batch {
  int64_t dim;
  int64_t size;
};

// The view with a batch, whose matrices may have more dims around them than there is room for: then
// its batch is 0. Where the channels of a matrix follow right behind those of the one before, in
// each of several rows, they are one matrix with all of these channels.
inline Slices make_slices(const int64_t* sizes, const int64_t* strides, int64_t dims, int64_t dim,
                          Batch batch) {
  if (batch.size == 1) return make_slices(sizes, strides, dims, dim);
  constexpr Slices kNone{0, 0, 0, 0};
  const int64_t rest = sizes[batch.dim] / batch.size;
  const int64_t batch_stride = strides[batch.dim] * rest;
  const bool is_split = dim == batch.dim;
  const int64_t channels = is_split ? rest : sizes[dim];
  // One channel lies wherever the batch does.
  const int64_t stride = channels > 1 ? strides[dim] : batch_stride;
  if (stride > batch_stride) return kNone;
  int64_t before = 1;
  int64_t between = 1;
  int64_t inner = 1;
  for (int64_t d = 0; d < dims; ++d) {
    const int64_t size = d == batch.dim ? rest : sizes[d];
    if (size == 1 || d == dim) continue;
    int64_t& part = strides[d] > batch_stride ? before : strides[d] > stride ? between : inner;
    part *= size;
  }
  if (before == 1) return {batch.size, between, channels, inner};
  if (between > 1) return kNone;
  return {1, before, batch.size * channels, inner};
}

// Where the indices of another dim are in the view: element (outer, channel, inner) of a matrix has
// index outer / step % length, or inner / step % length.
struct DimInView {
  bool in_rows;  // in outer, not in inner
  int64_t step;
  int64_t length;
};

inline DimInView place_of_dim(const int64_t* sizes, const int64_t* strides, int64_t dims,
                              int64_t dim, Batch batch, int64_t other) {
  const bool is_split = batch.size > 1;
  const auto size_of = [&](int64_t d) {
    return is_split && d == batch.dim ? sizes[d] / batch.size : sizes[d];
  };
  DimInView place{size_of(dim) > 1 && strides[other] > strides[dim], 1, size_of(other)};
  for (int64_t d = 0; d < dims; ++d) {
    if (d == dim || d == other || size_of(d) == 1 || strides[d] >= strides[other]) continue;
    if (!place.in_rows || strides[d] > strides[dim]) place.step *= size_of(d);
  }
  return place;
}

}  // namespace lnprune
