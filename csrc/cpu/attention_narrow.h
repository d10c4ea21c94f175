// attention, forward, of heads so narrow that a row of queries and its outputs stay near registers: up to 8 elements, AVX-512.
//
// A panel is one vector of query rows: 8 vectors of queries, 8 of outputs, and the scores of 4 keys, which nobody ever stores. Keys and
// values are packed side by side, a cache line for both. The queries carry scale and log2(e), and a score begins at minus the maximum so
// far, so that nothing lies between the products and 2^x: 16 multiply-adds of products, 7 instructions of 2^x, one each for maximum and
// sum, where two a cycle are the bound; they are dealt so that none waits for the one before. A maximum is raised only where a row
// exceeds it by kSlack powers of two.
#pragma once

#include "attention.h"

namespace fastgen::attention {

inline constexpr std::int64_t kNarrow = 8;  // elements of a head

inline bool is_narrow(const Problem& p) { return p.depth >= 1 && p.depth <= kNarrow && p.width >= 1 && p.width <= kNarrow; }

// Where kHasNarrow, of what is_narrow().
template <class T>
void forward_narrow(const Problem& p, const View& query, const View& key, const View& value, const View& output, float* logsumexp);

#if defined(__AVX512F__)

inline constexpr bool kHasNarrow = true;
inline constexpr std::int64_t kNarrowKeys = 96;     // of a block that has masks: 6 KB of them
inline constexpr std::int64_t kNarrowSum = 192;     // that are summed up from zero
inline constexpr std::int64_t kNarrowSpan = 1536;   // keys that all panels of a block of rows go through, 96 KB
inline constexpr std::int64_t kNarrowRows = 256, kNarrowItems = 64;  // rows of a block at the most; blocks wanted in all
inline constexpr std::int64_t kNarrowBytes = 1 << 25;  // of keys and values that are packed at a time, where that is more than one head

// A vector of rows. `shift` is added to scores, minus `highest`, the maximum, or 0 where there was none; past `limit` it is raised.
struct NarrowRows {
  static constexpr int lanes = kWidth<float>, group = 4;  // keys at a time
  static constexpr std::int64_t pair = 2 * kNarrow;       // a key and its value
  VecF query[kNarrow], output[kNarrow], sum, highest, shift, limit;

  void start(const float* queries, float scale) {
    for (int e = 0; e < kNarrow; ++e) query[e] = load(queries + e * lanes) * scale, output[e] = VecF(0.0f);
    sum = shift = VecF(0.0f);
    highest = limit = VecF(-std::numeric_limits<float>::infinity());
  }

  // `count` keys, in whole groups: while the weights of one are made, the scores of the next begin. Their sums begin at zero, which
  // keeps errors small.
  FASTGEN_INLINE void attend(const float* keys, std::int64_t count) {
    Sums sums;
    Scores x;
    start_scores(x);
#pragma GCC unroll 8
    for (int e = 0; e < kNarrow; ++e) multiply_keys(keys, e, x);
    raise_if_higher(x, sums);
    for (std::int64_t k = group; k < count; k += group, keys += group * pair) add<true>(keys, x, sums);
    add<false>(keys, x, sums);
    keep(sums);
  }

  // The first `count` keys of one group, with what is added to their scores unless that is null.
  void attend_carefully(const float* keys, std::int64_t count, const float* bias) {
    Sums sums;
    Scores x;
    start_scores(x);
#pragma GCC unroll 8
    for (int e = 0; e < kNarrow; ++e) multiply_keys(keys, e, x);
    for (int k = 0; k < group; ++k) {
      if (k >= count) x[k] = VecF(-std::numeric_limits<float>::infinity());
      else if (bias != nullptr) x[k] = madd<float>(load(bias + k * lanes), VecF(static_cast<float>(kLog2E)), x[k]);
    }
    raise_if_higher(x, sums);
    add<false>(keys, x, sums);
    keep(sums);
  }

  // `rows` of the outputs, and their logsumexp where that is wanted; 0 and -Inf for a row that saw no key.
  template <class T>
  void write(std::int64_t width, std::int64_t rows, T* out, const View& view, float* logsumexp, float* staged) const {
    for (int e = 0; e < kNarrow; ++e) store(staged + e * lanes, output[e]);
    alignas(64) float factor[lanes], top[lanes];
    store(factor, sum), store(top, highest);
    for (std::int64_t r = 0; r < rows; ++r) {
      if (logsumexp != nullptr) logsumexp[r] = static_cast<float>((top[r] + std::log2(factor[r])) / kLog2E);
      factor[r] = factor[r] == 0 ? 0.0f : 1 / factor[r];
    }
    write_panel<float>(staged, lanes, width, rows, out, view.column, view.row, factor);
  }

