// What causal_transformer_inverse.cpp computes for one token of some images: products, norms, and attention over a cache.
//
// Keys lie in panels [T / 16][E][16], 16 keys side by side, so that the scores of 16 keys are one vector operation for each of the E
// numbers of a query; values lie row by row. A cache grows in place: nothing is copied when a key comes.
#pragma once

#include <algorithm>
#include <limits>

#include "_product.h"
#include "common/moments.h"
#include "common/simd/gelu.h"

namespace fastgen::causal_transformer_inverse {

constexpr std::int64_t round_up(std::int64_t a, std::int64_t b) { return ceil_div(a, b) * b; }

// [outputs][channels] packed as [panels][channels][kPanel].
template <class A>
struct Matrix {
  const A* weights;
  const A* bias;  // [outputs]
  std::int64_t channels, outputs;

  std::int64_t panels() const { return ceil_div(outputs, kPanel); }
};

// products[r] = values[r] times the matrix, without its bias, in whole panels.
inline void multiply(const Matrix<float>& m, const float* values, std::int64_t value_stride, std::int64_t rows, float* products,
                     std::int64_t product_stride) {
  fastgen::multiply({values, m.weights, products, rows, m.channels, value_stride, product_stride}, 0, m.panels());
}
// Four rows at a time, which hides the latency of a multiply-add in fp64.
inline void multiply(const Matrix<double>& m, const double* values, std::int64_t value_stride, std::int64_t rows, double* products,
                     std::int64_t product_stride) {
  using V = Vec<double>;
  constexpr int vectors = static_cast<int>(kPanel) / kWidth<double>;
  const auto block = [&]<int count>(std::int64_t row, std::int64_t panel) {
    V sum[count][vectors];
    for (auto& of_row : sum)
      for (V& v : of_row) v = V(0.0);
    const double* w = m.weights + panel * m.channels * kPanel;
    for (std::int64_t c = 0; c < m.channels; ++c, w += kPanel)
      for (int r = 0; r < count; ++r)
        for (int v = 0; v < vectors; ++v)
          sum[r][v] = madd<double>(in_all_lanes<double>(values[(row + r) * value_stride + c]), load(w + v * kWidth<double>), sum[r][v]);
    for (int r = 0; r < count; ++r)
      for (int v = 0; v < vectors; ++v) store(products + (row + r) * product_stride + panel * kPanel + v * kWidth<double>, sum[r][v]);
  };
  for (std::int64_t panel = 0; panel < m.panels(); ++panel) {
    std::int64_t row = 0;
    for (; row + 4 <= rows; row += 4) block.template operator()<4>(row, panel);
    for (; row < rows; ++row) block.template operator()<1>(row, panel);
  }
}

// y = (x - mean) rstd weight + bias.
template <class A>
void layer_norm(const A* x, const A* weight, const A* bias, std::int64_t count, double eps, A* y) {
  const Moments moments = quick_moments(x, count);
  const double rstd = moments.rstd(eps);
  const A centre = static_cast<A>(moments.mean);  // what it rounds off is not lost
  const Vec<A> m(centre), slope(static_cast<A>(rstd)), lost(static_cast<A>((static_cast<double>(centre) - moments.mean) * rstd));
  for_vectors<A>(count, [&](std::int64_t i, auto at) {
    at.store(y + i, madd<A>(madd<A>(at.load(x + i) - m, slope, lost), at.load(weight + i), at.load(bias + i)));
  });
}

// Keys and values of one head of one row of one layer, for up to T tokens.
template <class A>
struct Head {
  A* keys;    // [T / kPanel][depth][kPanel]
  A* values;  // [T][width]
  std::int64_t depth, width;  // width: depth in whole panels, zeros beyond

  static std::int64_t size(std::int64_t tokens, std::int64_t depth) {
    return round_up(tokens, kPanel) * depth + tokens * round_up(depth, kPanel);
  }
  Head(A* memory, std::int64_t tokens, std::int64_t depth)
      : keys(memory), values(memory + round_up(tokens, kPanel) * depth), depth(depth), width(round_up(depth, kPanel)) {}

