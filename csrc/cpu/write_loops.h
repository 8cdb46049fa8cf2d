// The loops of the write step. Included once per instruction set, by loops.h.
//
// Every value is the product that torch computes, mask * keep and new_mask * original: a pruned
// -0.0 stays -0.0 and a pruned infinity becomes NaN.

template <class T>
LNPRUNE_FUNCTION T product(T mask, T x) {
  return static_cast<T>(static_cast<float>(mask) * static_cast<float>(x));
}
LNPRUNE_FUNCTION float product(float mask, float x) { return mask * x; }
LNPRUNE_FUNCTION double product(double mask, double x) { return mask * x; }

// Products of one or zero with x, on the bits: all integer, so that the loop vectorises; for the
// types of 16 bits.
template <class T>
struct Bits16 {
  static constexpr bool kExist = false;
};
template <>
struct Bits16<c10::Half> {
  static constexpr bool kExist = true;
  static constexpr uint16_t kInfinity = 0x7c00, kOne = 0x3c00, kQuiet = 0x0200;
};
template <>
struct Bits16<c10::BFloat16> {
  static constexpr bool kExist = true;
  static constexpr uint16_t kInfinity = 0x7f80, kOne = 0x3f80, kQuiet = 0x0040;
};

template <class T>
LNPRUNE_FUNCTION uint16_t fast_product(uint16_t mask, uint16_t x) {
  const uint16_t magnitude = x & 0x7fff;
  const uint16_t finite = mask != 0 ? x : static_cast<uint16_t>(x & 0x8000);
  // 0 * infinity and NaN alike: a quiet NaN. 1 * infinity stays.
  const uint16_t special = mask != 0 && magnitude == Bits16<T>::kInfinity
                               ? x
                               : static_cast<uint16_t>(x | Bits16<T>::kQuiet);
  return magnitude < Bits16<T>::kInfinity ? finite : special;
}

// out[i] = a[i] * b[i], at most kBlock of them.
template <class T>
LNPRUNE_FUNCTION void multiply(const T* a, const T* b, T* out, int64_t n) {
  if constexpr (Bits16<T>::kExist) {
    const uint16_t* mask = reinterpret_cast<const uint16_t*>(a);
    const uint16_t* x = reinterpret_cast<const uint16_t*>(b);
    uint16_t* y = reinterpret_cast<uint16_t*>(out);
    uint16_t other = 0;
    for (int64_t i = 0; i < n; ++i) {
      other |= mask[i] != 0 && mask[i] != Bits16<T>::kOne ? 1 : 0;
    }
    if (other == 0) {
      for (int64_t i = 0; i < n; ++i) y[i] = fast_product<T>(mask[i], x[i]);
      return;
    }
  }
  for (int64_t i = 0; i < n; ++i) out[i] = product(a[i], b[i]);
}

// One block: keep[i] is 1 or 0 as T. All pointers are to the block's first element.
template <class T>
LNPRUNE_FUNCTION void write_block(const T* keep, const T* mask, const T* original, T* new_mask,
                                  T* weight, int64_t n) {
  if (mask == nullptr) {
    for (int64_t i = 0; i < n; ++i) new_mask[i] = keep[i];
    if (weight != nullptr) multiply(keep, original, weight, n);
  } else {
    multiply(keep, mask, new_mask, n);
    if (weight != nullptr) multiply<T>(new_mask, original, weight, n);
  }
}

template <class T>
void write_run(const WritePart& part, int64_t length, bool keep) {
  alignas(64) T flags[kBlock];
  const T flag = static_cast<T>(keep ? 1.0f : 0.0f);
  const int64_t filled = length < kBlock ? length : kBlock;
  for (int64_t i = 0; i < filled; ++i) flags[i] = flag;
  const T* mask = static_cast<const T*>(part.mask);
  const T* original = static_cast<const T*>(part.original);
  T* new_mask = static_cast<T*>(part.new_mask);
  T* weight = static_cast<T*>(part.weight);
  for (int64_t start = 0; start < length; start += kBlock) {
    const int64_t n = length - start < kBlock ? length - start : kBlock;
    write_block(flags, mask ? mask + start : nullptr, weight ? original + start : nullptr,
                new_mask + start, weight ? weight + start : nullptr, n);
  }
}

template <class T>
void write_columns(const WritePart& part, int64_t rows, int64_t row_stride, int64_t columns,
                   int64_t inner, const bool* keep) {
  alignas(64) T flags[kColumns];
  const T one = static_cast<T>(1.0f);
  const T zero = static_cast<T>(0.0f);
  if (inner == 1) {
    for (int64_t j = 0; j < columns; ++j) flags[j] = keep[j] ? one : zero;
  } else {
    for (int64_t c = 0, j = 0; j < columns; ++c) {
      for (int64_t i = 0; i < inner; ++i, ++j) flags[j] = keep[c] ? one : zero;
    }
  }
  const T* mask = static_cast<const T*>(part.mask);
  const T* original = static_cast<const T*>(part.original);
  T* new_mask = static_cast<T*>(part.new_mask);
  T* weight = static_cast<T*>(part.weight);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t start = 0; start < columns; start += kBlock) {
      const int64_t n = columns - start < kBlock ? columns - start : kBlock;
      const int64_t at = r * row_stride + start;
      write_block(flags + start, mask ? mask + at : nullptr, weight ? original + at : nullptr,
                  new_mask + at, weight ? weight + at : nullptr, n);
    }
  }
}
