// masked_conv2d with pixels in the lanes, where panels of outputs would be mostly empty, or a product over few channels would be transposed
// to get into an image that lies channel by channel: the first layer of a PixelCNN, and the gradient of its input.
//
// Images are staged as planes with zeros around them. A sum is a vector of pixels of one row and one output: a term, a tap of a channel,
// is the same vector a few pixels away times one weight. So sums begin as the bias and end in the output as it lies; the few channels
// of one that lies pixel by pixel are moved there in the end.
#pragma once

#include "masked_conv2d.h"

namespace fastgen::masked {

inline constexpr std::int64_t kFewChannels = 6;  // of the input that a group sees
inline constexpr std::int64_t kFewOutputs = 4;

// Whether that is the better way for an image so wide: where most lanes are used.
inline bool by_planes(const Mask& m, std::int64_t width, bool channels_last) {
  const std::int64_t lanes = ceil_div(width, kWidth<float>) * kWidth<float>;
  return 4 * width >= 3 * lanes && (m.outputs <= kFewOutputs || (m.seen() < kFewChannels && !channels_last));
}

// A tap of a channel: where the pixel that the output (0, 0) reads lies in the planes of a group, and its weights in a panel.
struct Term {
  std::int64_t at, weight;
};

inline std::vector<Term> terms_of(const Mask& m, const Reach& reach, const Run& run) {
  const std::int64_t seen = m.seen(), plane = reach.rows() * reach.columns();
  std::vector<Term> terms;
  const auto add = [&](std::int64_t row, std::int64_t column, std::int64_t low, std::int64_t high) {
    const std::int64_t tap = row * m.width + column - m.first, at = reach.at(m, row, column);
    for (std::int64_t c = low; c < high; ++c) terms.push_back({c * plane + at, (tap * seen + c) * kPanel});
  };
  for (const Rectangle& r : reach.rectangles)
    for (std::int64_t row = r.row; row < r.row + r.rows; ++row)
      for (std::int64_t column = r.column; column < r.column + r.columns; ++column) add(row, column, 0, seen);
  if (m.ordered()) add(m.y, m.x, run.low, run.high);
  return terms;
}

// Whether the gradient of the weight is summed so, over pixels in the lanes: it has the same few channels, and reads rows as they lie.
inline bool weight_by_planes(const Mask& m, std::int64_t width, bool dense_rows) {
  const std::int64_t lanes = ceil_div(width, kWidth<float>) * kWidth<float>;
  return 4 * width >= 3 * lanes && m.seen() < kFewChannels && dense_rows;
}

// Sums of `tall` outputs and `wide` vectors of pixels fill the registers.
#if defined(__AVX512F__)
inline constexpr int kTallest = 8, kWidest = 3;
#else
inline constexpr int kTallest = 4, kWidest = 2;
#endif

// `outputs` rows of `count` pixels, plane apart: at most `tall` and at most `wide` vectors. `weights` are [terms][tall].
template <int tall, int wide, class T>
void sum_terms(const std::vector<Term>& terms, const float* pixels, const float* weights, const float* bias, std::int64_t outputs,
               std::int64_t count, T* out, std::int64_t plane) {
  constexpr std::int64_t w = kWidth<float>;
  VecF sum[tall][wide];
#pragma GCC unroll 8
  for (int k = 0; k < tall; ++k)
#pragma GCC unroll 4
    for (int v = 0; v < wide; ++v) sum[k][v] = VecF(bias[k]);
  for (const Term& term : terms) {
    VecF x[wide];
#pragma GCC unroll 4
    for (int v = 0; v < wide; ++v) x[v] = load(pixels + term.at + v * w);
#pragma GCC unroll 8
    for (int k = 0; k < tall; ++k) {
      const VecF weight(weights[k]);
#pragma GCC unroll 4
      for (int v = 0; v < wide; ++v) sum[k][v] = madd<float>(weight, x[v], sum[k][v]);
    }
    weights += tall;
  }
#pragma GCC unroll 8
  for (int k = 0; k < tall; ++k) {
    if (k >= outputs) return;
#pragma GCC unroll 4
    for (int v = 0; v < wide; ++v) {
      const std::int64_t left = count - v * w;
      if (left >= w) store(out + k * plane + v * w, sum[k][v]);
      else if (left > 0) store_part(out + k * plane + v * w, sum[k][v], static_cast<int>(left));
    }
  }
}

// Calls f.template operator()<tall>() with the fewest rows of sums that hold so many outputs.
template <class F>
void with_rows(std::int64_t outputs, F&& f) {
  if (outputs == 1) return f.template operator()<1>();
  if (outputs <= 4 || kTallest == 4) return f.template operator()<4>();
  f.template operator()<kTallest>();
}

// Outputs of one run, at most kTallest.
struct Rack {
  std::size_t run;
  std::int64_t first, outputs, weights;  // weights: where those of the first begin in what is packed
};

template <class T>
void convolve_planes(const Tensor& input, const Mask& m, const Reach& reach, const float* packed, const Parameter& bias, Tensor& output) {
  const Pixels<T> x(input);
  const std::int64_t n = input.size(0), height = reach.height, width = reach.width, columns = reach.columns();
  const std::int64_t plane = reach.rows() * columns, image = m.inputs * plane, pixels = height * width;
  const bool moved = m.outputs > 1 && is_channels_last(output);
  const Scratch<T> before(moved ? n * m.outputs * pixels : 0);
  T* const last = static_cast<T*>(output.mutable_data_ptr());
  T* const out = moved ? before.get() : last;
  const std::vector<Run> runs = m.runs();
  std::vector<std::vector<Term>> terms;
  std::vector<Rack> racks;
  std::int64_t panel = 0, most_terms = 0;
  for (std::size_t i = 0; i < runs.size(); ++i) {
    terms.push_back(terms_of(m, reach, runs[i]));
    most_terms = std::max(most_terms, static_cast<std::int64_t>(terms.back().size()));
    const std::int64_t outputs = runs[i].last - runs[i].first;
    for (std::int64_t k = 0; k < outputs; k += kTallest)
      racks.push_back({i, runs[i].first + k, std::min<std::int64_t>(kTallest, outputs - k),
                       (panel + k / kPanel) * m.taps() * m.seen() * kPanel + k % kPanel});
    panel += ceil_div(outputs, kPanel);
  }
  constexpr std::int64_t of_band = 16;  // rows of pixels for which weights are laid out once
  const std::int64_t bands = ceil_div(height, of_band), count = static_cast<std::int64_t>(racks.size()), chunk = samples_at_a_time(n, image);
  const Scratch<float> memory(chunk * image + kWidest * kWidth<float>);  // whole vectors are read
  std::fill(memory.get() + chunk * image, memory.get() + chunk * image + kWidest * kWidth<float>, 0.0f);
  for (std::int64_t first = 0; first < n; first += chunk) {
    const std::int64_t samples = std::min(chunk, n - first);
    stage_planes(x, m.inputs, reach, first, samples, first == 0, memory.get());
    const std::int64_t work = samples * pixels * m.outputs * (m.taps() * m.seen() + 1);
    parallel(samples * count * bands, work, [&](std::int64_t begin, std::int64_t end) {
      const Scratch<float> weights(std::max<std::int64_t>(most_terms, 1) * kTallest);
      for (std::int64_t item = begin; item < end; ++item) {
        const std::int64_t sample = item / (count * bands), band = item % bands;
        const Rack& rack = racks[item / bands % count];
        const std::vector<Term>& list = terms[rack.run];
        const float* const from = memory.get() + sample * image + runs[rack.run].group * m.seen() * plane;
        T* const to = out + ((first + sample) * m.outputs + rack.first) * pixels;
        alignas(64) float biases[kTallest] = {};
        bias.read(0, rack.first, rack.outputs, 0.0f, biases);
        with_rows(rack.outputs, [&]<int tall>() {
          for (std::size_t t = 0; t < list.size(); ++t)
            for (int k = 0; k < tall; ++k) weights[t * tall + k] = k < rack.outputs ? packed[rack.weights + list[t].weight + k] : 0.0f;
          for (std::int64_t y = band * height / bands; y < (band + 1) * height / bands; ++y)
            for (std::int64_t column = 0; column < width;) {
              const std::int64_t left = width - column, at = y * width + column;
              const float* const pixel = from + y * columns + column;
              const auto run = [&]<int wide>() {
                sum_terms<tall, wide>(list, pixel, weights.get(), biases, rack.outputs, left, to + at, pixels);
                column += wide * kWidth<float>;
              };
              if (left > 2 * kWidth<float> && kWidest == 3) run.template operator()<kWidest>();
              else if (left > kWidth<float>) run.template operator()<2>();
              else run.template operator()<1>();
            }
        });
      }
    });
  }
  if (!moved) return;
  parallel(n * pixels, n * pixels * m.outputs, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i)
      for (std::int64_t k = 0; k < m.outputs; ++k) last[i * m.outputs + k] = out[(i / pixels * m.outputs + k) * pixels + i % pixels];
  });
}

