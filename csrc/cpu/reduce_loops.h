// The loops of the rank step. Included once per instruction set, by loops.h.
//
// Within a chunk, element i of a channel's run goes to lane i % kLanes (runs), or has an
// accumulator of its own (columns); rows follow one another. So the order of a channel's sum
// depends on the shape alone.

constexpr int64_t kLanes = 32;

// Which level has the fused instruction; elsewhere std::fma is a call of a function.
template <class Real>
using SquareSum = SumOfSquares<Real, (LNPRUNE_X86_64_LEVEL >= 3)>;

// Asks for the elements that many bytes ahead of those that are read: the streams that the
// processor finds by itself leave the memory waiting. Into the L2 cache: what waits for the L1
// cache holds up the loads that are needed now.
template <class T>
LNPRUNE_FUNCTION void prefetch_lanes(const T* elements, int64_t ahead) {
  const char* bytes = reinterpret_cast<const char*>(elements) + ahead;
  constexpr int64_t kBytes = kLanes * sizeof(T);
  for (int64_t line = 0; line < kBytes; line += 64) __builtin_prefetch(bytes + line, 0, 2);
}

// The type that a norm's loop reads. Powers are computed in double: loops of one width vectorise
// best.
template <template <class> class Norm, class T>
struct RealFor {
  using Type = typename RealOf<T>::Type;
};
template <class T>
struct RealFor<HalfIntegerPowerSum, T> {
  using Type = double;
};
template <class T>
struct RealFor<PowerSum, T> {
  using Type = double;
};

// What elements are multiplied by where they are read: nothing; a factor for each place in a run,
// or for each column; or one for each row.
struct NoFactors {
  template <class Reader>
  LNPRUNE_FUNCTION Reader apply(Reader x, int64_t, int64_t) const {
    return x;
  }
};

struct PlaceFactors {
  const double* values;

  template <class Reader>
  struct Product {
    Reader x;
    const double* values;
    LNPRUNE_FUNCTION double operator[](int64_t i) const {
      return static_cast<double>(x[i]) * values[i];
    }
  };
  template <class Reader>
  LNPRUNE_FUNCTION Product<Reader> apply(Reader x, int64_t, int64_t place) const {
    return {x, values + place};
  }
};

struct RowFactors {
  const ChunkFactors& factors;

  template <class Reader>
  struct Product {
    Reader x;
    double factor;
    LNPRUNE_FUNCTION double operator[](int64_t i) const {
      return static_cast<double>(x[i]) * factor;
    }
  };
  template <class Reader>
  LNPRUNE_FUNCTION Product<Reader> apply(Reader x, int64_t row, int64_t) const {
    return {x, factors.values[(factors.first_row + row) / factors.step % factors.length]};
  }
};

// Lanes of `length` elements of one run of a row, added to what the lanes hold.
template <class Norm, class Real, class T, class Factors>
LNPRUNE_FUNCTION void reduce_run(const Norm norm, const T* elements, int64_t length,
                                 const Factors factors, int64_t row,
                                 typename Norm::Accumulator* lanes) {
  constexpr int64_t kAhead = 4096;
  alignas(64) Real buffer[kBlock];
  typename Norm::Accumulator a[kLanes];
  for (int64_t l = 0; l < kLanes; ++l) a[l] = lanes[l];
  for (int64_t start = 0; start < length; start += kBlock) {
    const int64_t n = length - start < kBlock ? length - start : kBlock;
    const auto x = factors.apply(widen(elements + start, n, buffer), row, start);
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      prefetch_lanes(elements + start + i, kAhead);
      for (int64_t l = 0; l < kLanes; ++l) a[l] = norm.map(a[l], x[i + l]);
    }
    for (int64_t l = 0; i + l < n; ++l) a[l] = norm.map(a[l], x[i + l]);
  }
  for (int64_t l = 0; l < kLanes; ++l) lanes[l] = a[l];
}

