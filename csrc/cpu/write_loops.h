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

// out[i] = flags[i] * x[i] for flags of ones and zeros.
template <class T>
LNPRUNE_FUNCTION void multiply_flags(const T* __restrict flags, const T* __restrict x,
                                     T* __restrict out, int64_t n) {
  using Bits = typename Flag<T>::Bits;
  const Bits* __restrict flag_bits = reinterpret_cast<const Bits*>(flags);
  const Bits* __restrict x_bits = reinterpret_cast<const Bits*>(x);
  Bits* __restrict out_bits = reinterpret_cast<Bits*>(out);
  const Flag<T> product;
  for (int64_t i = 0; i < n; ++i) out_bits[i] = product.times(flag_bits[i], x_bits[i]);
}

// out[i] = mask[i] * x[i]. Masks are mostly ones and zeros, but custom ones can hold anything.
template <class T>
LNPRUNE_FUNCTION void multiply(const T* __restrict mask, const T* __restrict x, T* __restrict out,
                               int64_t n) {
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
      multiply_flags(mask, x, out, n);
      return;
    }
  }
  for (int64_t i = 0; i < n; ++i) out[i] = masked_product(mask[i], x[i]);
}

// out[i] = flag * x[i] for one flag of one or zero.
template <class T>
LNPRUNE_FUNCTION void multiply_flag(T flag, const T* __restrict x, T* __restrict out, int64_t n) {
  using Bits = typename Flag<T>::Bits;
  const Bits flag_bits = lnprune::bit_cast<Bits>(flag);
  const Bits* __restrict x_bits = reinterpret_cast<const Bits*>(x);
  Bits* __restrict out_bits = reinterpret_cast<Bits*>(out);
  const Flag<T> product;
  for (int64_t i = 0; i < n; ++i) out_bits[i] = product.times(flag_bits, x_bits[i]);
}

// As bits: GCC vectorises no copies of class types.
template <class T>
LNPRUNE_FUNCTION void fill(T flag, T* out, int64_t n) {
  using Bits = typename Flag<T>::Bits;
  const Bits flag_bits = lnprune::bit_cast<Bits>(flag);
  Bits* out_bits = reinterpret_cast<Bits*>(out);
  for (int64_t i = 0; i < n; ++i) out_bits[i] = flag_bits;
}

// Where the elements of one block are made: in place, or, to be stored past the caches, beside it.
template <class T>
class Block {
 public:
  explicit Block(const WritePart& part) : part_(part) {}

  // A block of the part that begins with this element.
  void begin(int64_t start) {
    start_ = start;
    mask = part_.past_caches ? masks_ : static_cast<T*>(part_.new_mask) + start;
    if (part_.weight == nullptr) return;
    weight = part_.past_caches ? weights_ : static_cast<T*>(part_.weight) + start;
  }

  void end(int64_t n) {
    if (!part_.past_caches) return;
    const int64_t bytes = n * static_cast<int64_t>(sizeof(T));
    copy_past_caches(static_cast<T*>(part_.new_mask) + start_, masks_, bytes);
    if (weight != nullptr)
      copy_past_caches(static_cast<T*>(part_.weight) + start_, weights_, bytes);
  }

  T* mask = nullptr;
  T* weight = nullptr;

 private:
  const WritePart& part_;
  int64_t start_ = 0;
  alignas(64) T masks_[kWriteBlock<T>];
  alignas(64) T weights_[kWriteBlock<T>];
};

template <class T>
void write_runs(const WritePart& part, int64_t first, int64_t length, int64_t inner,
                int64_t channels, const bool* keep) {
  const T* mask = static_cast<const T*>(part.mask);
  const T* original = static_cast<const T*>(part.original);
  Block<T> block(part);
  int64_t run = first / inner;
  int64_t left = (run + 1) * inner - first;  // of this run
  for (int64_t start = 0; start < length; start += kWriteBlock<T>) {
    const int64_t end = length - start < kWriteBlock<T> ? length : start + kWriteBlock<T>;
    block.begin(start);
    for (int64_t i = start; i < end;) {
      const int64_t n = left < end - i ? left : end - i;
      const T flag = static_cast<T>(keep[run % channels] ? 1.0f : 0.0f);
      T* new_mask = block.mask + (i - start);
      if (mask == nullptr) {
        fill(flag, new_mask, n);
        if (part.weight != nullptr) {
          multiply_flag(flag, original + i, block.weight + (i - start), n);
        }
      } else {
        multiply_flag(flag, mask + i, new_mask, n);
        if (part.weight != nullptr) {
          multiply<T>(new_mask, original + i, block.weight + (i - start), n);
        }
      }
      i += n;
      left -= n;
      if (left == 0) {
        ++run;
        left = inner;
      }
    }
    block.end(end - start);
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
  Block<T> block(part);
  for (int64_t r = 0; r < rows; r += together) {
    const int64_t length = (rows - r < together ? rows - r : together) * columns;
    for (int64_t start = 0; start < length; start += kWriteBlock<T>) {
      const int64_t n = length - start < kWriteBlock<T> ? length - start : kWriteBlock<T>;
      const int64_t at = r * row_stride + start;
      block.begin(at);
      if (mask == nullptr) {
        std::memcpy(block.mask, flags + start, n * sizeof(T));
        if (part.weight != nullptr) multiply_flags(flags + start, original + at, block.weight, n);
      } else {
        multiply_flags(flags + start, mask + at, block.mask, n);
        if (part.weight != nullptr) multiply<T>(block.mask, original + at, block.weight, n);
      }
      block.end(n);
    }
  }
}