 private:
  using Scores = SideBySide<float, group>;
  struct Sums {  // of some keys, in registers
    VecF output[kNarrow], weights;
    FASTGEN_INLINE Sums() {
      weights = VecF(0.0f);
      for (auto& v : output) v = VecF(0.0f);
    }
  };

  FASTGEN_INLINE void keep(const Sums& of) {
    sum += of.weights;
    for (int e = 0; e < kNarrow; ++e) output[e] += of.output[e];
  }
  FASTGEN_INLINE void start_scores(Scores& x) const {
    for (auto& v : x) v = shift;
  }
  FASTGEN_INLINE void multiply_keys(const float* keys, int e, Scores& x) const {
    const VecF* from = query;
    asm volatile("" : "+r"(from));  // read from there: the registers are wanted for other things
    const VecF q = from[e];
#pragma GCC unroll 4
    for (int k = 0; k < group; ++k) x[k] = madd<float>(in_all_lanes(keys[k * pair + e]), q, x[k]);
  }

  // The weights of keys with these scores, and with them their values; and the scores of the next keys, if there are `more`.
  template <bool more>
  FASTGEN_INLINE void add(const float* keys, Scores& x, Sums& sums) {
    constexpr int terms = static_cast<int>(std::size(kFractionPowerCoefficients));
    static_assert(terms + 2 == kNarrow);
    const float* const next_keys = keys + group * pair;
    Scores next, r, p;
    if constexpr (more) start_scores(next), multiply_keys(next_keys, 0, next);
    for (int k = 0; k < group; ++k) r[k] = fraction(x[k]), p[k] = VecF(kFractionPowerCoefficients[0]);
#pragma GCC unroll 8
    for (int c = 1; c < terms; ++c) {
      const VecF coefficient = held(kFractionPowerCoefficients[c]);
      for (int k = 0; k < group; ++k) p[k] = madd<float>(p[k], r[k], coefficient);
      if constexpr (more) multiply_keys(next_keys, c, next);
    }
    for (int k = 0; k < group; ++k) p[k] = scale_by_power(p[k], x[k]);
    if constexpr (more) multiply_keys(next_keys, terms, next), multiply_keys(next_keys, terms + 1, next);
    sums.weights += (p[0] + p[1]) + (p[2] + p[3]);
#pragma GCC unroll 4
    for (int k = 0; k < group; ++k)
#pragma GCC unroll 8
      for (int e = 0; e < kNarrow; ++e) sums.output[e] = madd<float>(in_all_lanes(keys[k * pair + kNarrow + e]), p[k], sums.output[e]);
    if constexpr (more) {
      for (int k = 0; k < group; ++k) x[k] = next[k];
      raise_if_higher(x, sums);
    }
  }

