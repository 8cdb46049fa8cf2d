// The loops of the write step. Included once per instruction set, by loops.h.
//
// Every value is a masked_product, mask * keep and new_mask * original.

// Elements that are written as one block: so many that its checks are few, so few that what it
// reads and makes stays in the L1 cache.
template <class T>
constexpr int64_t kWriteBlock = 4096 / sizeof(T);

// Flag<T>().times(flag, x) is masked_product(flag, x) for a flag of one or zero, on the bits where
// that is faster: all integer for 16 bits, so that loops vectorise, and a table for 8.
template <class T, size_t kBytes = sizeof(T)>
struct Flag {
  using Bits = T;
  static constexpr bool kOnBits = false;
  LNPRUNE_FUNCTION T times(T flag, T x) const { return flag * x; }
};

template <uint16_t kInfinity, uint16_t kOneBits, uint16_t kQuiet>
struct Flag16 {
  using Bits = uint16_t;
  static constexpr bool kOnBits = true;
  const Bits one = kOneBits;
  LNPRUNE_FUNCTION Bits times(Bits flag, Bits x) const {
    const Bits magnitude = x & 0x7fff;
    const Bits kept = flag != 0 ? 0xffff : 0;
    // 0 * infinity and NaN alike: a quiet NaN. 1 * infinity stays.
    const Bits limit = kInfinity + (kept & 1);
    const Bits finite = x & (kept | 0x8000);
    const Bits special = x | kQuiet;
    return magnitude < limit ? finite : special;
  }
};
template <>
struct Flag<c10::Half> : Flag16<0x7c00, 0x3c00, 0x0200> {};
template <>
struct Flag<c10::BFloat16> : Flag16<0x7f80, 0x3f80, 0x0040> {};

template <class Float8>
struct ProductTable {
  uint8_t times_zero[256];
  uint8_t times_one[256];
  ProductTable() {
    for (int bits = 0; bits < 256; ++bits) {
      const Float8 x(static_cast<uint8_t>(bits), Float8::from_bits());
      times_zero[bits] = masked_product(Float8(0.0f), x).x;
      times_one[bits] = masked_product(Float8(1.0f), x).x;
    }
  }
};

template <class T>
struct Flag<T, 1> {
  using Bits = uint8_t;
  static constexpr bool kOnBits = true;
  const ProductTable<T>& table;
  const Bits one;
  LNPRUNE_FUNCTION Flag() : table(shared_table()), one(T(1.0f).x) {}
  LNPRUNE_FUNCTION Bits times(Bits flag, Bits x) const {
    return flag != 0 ? table.times_one[x] : table.times_zero[x];
  }
  // Made on the first call: what is made when the library is loaded would run these instructions
  // on processors without them.
  static const ProductTable<T>& shared_table() {
    static const ProductTable<T> table;
    return table;
  }
};

#define LNPRUNE_INLINE __attribute__((always_inline))

// A non-temporal store of one aligned line, in vectors as wide as those that the compiler makes of
// loops, so that what was just computed is in a register.
LNPRUNE_FUNCTION void stream_line(void* out, const void* line) {
#if LNPRUNE_X86_64_LEVEL >= 3
  const __m256i* vectors = static_cast<const __m256i*>(line);
  for (int i = 0; i < 2; ++i) {
    _mm256_stream_si256(static_cast<__m256i*>(out) + i, _mm256_load_si256(vectors + i));
  }
#elif defined(__SSE2__)
  const __m128i* vectors = static_cast<const __m128i*>(line);
  for (int i = 0; i < 4; ++i) {
    _mm_stream_si128(static_cast<__m128i*>(out) + i, _mm_load_si128(vectors + i));
  }
#else
  std::memcpy(out, line, kCacheLine);
#endif
}