  void append(std::int64_t token, const A* key, const A* value) const {
    A* const panel = keys + token / kPanel * depth * kPanel;
    if (token % kPanel == 0) std::fill_n(panel, depth * kPanel, A(0));
    for (std::int64_t e = 0; e < depth; ++e) panel[e * kPanel + token % kPanel] = key[e];
    A* const row = values + token * width;
    std::copy_n(value, depth, row);
    std::fill(row + depth, row + width, A(0));
  }
};

// Vectors of a panel, and f with the panels of [0, count) up to kBeside at a time: f.template operator()<panels>(first).
template <class A>
inline constexpr int kVectors = static_cast<int>(kPanel) / kWidth<A>;
inline constexpr int kBeside = 4;
template <class F>
void for_panels(std::int64_t count, const F& f) {
  std::int64_t first = 0;
  for (; first + kBeside <= count; first += kBeside) f.template operator()<kBeside>(first);
  if (count - first == 3) f.template operator()<3>(first);
  if (count - first == 2) f.template operator()<2>(first);
  if (count - first == 1) f.template operator()<1>(first);
}

// scores[t] = query . keys[t] for `panels` panels from `first` on, in as many chains as hide the latency of a multiply-add. Asks for the
// keys of the next head.
template <class A, int panels>
void score(const Head<A>& head, const Head<A>& next, std::int64_t first, const A* query, A* scores) {
  constexpr int chains = kBeside / panels;
  Vec<A> sum[chains][panels][kVectors<A>];
  for (auto& chain : sum)
    for (auto& panel : chain)
      for (auto& v : panel) v = Vec<A>(A(0));
  const A *const keys = head.keys + first * head.depth * kPanel, *const ahead = next.keys + first * head.depth * kPanel;
  const auto step = [&](std::int64_t e, auto& chain) {
    const Vec<A> q = in_all_lanes<A>(query[e]);
    for (int p = 0; p < panels; ++p) {
      const std::int64_t at = (p * head.depth + e) * kPanel;
      prefetch(ahead + at);
      for (int v = 0; v < kVectors<A>; ++v) chain[p][v] = madd<A>(q, load(keys + at + v * kWidth<A>), chain[p][v]);
    }
  };
  std::int64_t e = 0;
  for (; e + chains <= head.depth; e += chains)
    for (int c = 0; c < chains; ++c) step(e + c, sum[c]);
  for (; e < head.depth; ++e) step(e, sum[0]);
  for (int p = 0; p < panels; ++p)
    for (int v = 0; v < kVectors<A>; ++v) {
      for (int c = 1; c < chains; ++c) sum[0][p][v] += sum[c][p][v];
      store(scores + (first + p) * kPanel + v * kWidth<A>, sum[0][p][v]);
    }
}

// out[first panels] = share sum_t weights[t] values[t], t < count. Asks for the values of the next head.
template <class A, int panels>
void weigh(const Head<A>& head, const Head<A>& next, std::int64_t first, std::int64_t count, const A* weights, A share, A* out) {
  constexpr int chains = kBeside / panels;
  Vec<A> sum[chains][panels][kVectors<A>];
  for (auto& chain : sum)
    for (auto& panel : chain)
      for (auto& v : panel) v = Vec<A>(A(0));
  const auto step = [&](std::int64_t t, auto& chain) {
    const Vec<A> w = in_all_lanes<A>(weights[t]);
    const std::int64_t row = t * head.width + first * kPanel;
    for (int p = 0; p < panels; ++p) {
      prefetch(next.values + row + p * kPanel);
      for (int v = 0; v < kVectors<A>; ++v) chain[p][v] = madd<A>(w, load(head.values + row + p * kPanel + v * kWidth<A>), chain[p][v]);
    }
  };
  std::int64_t t = 0;
  for (; t + chains <= count; t += chains)
    for (int c = 0; c < chains; ++c) step(t + c, sum[c]);
  for (; t < count; ++t) step(t, sum[0]);
  for (int p = 0; p < panels; ++p)
    for (int v = 0; v < kVectors<A>; ++v) {
      for (int c = 1; c < chains; ++c) sum[0][p][v] += sum[c][p][v];
      const std::int64_t at = (first + p) * kPanel + v * kWidth<A>, rest = head.depth - at;
      const Vec<A> y = sum[0][p][v] * share;
      if (rest >= kWidth<A>) store(out + at, y);
      else if (rest > 0) store_part(out + at, y, static_cast<int>(rest));
    }
}

// out[0, depth) = softmax(scale query . keys) values over the first `count` keys; `scores` holds them in whole panels. Keys and values of
// `next` are asked for: they lie in the last-level cache, and a head is too short for the processor to see where it goes.
template <class A>
void attend(const Head<A>& head, const Head<A>& next, std::int64_t count, const A* query, A scale, A* scores, A* out) {
  const std::int64_t end = round_up(count, kPanel);
  for_panels(end / kPanel, [&]<int panels>(std::int64_t first) { score<A, panels>(head, next, first, query, scores); });
  std::fill(scores + count, scores + end, -std::numeric_limits<A>::infinity());
  Vec<A> highest(-std::numeric_limits<A>::infinity());
  for (std::int64_t t = 0; t < end; t += kWidth<A>) highest = stdx::max(highest, load(scores + t));
  const Vec<A> top(stdx::hmax(highest) * scale);
  Vec<A> total(A(0));
  for_vectors<A>(count, [&](std::int64_t t, auto at) {
    const Vec<A> weight = at.template keep<A>(exp(madd<A>(load(scores + t), Vec<A>(scale), -top)));
    store(scores + t, weight);
    total += weight;
  });
  const A share = A(1) / sum_lanes<A>(total);
  for_panels(head.width / kPanel, [&]<int panels>(std::int64_t first) { weigh<A, panels>(head, next, first, count, scores, share, out); });
}

}  // namespace fastgen::causal_transformer_inverse