// Of the gradient of the weight: outputs and terms whose sums fill the registers, each a vector that ends as one number.
#if defined(__AVX512F__)
inline constexpr int kGradients = 4, kTerms = 6;
#else
inline constexpr int kGradients = 2, kTerms = 4;
#endif

// to[t * to_term + k] += the sum over all rows of gradient k times the pixels of term t, for k < outputs and t < count; gradients are
// `apart`, rows of them width, rows of the plane columns apart.
template <class T>
void sum_pixels(const Term* terms, std::int64_t count, const float* pixels, std::int64_t columns, const T* gradients, std::int64_t apart,
                std::int64_t row, std::int64_t outputs, std::int64_t height, std::int64_t width, float* to, std::int64_t to_term) {
  VecF sum[kGradients][kTerms];
  const float* from[kTerms];
  const T* grad[kGradients];
#pragma GCC unroll 8
  for (int k = 0; k < kGradients; ++k)
#pragma GCC unroll 8
    for (int t = 0; t < kTerms; ++t) sum[k][t] = VecF(0.0f);
  for (int t = 0; t < kTerms; ++t) from[t] = pixels + terms[std::min<std::int64_t>(t, count - 1)].at;
  for (int k = 0; k < kGradients; ++k) grad[k] = gradients + std::min<std::int64_t>(k, outputs - 1) * apart;
  for (std::int64_t y = 0; y < height; ++y)
    for_vectors<float>(width, [&](std::int64_t x, auto at) __attribute__((always_inline)) {
      VecF g[kGradients];
#pragma GCC unroll 8
      for (int k = 0; k < kGradients; ++k) g[k] = at.load(grad[k] + y * row + x);
#pragma GCC unroll 8
      for (int t = 0; t < kTerms; ++t) {
        const VecF value = at.load(from[t] + y * columns + x);
#pragma GCC unroll 8
        for (int k = 0; k < kGradients; ++k) sum[k][t] = madd<float>(g[k], value, sum[k][t]);
      }
    });
#pragma GCC unroll 8
  for (int t = 0; t < kTerms; ++t)
#pragma GCC unroll 8
    for (int k = 0; k < kGradients; ++k)
      if (t < count && k < outputs) to[t * to_term + k] += stdx::reduce(sum[k][t]);
}