  FASTGEN_INLINE void raise_if_higher(Scores& x, Sums& sums) {
    const VecF high = stdx::max(stdx::max(x[0], x[1]), stdx::max(x[2], x[3]));
    if (stdx::any_of(high > limit)) [[unlikely]] raise(high, x, sums);
  }
  FASTGEN_INLINE void raise(VecF high, Scores& x, Sums& sums) {
    constexpr float none = -std::numeric_limits<float>::infinity();
    const auto up = high > limit;
    stdx::where(!up, high) = VecF(0.0f);
    VecF factor[] = {-high};
    exp2(factor);
    stdx::where(limit == none, factor[0]) = VecF(0.0f);  // of rows that saw no key, whose sums are 0
    sum *= factor[0], sums.weights *= factor[0];
    for (int e = 0; e < kNarrow; ++e) output[e] *= factor[0], sums.output[e] *= factor[0];
    for (auto& v : x) v -= high;
    shift -= high;
    stdx::where(up, highest) = -shift;
    stdx::where(up, limit) = VecF(static_cast<float>(kSlack));
  }
};

// Rows of keys and values side by side.
template <class T>
void pack_narrow(const Problem& p, const T* k, const View& key, const T* v, const View& value, std::int64_t rows, float* to,
                 float* staged) {
  constexpr std::int64_t pair = NarrowRows::pair;
  read_panel<float>(k, key.row, key.column, rows, p.depth, to, pair);
  read_panel<float>(v, value.row, value.column, rows, p.width, staged, pair);
  for (std::int64_t i = 0; i < rows; ++i) std::memcpy(to + i * pair + kNarrow, staged + i * pair, kNarrow * sizeof(float));
}

template <class T>
void forward_narrow(const Problem& p, const View& query, const View& key, const View& value, const View& output, float* logsumexp) {
  constexpr std::int64_t lanes = NarrowRows::lanes, group = NarrowRows::group, pair = NarrowRows::pair;
  const std::int64_t all = p.n * p.kv_heads, padded = round_up(p.keys, group), head_size = padded * pair;
  const std::int64_t most = std::clamp<std::int64_t>(kNarrowBytes / (head_size * static_cast<std::int64_t>(sizeof(float))), 1, all);
  const std::int64_t share = std::clamp(p.n * p.heads * p.rows / kNarrowItems, lanes, kNarrowRows);
  const std::int64_t block_rows = block_length(p.rows, share, lanes), blocks = (p.rows + block_rows - 1) / block_rows;
  const std::int64_t parts = (p.keys + kNarrowKeys - 1) / kNarrowKeys;
  const auto scale = static_cast<float>(p.scale * kLog2E);
  Arena arena;
  float* const packed = arena.take_as_it_is<float>(most * head_size);
  for (std::int64_t begin_head = 0; begin_head < all; begin_head += most) {
    const std::int64_t slots = std::min(most, all - begin_head);
    parallel(slots * parts, slots * head_size, [&](std::int64_t begin, std::int64_t end) {
      Arena own;
      float* const staged = own.take_as_it_is<float>(kNarrowKeys * pair);
      for (std::int64_t item = begin; item < end; ++item) {
        const std::int64_t slot = item / parts, n = (begin_head + slot) / p.kv_heads, h = (begin_head + slot) % p.kv_heads;
        const std::int64_t first = item % parts * kNarrowKeys, rows = std::min(kNarrowKeys, p.keys - first);
        float* const to = packed + slot * head_size + first * pair;
        pack_narrow(p, key.at<const T>(n, h, first), key, value.at<const T>(n, h, first), value, rows, to, staged);
        if (first + rows == p.keys) std::fill_n(to + rows * pair, (padded - p.keys) * pair, 0.0f);
      }
    });
    parallel(slots * p.group() * blocks, p.work() / all * slots, [&](std::int64_t begin, std::int64_t end) {
      Arena own;
      const auto panels = own.take_as_it_is<NarrowRows>(block_rows / lanes);
      float* const bias = own.take_as_it_is<float>(kNarrowKeys * lanes);
      float *const queries = own.take<float>(kNarrow * lanes), *const outputs = own.take_as_it_is<float>(kNarrow * lanes);
      for (std::int64_t item = begin; item < end; ++item) {
        const std::int64_t head = begin_head * p.group() + item / blocks, n = head / p.heads, h = head % p.heads;
        const std::int64_t first = item % blocks * block_rows, last = std::min(first + block_rows, p.rows);
        const float* const keys = packed + (head / p.group() - begin_head) * head_size;
        const std::int64_t visible = p.visible(last);
        for (std::int64_t row = first; row < last; row += lanes) {
          read_panel<float>(query.at<const T>(n, h, row), query.column, query.row, p.depth, std::min(lanes, last - row), queries, lanes);
          panels[(row - first) / lanes].start(queries, scale);
        }
        for (std::int64_t begin_key = 0; begin_key < visible; begin_key += kNarrowSpan)
          for (std::int64_t row = first; row < last; row += lanes) {
            const std::int64_t rows = std::min(lanes, last - row), end_key = std::min(p.visible(row + rows), begin_key + kNarrowSpan);
            if (end_key <= begin_key) continue;
            NarrowRows own_rows = panels[(row - first) / lanes];
            const std::int64_t plain = p.mask ? begin_key : p.causal ? std::clamp(row + 1, begin_key, end_key) : end_key;  // from there on masks
            const std::int64_t whole = begin_key + (plain - begin_key) / group * group;
            for (std::int64_t k = begin_key; k < whole; k += kNarrowSum) own_rows.attend(keys + k * pair, std::min(kNarrowSum, whole - k));
            for (std::int64_t k = whole; k < end_key; k += kNarrowKeys) {
              const std::int64_t count = std::min(kNarrowKeys, end_key - k);
              const bool biased = p.mask || (p.causal && k + count > row + 1);
              if (biased) read_bias<float, lanes>(p, n, h, row, rows, k, count, bias);
              for (std::int64_t i = 0; i < count; i += group)
                own_rows.attend_carefully(keys + (k + i) * pair, std::min(group, count - i), biased ? bias + i * lanes : nullptr);
            }
            panels[(row - first) / lanes] = own_rows;
          }
        for (std::int64_t row = first; row < last; row += lanes)
          panels[(row - first) / lanes].write(p.width, std::min(lanes, last - row), output.at<T>(n, h, row), output,
                                              logsumexp == nullptr ? nullptr : logsumexp + head * p.rows + row, outputs);
      }
    });
  }
}

#else

inline constexpr bool kHasNarrow = false;

#endif

}  // namespace fastgen::attention
