// Every loop over elements, compiled for one instruction set: the includer names the table to fill
// in LNPRUNE_TABLE and its name in LNPRUNE_TABLE_NAME, and has included what is not to be compiled
// for it.

namespace lnprune::cpu {
namespace {

// clang-format off: the loops need widen.h
#include "widen.h"
#include "reduce_loops.h"
#include "write_loops.h"
// clang-format on

template <template <class> class Norm, class T>
constexpr auto scaled_loop() {
  using Loop = void (*)(const Chunk&, const ChunkFactors&, double, void*);
  if constexpr (sizeof(T) == 1) {
    return Loop{nullptr};
  } else {
    return Loop{reduce_scaled<Norm, T>};
  }
}

// Norms of doubles, whose squares are not exact.
template <class Real>
using SumOfSquares = lnprune::SumOfSquares<Real>;

// The element types in the order of ElementType, the norms in the order of NormKind.
template <class... T>
constexpr InstructionSet make_table(const char* name) {
  return {name,
          {{reduce<NonzeroCount, T>, reduce<Sum, T>, reduce<SquareSum, T>, reduce<Maximum, T>,
            reduce<Minimum, T>, reduce<HalfIntegerPowerSum, T>, reduce<PowerSum, T>}...},
          {{scaled_loop<Sum, T>(), scaled_loop<SumOfSquares, T>()}...},
          {scale<T>...},
          {{finish<NonzeroCount, T>, finish<Sum, T>, finish<SquareSum, T>, finish<Maximum, T>,
            finish<Minimum, T>, finish<HalfIntegerPowerSum, T>, finish<PowerSum, T>}...},
          {root<NonzeroCount>, root<Sum>, root<SquareSum>, root<Maximum>, root<Minimum>,
           root<HalfIntegerPowerSum>, root<PowerSum>},
          {write_runs<T>...},
          {write_columns<T>...}};
}

}  // namespace

const InstructionSet LNPRUNE_TABLE =
    make_table<double, float, c10::Half, c10::BFloat16, c10::Float8_e4m3fn, c10::Float8_e4m3fnuz,
               c10::Float8_e5m2, c10::Float8_e5m2fnuz>(LNPRUNE_TABLE_NAME);

}  // namespace lnprune::cpu