template <class Norm, class Real, class T, class Factors>
void reduce_runs(const Norm norm, const Chunk& chunk, const Factors factors,
                 typename Norm::Partial* partials) {
  // Lanes of this many channels fit the L1 cache, so that rows can be read in memory order.
  constexpr int64_t kChannels = 32;
  alignas(64) typename Norm::Accumulator lanes[kChannels][kLanes];
  const T* elements = static_cast<const T*>(chunk.elements);
  for (int64_t first = 0; first < chunk.channels; first += kChannels) {
    const int64_t channels =
        chunk.channels - first < kChannels ? chunk.channels - first : kChannels;
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t l = 0; l < kLanes; ++l) lanes[c][l] = norm.identity();
    }
    for (int64_t r = 0; r < chunk.rows; ++r) {
      const T* row = elements + r * chunk.row_stride + first * chunk.channel_stride;
      for (int64_t c = 0; c < channels; ++c) {
        reduce_run<Norm, Real>(norm, row + c * chunk.channel_stride, chunk.run, factors, r,
                               lanes[c]);
      }
    }
    for (int64_t c = 0; c < channels; ++c) {
      typename Norm::Partial sum[kLanes];
      for (int64_t l = 0; l < kLanes; ++l) sum[l] = norm.partial(lanes[c][l]);
      // As loops of known lengths: a short run's fold takes as long as its elements do.
#pragma GCC unroll 5
      for (int64_t width = kLanes / 2; width > 0; width /= 2) {
        for (int64_t l = 0; l < width; ++l) sum[l] = norm.combine(sum[l], sum[l + width]);
      }
      partials[first + c] = sum[0];
    }
  }
}

// accumulators[j] takes column j of kRows rows, one or eight, top to bottom: loaded and stored once
// for all of them.
template <class Norm, class Real, int kRows, class T, class Factors>
LNPRUNE_FUNCTION void reduce_sweep(const Norm norm, const T* elements, int64_t row_stride,
                                   int64_t columns, const Factors factors, int64_t row,
                                   typename Norm::Accumulator* __restrict accumulators) {
  // How far ahead to ask for memory: the next kRows rows or, where rows are long, a kilobyte, which
  // is as good.
  const int64_t rows_bytes = kRows * row_stride * static_cast<int64_t>(sizeof(T));
  const int64_t ahead = rows_bytes <= 32 << 10 ? rows_bytes : 1024;
  // Narrow elements are widened into the buffer first. Their blocks are short, so that the memory
  // of the next block arrives while this one is summed.
  constexpr int64_t kColumnBlock = sizeof(T) < sizeof(float) ? 64 : kBlock;
  alignas(64) Real buffer[kRows][kColumnBlock];
  for (int64_t start = 0; start < columns; start += kColumnBlock) {
    const int64_t n = columns - start < kColumnBlock ? columns - start : kColumnBlock;
    const T* at = elements + start;
    typename Norm::Accumulator* __restrict a = accumulators + start;
    decltype(factors.apply(widen(at, n, buffer[0]), row, start)) x[kRows];
    // Before the sums: in one loop with them, GCC makes slower code of the widening.
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      x[r] = factors.apply(widen(at + r * row_stride, n, buffer[r]), row + r, start);
    }
    const auto add_column = [&](int64_t j) {
      typename Norm::Accumulator sum = a[j];
      for (int r = 0; r < kRows; ++r) sum = norm.map(sum, x[r][j]);
      a[j] = sum;
    };
    int64_t first = 0;
    for (; first + kLanes <= n; first += kLanes) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) prefetch_lanes(at + r * row_stride + first, ahead);
      for (int64_t l = 0; l < kLanes; ++l) add_column(first + l);
    }
    for (int64_t j = first; j < n; ++j) add_column(j);
  }
}

template <class Norm, class Real, class T, class Factors>
void reduce_columns(const Norm norm, const Chunk& chunk, const Factors factors,
                    typename Norm::Partial* partials) {
  const int64_t columns = chunk.channels * chunk.run;
  alignas(64) typename Norm::Accumulator accumulators[kColumns];
  for (int64_t j = 0; j < columns; ++j) accumulators[j] = norm.identity();
  const T* elements = static_cast<const T*>(chunk.elements);
  int64_t r = 0;
  // Not for costly maps: eight at a time need more registers than there are.
  for (; !Norm::kCostly && r + 8 <= chunk.rows; r += 8) {
    reduce_sweep<Norm, Real, 8>(norm, elements + r * chunk.row_stride, chunk.row_stride, columns,
                                factors, r, accumulators);
  }
  for (; r < chunk.rows; ++r) {
    reduce_sweep<Norm, Real, 1>(norm, elements + r * chunk.row_stride, chunk.row_stride, columns,
                                factors, r, accumulators);
  }
  for (int64_t c = 0; c < chunk.channels; ++c) {
    typename Norm::Partial sum = norm.partial(accumulators[c * chunk.run]);
    for (int64_t i = 1; i < chunk.run; ++i) {
      sum = norm.combine(sum, norm.partial(accumulators[c * chunk.run + i]));
    }
    partials[c] = sum;
  }
}

