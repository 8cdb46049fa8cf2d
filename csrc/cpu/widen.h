// Narrow elements widened to float or double, exactly. Included once per instruction set, by
// loops.h.

// A block of elements is read as Reals: in place where they can be, else through a buffer.
constexpr int64_t kBlock = 512;

LNPRUNE_FUNCTION const float* widen(const float* x, int64_t, float*) { return x; }
LNPRUNE_FUNCTION const double* widen(const double* x, int64_t, double*) { return x; }

// bfloat16 is the upper half of a float: widened where it is read.
struct BFloat16Reader {
  const c10::BFloat16* elements;
  LNPRUNE_FUNCTION float operator[](int64_t i) const {
    return bit_cast<float>(static_cast<uint32_t>(elements[i].x) << 16);
  }
};

LNPRUNE_FUNCTION BFloat16Reader widen(const c10::BFloat16* x, int64_t, float*) { return {x}; }

LNPRUNE_FUNCTION const float* widen(const c10::Half* x, int64_t n, float* buffer) {
  int64_t i = 0;
#if LNPRUNE_X86_64_LEVEL >= 4
  for (; i + 16 <= n; i += 16) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i));
    _mm512_storeu_ps(buffer + i, _mm512_maskz_cvtph_ps(0xffff, halves));
  }
#elif LNPRUNE_X86_64_LEVEL >= 3
  for (; i + 8 <= n; i += 8) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i));
    _mm256_storeu_ps(buffer + i, _mm256_cvtph_ps(halves));
  }
#endif
  for (; i < n; ++i) buffer[i] = static_cast<float>(x[i]);
  return buffer;
}

#if LNPRUNE_X86_64_LEVEL >= 3
// What the conversion of half precision, of which there is an instruction, makes of eight bits: the
// half whose value, times a power of two, is theirs. NaN is put in where its bits are.
template <class Float8>
struct Float8Format;

template <>
struct Float8Format<c10::Float8_e4m3fn> {
  LNPRUNE_FUNCTION static int half_magnitude(int magnitude) { return magnitude << 7; }
  LNPRUNE_FUNCTION static float scale(int) { return 256; }
  LNPRUNE_FUNCTION static bool is_nan(int bits) { return (bits & 0x7f) == 0x7f; }
};
template <>
struct Float8Format<c10::Float8_e4m3fnuz> {
  LNPRUNE_FUNCTION static int half_magnitude(int magnitude) { return magnitude << 7; }
  LNPRUNE_FUNCTION static float scale(int) { return 128; }
  LNPRUNE_FUNCTION static bool is_nan(int bits) { return bits == 0x80; }
};
template <>
struct Float8Format<c10::Float8_e5m2> {
  LNPRUNE_FUNCTION static int half_magnitude(int magnitude) { return magnitude << 8; }
  LNPRUNE_FUNCTION static float scale(int) { return 1; }
  LNPRUNE_FUNCTION static bool is_nan(int) { return false; }  // the half is NaN itself
};
// The largest exponent is that of numbers here, and of infinity in a half.
template <>
struct Float8Format<c10::Float8_e5m2fnuz> {
  LNPRUNE_FUNCTION static int half_magnitude(int magnitude) {
    return (magnitude < 0x7c ? magnitude : magnitude - 4) << 8;
  }
  LNPRUNE_FUNCTION static float scale(int magnitude) { return magnitude < 0x7c ? 0.5f : 1.0f; }
  LNPRUNE_FUNCTION static bool is_nan(int bits) { return bits == 0x80; }
};

template <class Float8>
LNPRUNE_FUNCTION const float* widen(const Float8* x, int64_t n, float* buffer) {
  using Format = Float8Format<Float8>;
  const uint8_t* bits = reinterpret_cast<const uint8_t*>(x);
  alignas(64) uint16_t halves[kBlock];
  for (int64_t i = 0; i < n; ++i) {
    const int magnitude = Format::half_magnitude(bits[i] & 0x7f);
    halves[i] = static_cast<uint16_t>((bits[i] & 0x80) << 8 | magnitude);
  }
  widen(reinterpret_cast<const c10::Half*>(halves), n, buffer);
  for (int64_t i = 0; i < n; ++i) {
    const float value = buffer[i] * Format::scale(bits[i] & 0x7f);
    buffer[i] = Format::is_nan(bits[i]) ? bit_cast<float>(0x7fc00000u) : value;
  }
  return buffer;
}
#else
// Eight bits have 256 values: a table is as exact as the conversion and faster.
template <class Float8>
struct Float8Table {
  float value[256];
  Float8Table() {
    for (int bits = 0; bits < 256; ++bits) {
      value[bits] = static_cast<float>(Float8(static_cast<uint8_t>(bits), Float8::from_bits()));
    }
  }
};

template <class Float8>
LNPRUNE_FUNCTION const float* widen(const Float8* x, int64_t n, float* buffer) {
  static const Float8Table<Float8> table;
  for (int64_t i = 0; i < n; ++i) buffer[i] = table.value[x[i].x];
  return buffer;
}
#endif

template <class T>
LNPRUNE_FUNCTION const double* widen(const T* x, int64_t n, double* buffer) {
  alignas(64) float narrow[kBlock];
  const auto floats = widen(x, n, narrow);
  for (int64_t i = 0; i < n; ++i) buffer[i] = floats[i];
  return buffer;
}
