// The definition of every norm, for host and device: identity, map, combine, total, root.
//
// A norm of order p is a functor over Real (float, or double for float64 weights; narrower weights
// are widened to float, which is exact). Whoever loops over elements holds one Accumulator per
// lane, turns it into a Partial where a chunk ends and folds Partials in a fixed order. The last
// Partial's total is the sum before the root, for p = 0 the count, for infinite p the extremum; its
// root is the norm. Sums are float64 for every Real. NaN is part of the definition: any NaN makes
// the norm NaN, except for p = 0, where NaN counts as an element that is not zero.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__CUDACC__)
#define LNPRUNE_FUNCTION __host__ __device__ __forceinline__
#else
#define LNPRUNE_FUNCTION inline __attribute__((always_inline))
#endif

namespace lnprune {

enum class NormKind : int {
  count,
  sum,
  sum_of_squares,
  maximum,
  minimum,
  half_integer_power_sum,
  power_sum
};
constexpr int kNormKinds = 7;

struct NormOrder {
  NormKind kind;
  double p;
};

inline NormOrder norm_order(double p) {
  const double infinity = std::numeric_limits<double>::infinity();
  if (p == 0) return {NormKind::count, p};
  if (p == 1) return {NormKind::sum, p};
  if (p == 2) return {NormKind::sum_of_squares, p};
  if (p == infinity) return {NormKind::maximum, p};
  if (p == -infinity) return {NormKind::minimum, p};
  if (std::fabs(p) < 8 && 2 * p == std::rint(2 * p)) return {NormKind::half_integer_power_sum, p};
  return {NormKind::power_sum, p};
}

template <class To, class From>
LNPRUNE_FUNCTION To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps every bit");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// The bits of |x| as an unsigned integer: ordered like |x|, with NaN above infinity.
template <class Real>
struct Magnitude;

template <>
struct Magnitude<float> {
  using Bits = uint32_t;
  static constexpr Bits kMask = 0x7fffffffu;
  static constexpr Bits kInfinity = 0x7f800000u;
};

template <>
struct Magnitude<double> {
  using Bits = uint64_t;
  static constexpr Bits kMask = 0x7fffffffffffffffull;
  static constexpr Bits kInfinity = 0x7ff0000000000000ull;
};

template <class Real>
LNPRUNE_FUNCTION typename Magnitude<Real>::Bits magnitude_bits(Real x) {
  return bit_cast<typename Magnitude<Real>::Bits>(x) & Magnitude<Real>::kMask;
}

template <class Real>
LNPRUNE_FUNCTION double magnitude(Real x) {
  return static_cast<double>(bit_cast<Real>(magnitude_bits(x)));
}

// x to the power p for x >= 0, from arithmetic that rounds the same way everywhere: the same bits
// on every processor, and loops over it vectorise. x = m * 2^e with m in [sqrt(1/2), sqrt(2));
// log2(m) by the series of atanh, 2^r by the series of exp. The relative error is at most a few
// units in the last place times 1 + |p * log2(x)|.
LNPRUNE_FUNCTION double power(double x, double p) {
  const double kInfinity = bit_cast<double>(Magnitude<double>::kInfinity);
  constexpr double kTwoTo54 = 18014398509481984.0;
  constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer
  const bool subnormal = x < 2.2250738585072014e-308;
  const uint64_t bits = bit_cast<uint64_t>(x * (subnormal ? kTwoTo54 : 1.0));
  // Subtracting the bits of sqrt(1/2) leaves the exponent e above the mantissa's bits; the bias
  // keeps the shift unsigned.
  const uint64_t shifted = bits - 0x3fe6a09e667f3bcdull + (1024ull << 52);
  const double exponent = bit_cast<double>((shifted >> 52) | 0x4330000000000000ull) -
                          (4503599627370496.0 + 1024.0) - (subnormal ? 54.0 : 0.0);
  const double m = bit_cast<double>((shifted & 0x000fffffffffffffull) + 0x3fe6a09e667f3bcdull);

  // Even and odd terms of each series run side by side: half the latency of one chain.
  const double s = (m - 1.0) / (m + 1.0);
  const double z = s * s;
  const double w = z * z;
  double even = std::fma(w, 1.0 / 23, 1.0 / 19);
  double odd = std::fma(w, 1.0 / 21, 1.0 / 17);
  even = std::fma(w, even, 1.0 / 15);
  odd = std::fma(w, odd, 1.0 / 13);
  even = std::fma(w, even, 1.0 / 11);
  odd = std::fma(w, odd, 1.0 / 9);
  even = std::fma(w, even, 1.0 / 7);
  odd = std::fma(w, odd, 1.0 / 5);
  even = std::fma(w, even, 1.0 / 3);
  const double log2_m =
      2.8853900817779268 * std::fma(s * z, std::fma(z, odd, even), s);  // 2 / ln(2)

  // The two parts of p * log2(x) stay apart so that a large exponent costs the small one no bits.
  const double whole = p * exponent;
  double y = std::fma(p, log2_m, whole);
  y = y < 1100.0 ? y : 1100.0;
  y = y > -1100.0 ? y : -1100.0;
  const double k = (y + kRound) - kRound;
  double r = std::fma(p, log2_m, whole - k);
  r = r > -1.0 ? r : -1.0;  // where y was cut off the series must not leave its range
  const double t = r * 0.69314718055994531;  // ln(2)
  const double u = t * t;
  even = std::fma(u, 1.0 / 479001600.0, 1.0 / 3628800.0);
  odd = std::fma(u, 1.0 / 6227020800.0, 1.0 / 39916800.0);
  even = std::fma(u, even, 1.0 / 40320.0);
  odd = std::fma(u, odd, 1.0 / 362880.0);
  even = std::fma(u, even, 1.0 / 720.0);
  odd = std::fma(u, odd, 1.0 / 5040.0);
  even = std::fma(u, even, 1.0 / 24.0);
  odd = std::fma(u, odd, 1.0 / 120.0);
  even = std::fma(u, even, 0.5);
  odd = std::fma(u, odd, 1.0 / 6.0);
  even = std::fma(u, even, 1.0);
  odd = std::fma(u, odd, 1.0);
  const double e = std::fma(t, odd, even);
  // 2^k in two factors, so that results below the smallest normal number are right as well.
  const double half = (k * 0.5 + kRound) - kRound;
  const double low = bit_cast<double>(bit_cast<uint64_t>(half + 1023.0 + 4503599627370496.0) << 52);
  const double high =
      bit_cast<double>(bit_cast<uint64_t>(k - half + 1023.0 + 4503599627370496.0) << 52);
  double result = e * low * high;

  result = x == 0.0 ? (p > 0 ? 0.0 : kInfinity) : result;
  result = x == kInfinity ? (p > 0 ? kInfinity : 0.0) : result;
  return x != x ? x : result;
}

// The Real that elements of a type are widened to.
template <class T>
struct RealOf {
  using Type = float;
};
template <>
struct RealOf<double> {
  using Type = double;
};

// p = 0: how many elements are not zero.
template <class Real>
struct NonzeroCount {
  using Accumulator = uint32_t;
  using Partial = double;
  static constexpr bool kCostly = false;
  LNPRUNE_FUNCTION explicit NonzeroCount(double) {}
  LNPRUNE_FUNCTION Accumulator identity() const { return 0; }
  LNPRUNE_FUNCTION Accumulator map(Accumulator a, Real x) const {
    // Every magnitude but zero carries into the sign's place: compilers make less of a comparison.
    constexpr int kSign = 8 * sizeof(Real) - 1;
    return a + static_cast<Accumulator>((magnitude_bits(x) + Magnitude<Real>::kMask) >> kSign);
  }
  LNPRUNE_FUNCTION Partial partial(Accumulator a) const { return a; }
  LNPRUNE_FUNCTION Partial combine(Partial a, Partial b) const { return a + b; }
  LNPRUNE_FUNCTION double total(Partial a) const { return a; }
  LNPRUNE_FUNCTION double root(double total) const { return total; }
};

// p = 1: the sum of magnitudes.
template <class Real>
struct Sum {
  using Accumulator = double;
  using Partial = double;
  static constexpr bool kCostly = false;
  LNPRUNE_FUNCTION explicit Sum(double) {}
  LNPRUNE_FUNCTION Accumulator identity() const { return 0; }
  LNPRUNE_FUNCTION Accumulator map(Accumulator a, Real x) const { return a + magnitude(x); }
  LNPRUNE_FUNCTION Partial partial(Accumulator a) const { return a; }
  LNPRUNE_FUNCTION Partial combine(Partial a, Partial b) const { return a + b; }
  LNPRUNE_FUNCTION double total(Partial a) const { return a; }
  LNPRUNE_FUNCTION double root(double total) const { return total; }
};

// p = 2: the root of the sum of squares. The square of a float is exact in a double, so that with
// kFused, for those who have the instruction, multiplication and addition are one with the same
// bits.
template <class Real, bool kFused = false>
struct SumOfSquares {
  using Accumulator = double;
  using Partial = double;
  static constexpr bool kCostly = false;
  LNPRUNE_FUNCTION explicit SumOfSquares(double) {}
  LNPRUNE_FUNCTION Accumulator identity() const { return 0; }
  LNPRUNE_FUNCTION Accumulator map(Accumulator a, Real x) const {
    const double wide = x;
    if constexpr (kFused && sizeof(Real) == sizeof(float)) return std::fma(wide, wide, a);
    return a + wide * wide;
  }
  LNPRUNE_FUNCTION Partial partial(Accumulator a) const { return a; }
  LNPRUNE_FUNCTION Partial combine(Partial a, Partial b) const { return a + b; }
  LNPRUNE_FUNCTION double total(Partial a) const { return a; }
  LNPRUNE_FUNCTION double root(double total) const { return std::sqrt(total); }
};

// p = inf: the largest magnitude, on its bits, where NaN is above infinity.
template <class Real>
struct Maximum {
  using Accumulator = typename Magnitude<Real>::Bits;
  using Partial = uint64_t;
  static constexpr bool kCostly = false;
  LNPRUNE_FUNCTION explicit Maximum(double) {}
  LNPRUNE_FUNCTION Accumulator identity() const { return 0; }
  LNPRUNE_FUNCTION Accumulator map(Accumulator a, Real x) const {
    const Accumulator b = magnitude_bits(x);
    return a > b ? a : b;
  }
  LNPRUNE_FUNCTION Partial partial(Accumulator a) const { return a; }
  LNPRUNE_FUNCTION Partial combine(Partial a, Partial b) const { return a > b ? a : b; }
  LNPRUNE_FUNCTION double total(Partial a) const {
    return static_cast<double>(bit_cast<Real>(static_cast<Accumulator>(a)));
  }
  LNPRUNE_FUNCTION double root(double total) const { return total; }
};

// p = -inf: the smallest magnitude. Subtracting the bits above infinity wraps NaN to the bottom,
// below zero, and infinity, the identity, to the top.
template <class Real>
struct Minimum {
  using Accumulator = typename Magnitude<Real>::Bits;
  using Partial = uint64_t;
  static constexpr bool kCostly = false;
  static constexpr Accumulator kFirstNan = Magnitude<Real>::kInfinity + 1;
  LNPRUNE_FUNCTION explicit Minimum(double) {}
  LNPRUNE_FUNCTION Accumulator identity() const { return Magnitude<Real>::kInfinity - kFirstNan; }
  LNPRUNE_FUNCTION Accumulator map(Accumulator a, Real x) const {
    const Accumulator b = magnitude_bits(x) - kFirstNan;
    return a < b ? a : b;
  }
  LNPRUNE_FUNCTION Partial partial(Accumulator a) const { return a; }
  LNPRUNE_FUNCTION Partial combine(Partial a, Partial b) const { return a < b ? a : b; }
  LNPRUNE_FUNCTION double total(Partial a) const {
    return static_cast<double>(bit_cast<Real>(static_cast<Accumulator>(a + kFirstNan)));
  }
  LNPRUNE_FUNCTION double root(double total) const { return total; }
};

// p = k / 2 with a whole k, 0 < |k| < 16: powers from products and a root, a fraction of the cost
// of power(). Zero, infinity and NaN come out right by themselves.
template <class Real>
struct HalfIntegerPowerSum {
  using Accumulator = double;
  using Partial = double;
  static constexpr bool kCostly = true;
  double p;
  bool half, one, two, four, inverse;
  LNPRUNE_FUNCTION explicit HalfIntegerPowerSum(double order) : p(order) {
    const int twice = static_cast<int>(2 * std::fabs(order));
    half = (twice & 1) != 0;
    one = (twice & 2) != 0;
    two = (twice & 4) != 0;
    four = (twice & 8) != 0;
    inverse = order < 0;
  }
  LNPRUNE_FUNCTION Accumulator identity() const { return 0; }
  LNPRUNE_FUNCTION Accumulator map(Accumulator a, Real x) const {
    const double m = magnitude(x);
    const double square = m * m;
    double product = half ? std::sqrt(m) : 1.0;
    product = one ? product * m : product;
    product = two ? product * square : product;
    product = four ? product * (square * square) : product;
    return a + (inverse ? 1.0 / product : product);
  }
  LNPRUNE_FUNCTION Partial partial(Accumulator a) const { return a; }
  LNPRUNE_FUNCTION Partial combine(Partial a, Partial b) const { return a + b; }
  LNPRUNE_FUNCTION double total(Partial a) const { return a; }
  LNPRUNE_FUNCTION double root(double total) const { return power(total, 1.0 / p); }
};

// Any other real p, negative ones too: the sum of p-th powers to the power 1 / p.
template <class Real>
struct PowerSum {
  using Accumulator = double;
  using Partial = double;
  static constexpr bool kCostly = true;
  double p;
  LNPRUNE_FUNCTION explicit PowerSum(double order) : p(order) {}
  LNPRUNE_FUNCTION Accumulator identity() const { return 0; }
  LNPRUNE_FUNCTION Accumulator map(Accumulator a, Real x) const {
    return a + power(magnitude(x), p);
  }
  LNPRUNE_FUNCTION Partial partial(Accumulator a) const { return a; }
  LNPRUNE_FUNCTION Partial combine(Partial a, Partial b) const { return a + b; }
  LNPRUNE_FUNCTION double total(Partial a) const { return a; }
  LNPRUNE_FUNCTION double root(double total) const { return power(total, 1.0 / p); }
};

}  // namespace lnprune
