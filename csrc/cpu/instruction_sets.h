// The table of loops that exist once per instruction set, and the choice among the tables.
#pragma once

#include "../kernels.h"
#include "../masked_product.h"
#include "non_temporal.h"

namespace lnprune::cpu {

// Rows of consecutive channels to reduce: element (row, channel, i) lies at
// row * row_stride + channel * channel_stride + i. Strides are in elements.
struct Chunk {
  const void* elements;
  int64_t rows;
  int64_t row_stride;
  int64_t channels;
  int64_t channel_stride;
  int64_t run;
};

// What the elements of a chunk are multiplied by: factors of the places in a run, of the columns of
// short runs, or, by the number of the row, of rows.
struct ChunkFactors {
  const double* values;
  bool in_rows;
  int64_t first_row;
  int64_t step;
  int64_t length;
};

// The partials of one tensor: channels * run side by side, for each group of each chunk.
struct Partials {
  const void* values;
  int64_t chunks;
  int64_t groups;
  int64_t channels;
  int64_t run;
};

// A part of a mask to write. Pointers are to the part's first element; null as in WriteItem.
struct WritePart {
  const void* mask;
  const void* original;
  void* new_mask;
  void* weight;
  bool non_temporal;
};

// Channels whose run is shorter than this are reduced as columns of the flat matrix; longer ones
// run by run.
constexpr int64_t kShortestRun = 64;
// Columns that one call takes at most: their accumulators and patterns stay in the L2 cache.
constexpr int64_t kColumns = 8192;

struct InstructionSet {
  const char* name;
  // One partial of 8 bytes per channel of the chunk.
  void (*reduce[kElementTypes][kNormKinds])(const Chunk& chunk, double p, void* partials);
  // The same of elements times factors, for norms of order 1 and 2; null for elements of one byte.
  // The partials are those of float64.
  void (*reduce_scaled[kElementTypes][2])(const Chunk& chunk, const ChunkFactors& factors, double p,
                                          void* partials);
  // out[i] = elements[i] * factors[i], or, where `step` is 0, elements[i] * factors[0].
  void (*scale[kElementTypes])(const void* elements, int64_t length, const double* factors,
                               int64_t step, double* out);
  // norms[c], or the sum before the root: the partials of a chunk folded in their order, then the
  // chunks in theirs.
  void (*finish[kElementTypes][kNormKinds])(const Partials& partials, double p, bool rooted,
                                            double* norms);
  // norms[c] from the sums before the root.
  void (*root[kNormKinds])(const double* sums, int64_t channels, double p, double* norms);
  // `length` elements from element `first` of the tensor on; element e belongs to keep[e / inner %
  // channels].
  void (*write_runs[kElementTypes])(const WritePart& part, int64_t first, int64_t length,
                                    int64_t inner, int64_t channels, const bool* keep);
  // Rows of `columns` elements at a distance of `row_stride`; column j belongs to keep[j / inner].
  void (*write_columns[kElementTypes])(const WritePart& part, int64_t rows, int64_t row_stride,
                                       int64_t columns, int64_t inner, const bool* keep);
};

// From the least to the best; what build_info() says and LNPRUNE_INSTRUCTION_SET takes.
constexpr const char* kNames[] = {"baseline", "x86-64-v3", "x86-64-v4"};

extern const InstructionSet kBaseline;
// Clang has no #pragma GCC target, and GCC before 11 does not know the levels: there the baseline
// is what the compiler's flags make it.
#if defined(__x86_64__) && defined(__GNUC__) && __GNUC__ >= 11 && !defined(__clang__)
#define LNPRUNE_X86_64_LEVELS 1
extern const InstructionSet kX86_64_v3;
extern const InstructionSet kX86_64_v4;
#endif

// The best table for this processor, or the lesser one that LNPRUNE_INSTRUCTION_SET names. Throws
// where that is none of the names.
const InstructionSet& instructions();

}  // namespace lnprune::cpu