// The gradient of the weight as `accumulate` of masked_conv2d_bwd.cpp sums it: [groups][taps][C / groups][stride].
template <class T>
void accumulate_planes(const Tensor& grad_output, const Tensor& input, const Mask& m, const Reach& reach, std::int64_t stride, float* sums) {
  const Pixels<T> grad(grad_output), x(input);
  const std::int64_t n = input.size(0), plane = reach.rows() * reach.columns(), image = m.inputs * plane, seen = m.seen();
  const std::int64_t of_group = m.outputs / m.groups, chunk = samples_at_a_time(n, image);
  Run all{0, of_group, 0, 0, 0};  // Reach has the ordered tap among its rectangles
  const std::vector<Term> terms = terms_of(m, reach, all);
  const std::int64_t count = static_cast<std::int64_t>(terms.size()), parts = ceil_div(count, kTerms), blocks = ceil_div(of_group, kGradients);
  const Scratch<float> memory(chunk * image);
  for (std::int64_t first = 0; first < n; first += chunk) {
    const std::int64_t samples = std::min(chunk, n - first);
    stage_planes(x, m.inputs, reach, first, samples, first == 0, memory.get());
    const std::int64_t work = samples * reach.height * reach.width * m.outputs * count;
    parallel(m.groups * blocks * parts, work, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t item = begin; item < end; ++item) {
        const std::int64_t part = item % parts * kTerms, block = item / parts % blocks * kGradients, group = item / parts / blocks;
        const std::int64_t outputs = std::min<std::int64_t>(kGradients, of_group - block), some = std::min<std::int64_t>(kTerms, count - part);
        float found[kTerms * kGradients] = {};
        for (std::int64_t s = 0; s < samples; ++s)
          sum_pixels(terms.data() + part, some, memory.get() + s * image + group * seen * plane, reach.columns(),
                     grad.at(first + s, group * of_group + block, 0), grad.c, grad.y, outputs, reach.height, reach.width, found, kGradients);
        for (std::int64_t t = 0; t < some; ++t) {
          float* const to = sums + group * m.taps() * seen * stride + terms[part + t].weight / kPanel * stride + block;
          for (std::int64_t k = 0; k < outputs; ++k) to[k] += found[t * kGradients + k];
        }
      }
    });
  }
}

}  // namespace fastgen::masked