// out[i] = value(i), by non-temporal stores for whole lines where that is asked for. `Bits` is an
// unsigned or a floating type.
template <class Bits, class Value>
LNPRUNE_FUNCTION void store(Bits* __restrict out, int64_t n, bool non_temporal, Value value) {
  int64_t i = 0;
  if (non_temporal) {
    constexpr int64_t kLine = kCacheLine / sizeof(Bits);
    const int64_t head = bytes_to_line(out, n * static_cast<int64_t>(sizeof(Bits))) / sizeof(Bits);
    for (; i < head; ++i) out[i] = value(i);
    for (; i + kLine <= n; i += kLine) {
      alignas(kCacheLine) Bits line[kLine];
      for (int64_t j = 0; j < kLine; ++j) line[j] = value(i + j);
      stream_line(out + i, line);
    }
  }
  for (; i < n; ++i) out[i] = value(i);
}

// out[i] = flags[i] * x[i] for flags of ones and zeros.
template <class T>
LNPRUNE_FUNCTION void multiply_flags(const T* flags, const T* x, T* out, int64_t n,
                                     bool non_temporal) {
  using Bits = typename Flag<T>::Bits;
  const Bits* flag_bits = reinterpret_cast<const Bits*>(flags);
  const Bits* x_bits = reinterpret_cast<const Bits*>(x);
  const Flag<T> product;
  store(reinterpret_cast<Bits*>(out), n, non_temporal,
        [=](int64_t i) LNPRUNE_INLINE { return product.times(flag_bits[i], x_bits[i]); });
}

// out[i] = mask[i] * x[i]. Masks are mostly ones and zeros, but custom ones can hold anything.
template <class T>
LNPRUNE_FUNCTION void multiply(const T* mask, const T* x, T* out, int64_t n, bool non_temporal) {
  if constexpr (Flag<T>::kOnBits) {
    using Bits = typename Flag<T>::Bits;
    const Bits* bits = reinterpret_cast<const Bits*>(mask);
    const Bits one = Flag<T>().one;
    Bits other = 0;
    for (int64_t i = 0; i < n; ++i) {
      const Bits without_one = bits[i] == one ? Bits{0} : bits[i];
      other |= without_one;
    }
    if (other == 0) {
      multiply_flags(mask, x, out, n, non_temporal);
      return;
    }
    store(reinterpret_cast<Bits*>(out), n, non_temporal, [=](int64_t i) LNPRUNE_INLINE {
      return lnprune::bit_cast<Bits>(masked_product(mask[i], x[i]));
    });
  } else {
    store(out, n, non_temporal,
          [=](int64_t i) LNPRUNE_INLINE { return masked_product(mask[i], x[i]); });
  }
}

// out[i] = flag * x[i] for one flag of one or zero.
template <class T>
LNPRUNE_FUNCTION void multiply_flag(T flag, const T* x, T* out, int64_t n, bool non_temporal) {
  using Bits = typename Flag<T>::Bits;
  const Bits flag_bits = lnprune::bit_cast<Bits>(flag);
  const Bits* x_bits = reinterpret_cast<const Bits*>(x);
  const Flag<T> product;
  store(reinterpret_cast<Bits*>(out), n, non_temporal,
        [=](int64_t i) LNPRUNE_INLINE { return product.times(flag_bits, x_bits[i]); });
}

// As bits: GCC vectorises no copies of class types.
template <class T>
LNPRUNE_FUNCTION void fill(T flag, T* out, int64_t n, bool non_temporal) {
  using Bits = typename Flag<T>::Bits;
  const Bits flag_bits = lnprune::bit_cast<Bits>(flag);
  store(reinterpret_cast<Bits*>(out), n, non_temporal,
        [=](int64_t) LNPRUNE_INLINE { return flag_bits; });
}

template <class T>
LNPRUNE_FUNCTION void copy(const T* x, T* out, int64_t n, bool non_temporal) {
  using Bits = typename Flag<T>::Bits;
  const Bits* x_bits = reinterpret_cast<const Bits*>(x);
  store(reinterpret_cast<Bits*>(out), n, non_temporal,
        [=](int64_t i) LNPRUNE_INLINE { return x_bits[i]; });
}

