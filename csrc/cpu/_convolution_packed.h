// A convolution by tiles with packed weights: the whole of it, and the op.
//
//   output = (conv(act(input * input_scale + input_shift)) + bias + embedding + residual) * output_scale
//
// Either each thread keeps its rows of tiles to itself (_convolution_apart.h), or
// rows of tiles are taken in groups whose transformed values and products stay in the last-level cache, each group in three steps that
// all threads share: values (_convolution_values.h), products, of which a thread owns blocks and panels of output channels
// (_product.h), and outputs (_convolution_outputs.h). Which way, and which thread does what, changes no sum: the bits are the same
// on any number of threads.
#pragma once

#include <utility>

#include "_convolution_apart.h"

namespace fastgen::convolution {

template <class G>
void make_products(const Problem& p, const Groups<G>& g, std::int64_t tiles, const float* values, const float* weights, float* products) {
  constexpr std::int64_t share = 4;  // panels that a thread takes at once, of one block
  const std::int64_t panels = g.product_stride / kPanel, shares = ceil_div(panels, share);
  parallel(G::blocks * shares, G::blocks * tiles * g.product_stride * p.channels, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t block = i / shares, first = i % shares * share;
      multiply({values + kBlocks<G>.point[block] * g.values_of_point, weights + block * panels * p.channels * kPanel,
                products + block * g.products_of_block, tiles, p.channels, g.value_stride, g.product_stride},
               first, std::min(first + share, panels));
    }
  });
}

// In groups that all threads share.
template <class G, class T, bool kSilu>
void forward_together(const Problem& p, const Image<const T>& x, const float* weights, const Image<T>& y, const Image<const T>* residual,
                      const Gathered* gathered) {
  const Groups<G> g(p);
  const Scratch<float> memory(G::points * g.values_of_point + G::blocks * g.products_of_block);
  float *const values = memory.get(), *const products = values + G::points * g.values_of_point;
  for (std::int64_t first = 0; first < g.rows; first += g.rows_of_group) {
    const std::int64_t rows = std::min(g.rows_of_group, g.rows - first);
    make_values<G, T, kSilu>(p, g, x, first, rows, values);
    make_products(p, g, rows * g.tiles_of_row, values, weights, products);
    make_outputs<G, T>(p, g, first, rows, products, y, residual, G::kernel == 1 ? nullptr : gathered);
    if (G::kernel != 1 || !gathered) continue;  // of one row a piece would be too small
    const auto above = [&](std::int64_t row) { return gathered->pieces_above(row, p.height, p.height, rows_of_piece(p.height, p.width)); };
    gathered->take_all(y.data, above(first), above(first + rows), false);
  }
}

// `moments`: those of the output, nullptr where they are not wanted.
template <class G, class T, bool kSilu>
void forward(Call& call, const Tensor& packed, Tensor* moments) {
  const Problem& p = call.problem;
  const Image<const T> x = image_of<T>(call.input);
  const Image<T> y(call.output, static_cast<T*>(call.output.mutable_data_ptr()));
  const std::optional<Image<const T>> r = image_of<T>(call.residual);
  const auto* const weights = static_cast<const float*>(packed.data_ptr());
  std::optional<Gathered> gathering;
  if (moments) gathering.emplace(call.output, p.channels_last, G::kernel == 1 ? rows_of_piece(p.height, p.width) : G::outputs * G::scale);
  const Gathered* const gathered = gathering ? &*gathering : nullptr;
  if (const std::int64_t rows = rows_apart<G>(p); rows > 0) forward_apart<G, T, kSilu>(p, x, weights, y, r ? &*r : nullptr, gathered, rows);
  else forward_together<G, T, kSilu>(p, x, weights, y, r ? &*r : nullptr, gathered);
  if (gathered) gathered->merge(y.data, static_cast<double*>(moments->mutable_data_ptr()));
}

template <int scale>
Tensor forward_packed(const char* op, const Tensor& input, const Tensor& packed, std::int64_t out_channels, OptionalTensor bias,
                      OptionalTensor input_scale, OptionalTensor input_shift, std::int64_t activation, OptionalTensor embedding,
                      OptionalTensor residual, double output_scale, OptionalTensor skip, Tensor* moments = nullptr) {
  check_input(op, input);
  const ScalarType dtype = input.scalar_type();
  FASTGEN_CHECK(dtype != ScalarType::Double, op, ": input must be float32, bfloat16 or float16");
  FASTGEN_CHECK(packed.scalar_type() == ScalarType::Float && packed.dim() == 4 && packed.is_contiguous() &&
                    outputs_of<scale>(packed.size(0)) > 0,
                op, ": packed must be what the packing op returns");
  const std::int64_t channels = check_skip(op, input, skip);
  FASTGEN_CHECK(packed.size(1) == ceil_div(out_channels, kPanel) && packed.size(2) == channels && packed.size(3) == kPanel && out_channels >= 1,
                op, ": packed must be for ", channels, " channels and out_channels=", out_channels);
  Call call = make_call<scale>(op, input, skip, channels, out_channels, bias, input_scale, input_shift, activation, embedding, residual, output_scale);
  if (moments) *moments = empty_moments(call.output);
  if (call.output.numel() == 0) return call.output;
  dispatch_tile<scale>(outputs_of<scale>(packed.size(0)), [&]<class G>() {
    const auto run = [&]<class T>() {
      call.problem.silu ? forward<G, T, true>(call, packed, moments) : forward<G, T, false>(call, packed, moments);
    };
    if (dtype == ScalarType::Float) run.template operator()<float>();
    if (dtype == ScalarType::BFloat16) run.template operator()<BFloat16>();
    if (dtype == ScalarType::Half) run.template operator()<Float16>();
  });
  return call.output;
}

// The output and its moments, of a function that takes where they go last.
template <class F>
std::tuple<Tensor, Tensor> with_moments(const F& forward) {
  Tensor moments;
  Tensor output = forward(&moments);
  return {output, moments};
}

}  // namespace fastgen::convolution