template <template <class> class Norm, class T>
void reduce(const Chunk& chunk, double p, void* partials) {
  using Real = typename RealFor<Norm, T>::Type;
  const Norm<Real> norm(p);
  static_assert(sizeof(typename Norm<Real>::Partial) == 8, "partials lie 8 bytes apart");
  auto* typed = static_cast<typename Norm<Real>::Partial*>(partials);
  if (chunk.run < kShortestRun) {
    reduce_columns<Norm<Real>, Real, T>(norm, chunk, NoFactors{}, typed);
  } else {
    reduce_runs<Norm<Real>, Real, T>(norm, chunk, NoFactors{}, typed);
  }
}

// The same of elements times factors, as a tensor of float64 with these products.
template <template <class> class Norm, class T>
void reduce_scaled(const Chunk& chunk, const ChunkFactors& factors, double p, void* partials) {
  using Real = typename RealOf<T>::Type;  // that elements are widened to
  const Norm<double> norm(p);
  auto* typed = static_cast<typename Norm<double>::Partial*>(partials);
  const auto reduce_by = [&](auto factors_of) {
    if (chunk.run < kShortestRun) {
      reduce_columns<Norm<double>, Real, T>(norm, chunk, factors_of, typed);
    } else {
      reduce_runs<Norm<double>, Real, T>(norm, chunk, factors_of, typed);
    }
  };
  if (factors.in_rows) {
    reduce_by(RowFactors{factors});
  } else {
    reduce_by(PlaceFactors{factors.values});
  }
}

template <template <class> class Norm, class T>
void finish(const Partials& partials, double p, bool rooted, double* norms) {
  using Real = typename RealFor<Norm, T>::Type;
  const Norm<Real> norm(p);
  using Partial = typename Norm<Real>::Partial;
  constexpr int64_t kChannels = 256;
  Partial sum[kChannels];
  Partial part[kChannels];
  for (int64_t first = 0; first < partials.channels; first += kChannels) {
    const int64_t n = partials.channels - first < kChannels ? partials.channels - first : kChannels;
    for (int64_t chunk = 0; chunk < partials.chunks; ++chunk) {
      Partial* folded = chunk == 0 ? sum : part;
      for (int64_t group = 0; group < partials.groups; ++group) {
        const Partial* row = static_cast<const Partial*>(partials.values) +
                             (chunk * partials.groups + group) * partials.channels * partials.run +
                             first * partials.run;
        for (int64_t i = 0; i < partials.run; ++i) {
          if (group == 0 && i == 0) {
            for (int64_t c = 0; c < n; ++c) folded[c] = row[c * partials.run];
          } else {
            for (int64_t c = 0; c < n; ++c) {
              folded[c] = norm.combine(folded[c], row[c * partials.run + i]);
            }
          }
        }
      }
      if (chunk > 0) {
        for (int64_t c = 0; c < n; ++c) sum[c] = norm.combine(sum[c], part[c]);
      }
    }
    if (rooted) {
      for (int64_t c = 0; c < n; ++c) norms[first + c] = norm.root(norm.total(sum[c]));
    } else {
      for (int64_t c = 0; c < n; ++c) norms[first + c] = norm.total(sum[c]);
    }
  }
}

template <class T>
void scale(const void* elements, int64_t length, const double* factors, int64_t step,
           double* __restrict out) {
  using Real = typename RealOf<T>::Type;
  alignas(64) Real buffer[kBlock];
  for (int64_t start = 0; start < length; start += kBlock) {
    const int64_t n = length - start < kBlock ? length - start : kBlock;
    const auto x = widen(static_cast<const T*>(elements) + start, n, buffer);
    double* __restrict made = out + start;
    if (step == 0) {
      const double factor = factors[0];
      for (int64_t i = 0; i < n; ++i) made[i] = static_cast<double>(x[i]) * factor;
    } else {
      const double* of_block = factors + start;
      for (int64_t i = 0; i < n; ++i) made[i] = static_cast<double>(x[i]) * of_block[i];
    }
  }
}

template <template <class> class Norm>
void root(const double* sums, int64_t channels, double p, double* norms) {
  const Norm<double> norm(p);
  for (int64_t c = 0; c < channels; ++c) norms[c] = norm.root(sums[c]);
}
