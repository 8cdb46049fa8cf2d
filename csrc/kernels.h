// The functions that each backend implements: raw pointers and sizes, no torch but its half types.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Float8_e4m3fn.h>
#include <torch/headeronly/util/Float8_e4m3fnuz.h>
#include <torch/headeronly/util/Float8_e5m2.h>
#include <torch/headeronly/util/Float8_e5m2fnuz.h>
#include <torch/headeronly/util/Half.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "lp_norm.h"
#include "slices.h"

namespace lnprune {

enum class ElementType : int {
  float64,
  float32,
  float16,
  bfloat16,
  float8_e4m3fn,
  float8_e4m3fnuz,
  float8_e5m2,
  float8_e5m2fnuz
};
constexpr int kElementTypes = 8;

constexpr int64_t element_bytes(ElementType type) {
  constexpr int64_t kBytes[kElementTypes] = {8, 4, 2, 2, 1, 1, 1, 1};
  return kBytes[static_cast<int>(type)];
}

// What the elements of a tensor are multiplied by before they are ranked: a factor for each index
// of one of its dims.
struct Scaling {
  const double* factors;  // null: elements count as they are
  DimInView place;
  int64_t matrix;  // from the factors of one matrix to those of the next; 0: they share them
};

// One tensor to rank: its elements, and room for one norm, or sum before the root, per channel of
// each matrix.
struct RankItem {
  const void* elements;
  ElementType type;
  Slices slices;
  double* norms;
  Scaling scaling;
};

// Factors of each matrix keep matrices apart.
inline Slices folded(const RankItem& item) {
  return item.scaling.matrix == 0 ? folded(item.slices) : item.slices;
}

// Sums before the root, and room for the norms that are their roots.
struct RootItem {
  const double* sums;
  int64_t channels;
  double* norms;
};

// Rankings to cut, one after another, each by itself: which channels stay. `mask_counts`, where not
// null, holds zero for each channel without a nonzero mask element; they take no part and are not
// kept.
struct SelectItem {
  const double* norms;
  const double* mask_counts;
  int64_t rankings;
  int64_t channels;  // of each ranking
  int64_t count;     // channels to prune; negative: use fraction
  double fraction;   // share of the participating channels to prune
  bool* keep;
};

// One mask to write, new_mask = mask * keep, and with it weight = new_mask * original. All tensors
// of an item have the same dtype and memory order. A null mask stands for ones; a null weight is
// not written.
struct WriteItem {
  const bool* keep;
  const void* mask;
  const void* original;
  void* new_mask;
  void* weight;
  ElementType type;
  Slices slices;
};

// One tensor whose pruned channels become zero in place: +0.0, whatever was there. Kept channels
// are as they were, bit for bit.
struct ZeroItem {
  const bool* keep;
  void* elements;
  ElementType type;
  Slices slices;
};

// What belongs to one matrix of a batch, or to one ranking. Null stays null.
template <class T>
T* moved_by(T* address, int64_t count) {
  return address == nullptr ? nullptr : address + count;
}
template <class Bytes>
Bytes* moved_by(Bytes* address, int64_t count, ElementType type) {
  using Byte = std::conditional_t<std::is_const_v<Bytes>, const char, char>;
  return moved_by(static_cast<Byte*>(address), count * element_bytes(type));
}

inline RankItem matrix_of(const RankItem& item, int64_t matrix) {
  const int64_t elements = matrix * item.slices.matrix();
  RankItem one = item;
  one.elements = moved_by(item.elements, elements, item.type);
  one.slices.batch = 1;
  one.norms = moved_by(item.norms, matrix * item.slices.channels);
  one.scaling.factors = moved_by(item.scaling.factors, matrix * item.scaling.matrix);
  return one;
}

inline SelectItem ranking_of(const SelectItem& item, int64_t ranking) {
  const int64_t channels = ranking * item.channels;
  SelectItem one = item;
  one.norms = item.norms + channels;
  one.mask_counts = moved_by(item.mask_counts, channels);
  one.rankings = 1;
  one.keep = item.keep + channels;
  return one;
}

inline WriteItem matrix_of(const WriteItem& item, int64_t matrix) {
  const int64_t elements = matrix * item.slices.matrix();
  WriteItem one = item;
  one.keep = moved_by(item.keep, matrix * item.slices.channels);
  one.mask = moved_by(item.mask, elements, item.type);
  one.original = moved_by(item.original, elements, item.type);
  one.new_mask = moved_by(item.new_mask, elements, item.type);
  one.weight = moved_by(item.weight, elements, item.type);
  one.slices.batch = 1;
  return one;
}

inline ZeroItem matrix_of(const ZeroItem& item, int64_t matrix) {
  ZeroItem one = item;
  one.keep = moved_by(item.keep, matrix * item.slices.channels);
  one.elements = moved_by(item.elements, matrix * item.slices.matrix(), item.type);
  one.slices.batch = 1;
  return one;
}

// What one call asks for on one device. Lists that are empty ask for nothing; the others run in
// this order, each reading what those before it wrote.
struct Steps {
  std::vector<RankItem> scores;
  NormOrder order{NormKind::count, 0};  // of the scores and the sums
  bool rooted = true;                   // scores become norms, not the sums before the root
  std::vector<RankItem> masks;          // to find, as by order 0, the channels that are not zero
  std::vector<RootItem> sums;
  std::vector<SelectItem> selections;
  std::vector<WriteItem> writes;
  std::vector<ZeroItem> zeros;
};

namespace cpu {

using Body = void (*)(void* context, int64_t begin, int64_t end);

// The threads of a call. run() calls body(context, begin, end) on disjoint ranges that cover
// [0, tasks), at least `grain` long.
struct Threads {
  int64_t count;
  void (*run)(int64_t tasks, int64_t grain, Body body, void* context);
};

// All steps of a call, by those that follow.
void run(const Steps& steps, const Threads& threads);

void rank(const RankItem* items, size_t count, NormOrder order, bool rooted,
          const Threads& threads);
// For each channel of each mask 1 where any element is not zero, else 0, in place of a norm.
void find_alive(const RankItem* items, size_t count, const Threads& threads);
void root(const RootItem* items, size_t count, NormOrder order, const Threads& threads);
void select(const SelectItem* items, size_t count, const Threads& threads);
// `bytes_of_call` is what all parts of a call write, which tells whether it stays in the caches.
void write(const WriteItem* items, size_t count, int64_t bytes_of_call, const Threads& threads);
void zero(const ZeroItem* items, size_t count, const Threads& threads);

// Into how many tasks one tensor is cut.
int64_t rank_tasks(const Slices& slices, int64_t threads);
int64_t write_tasks(const Slices& slices, int64_t threads);
int64_t zero_tasks(const Slices& slices, int64_t threads);

// Asks the system to back a large block with huge pages. Worth it before the first write, when one
// fault per huge page replaces hundreds.
void advise_huge_pages(void* block, size_t bytes);

// The place of the first block that cannot be written, by its first page; `count` where all can, or
// where the system does not tell.
size_t first_unwritable(void* const* blocks, size_t count);

// The instruction set that the kernels run with.
const char* instruction_set();

}  // namespace cpu
}  // namespace lnprune