// A block of a repeated mask, made by make_mask(place), and its weight, which is multiplied with
// the block where it was made. That is the mask itself or, since non-temporal stores leave nothing
// in the caches, a buffer.
template <class T, class MakeMask>
LNPRUNE_FUNCTION void write_block(const WritePart& part, int64_t start, int64_t n,
                                  MakeMask make_mask) {
  alignas(kCacheLine) T buffer[kWriteBlock<T>];
  T* out = static_cast<T*>(part.new_mask) + start;
  T* made = part.non_temporal ? buffer : out;
  make_mask(made);
  if (part.weight != nullptr) {
    multiply<T>(made, static_cast<const T*>(part.original) + start,
                static_cast<T*>(part.weight) + start, n, part.non_temporal);
  }
  if (part.non_temporal) copy<T>(made, out, n, true);
}

template <class T>
void write_runs(const WritePart& part, int64_t first, int64_t length, int64_t inner,
                int64_t channels, const bool* keep) {
  const T* mask = static_cast<const T*>(part.mask);
  const T* original = static_cast<const T*>(part.original);
  T* new_mask = static_cast<T*>(part.new_mask);
  T* weight = static_cast<T*>(part.weight);
  int64_t run = first / inner;
  int64_t left = (run + 1) * inner - first;  // of this run
  for (int64_t start = 0; start < length;) {
    int64_t n = left < length - start ? left : length - start;
    if (n > kWriteBlock<T>) n = kWriteBlock<T>;
    const T flag = static_cast<T>(keep[run % channels] ? 1.0f : 0.0f);
    if (mask == nullptr) {
      fill(flag, new_mask + start, n, part.non_temporal);
      if (weight != nullptr) {
        multiply_flag(flag, original + start, weight + start, n, part.non_temporal);
      }
    } else {
      write_block<T>(part, start, n, [=](T* made) LNPRUNE_INLINE {
        multiply_flag(flag, mask + start, made, n, false);
      });
    }
    start += n;
    left -= n;
    if (left == 0) {
      ++run;
      left = inner;
    }
  }
}

template <class T>
void write_columns(const WritePart& part, int64_t rows, int64_t row_stride, int64_t columns,
                   int64_t inner, const bool* keep) {
  alignas(kCacheLine) T flags[kColumns];
  const T one = static_cast<T>(1.0f);
  const T zero = static_cast<T>(0.0f);
  if (inner == 1) {
    for (int64_t j = 0; j < columns; ++j) flags[j] = keep[j] ? one : zero;
  } else {
    for (int64_t c = 0, j = 0; j < columns; ++c) {
      for (int64_t i = 0; i < inner; ++i, ++j) flags[j] = keep[c] ? one : zero;
    }
  }
  // Short rows without gaps are taken several at a time.
  int64_t together = 1;
  if (row_stride == columns) {
    while (2 * together * columns <= kWriteBlock<T> && 2 * together <= rows) {
      std::memcpy(flags + together * columns, flags, together * columns * sizeof(T));
      together *= 2;
    }
  }
  const T* mask = static_cast<const T*>(part.mask);
  const T* original = static_cast<const T*>(part.original);
  T* new_mask = static_cast<T*>(part.new_mask);
  T* weight = static_cast<T*>(part.weight);
  for (int64_t r = 0; r < rows; r += together) {
    const int64_t length = (rows - r < together ? rows - r : together) * columns;
    for (int64_t start = 0; start < length; start += kWriteBlock<T>) {
      const int64_t n = length - start < kWriteBlock<T> ? length - start : kWriteBlock<T>;
      const int64_t at = r * row_stride + start;
      const T* block_flags = flags + start;
      if (mask == nullptr) {
        copy(block_flags, new_mask + at, n, part.non_temporal);
        if (weight != nullptr) {
          multiply_flags(block_flags, original + at, weight + at, n, part.non_temporal);
        }
      } else {
        write_block<T>(part, at, n, [=](T* made) LNPRUNE_INLINE {
          multiply_flags(block_flags, mask + at, made, n, false);
        });
      }
    }
  }
}

#undef LNPRUNE_INLINE
