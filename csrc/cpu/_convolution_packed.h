// A convolution by tiles with packed weights: the whole of it, and the op.
//
//   output = (conv(act(input * input_scale + input_shift)) + bias + embedding + residual) * output_scale
//
// Rows of tiles are taken in groups whose transformed values and products stay in the last-level cache, each group in three steps that
// all threads share: values (_convolution_values.h), products, of which a thread owns blocks and panels of output channels
// (_product.h), and outputs (_convolution_outputs.h). Which thread does what changes no sum: the bits are the same on
// any number of threads.
#pragma once

#include "_convolution_outputs.h"

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

template <class G, class T, bool kSilu>
void forward(const Problem& p, const Tensor& input, const Tensor& packed, const Tensor* residual, Tensor& output) {
  const Groups<G> g(p);
  const Image<const T> x(input, static_cast<const T*>(input.data_ptr()));
  const Image<T> y(output, static_cast<T*>(output.mutable_data_ptr()));
  const std::optional<Image<const T>> r = residual ? std::optional(Image<const T>(*residual, static_cast<const T*>(residual->data_ptr())))
                                                   : std::nullopt;
  Tensor memory = empty_contiguous({G::points * g.values_of_point + G::blocks * g.products_of_block}, ScalarType::Float);
  float* const values = static_cast<float*>(memory.mutable_data_ptr());
  float* const products = values + G::points * g.values_of_point;
  const auto* const weights = static_cast<const float*>(packed.data_ptr());
  for (std::int64_t first = 0; first < g.rows; first += g.rows_of_group) {
    const std::int64_t rows = std::min(g.rows_of_group, g.rows - first);
    make_values<G, T, kSilu>(p, g, x, first, rows, values);
    make_products(p, g, rows * g.tiles_of_row, values, weights, products);
    make_outputs<G, T>(p, g, first, rows, products, y, r ? &*r : nullptr);
  }
}

template <int scale>
Tensor forward_packed(const char* op, const Tensor& input, const Tensor& packed, std::int64_t out_channels, OptionalTensor bias,
                      OptionalTensor input_scale, OptionalTensor input_shift, std::int64_t activation, OptionalTensor embedding,
                      OptionalTensor residual, double output_scale) {
  check_floating(op, "input", input);
  FASTGEN_CHECK(input.dim() == 4, op, ": input must be [N, C, H, W]");
  const ScalarType dtype = input.scalar_type();
  FASTGEN_CHECK(dtype != ScalarType::Double, op, ": input must be float32, bfloat16 or float16");
  FASTGEN_CHECK(packed.scalar_type() == ScalarType::Float && packed.dim() == 4 && packed.is_contiguous() &&
                    outputs_of<scale>(packed.size(0)) > 0,
                op, ": packed must be what the packing op returns");
  const std::int64_t n = input.size(0), c = input.size(1), h = input.size(2), w = input.size(3);
  FASTGEN_CHECK(packed.size(1) == ceil_div(out_channels, kPanel) && packed.size(2) == c && packed.size(3) == kPanel && out_channels >= 1, op,
                ": packed must be for ", c, " channels and out_channels=", out_channels);
  FASTGEN_CHECK(activation == 0 || activation == 1, op, ": activation must be 0 (none) or 1 (silu), got ", activation);
  const Problem p{n, c, out_channels, h, w, is_channels_last(input), activation == 1, static_cast<float>(output_scale),
                  Parameter(op, "input_scale", input_scale, true, n, c), Parameter(op, "input_shift", input_shift, true, n, c),
                  Parameter(op, "bias", bias, false, n, out_channels), Parameter(op, "embedding", embedding, true, n, out_channels)};
  const std::vector<std::int64_t> sizes = {n, out_channels, h * scale, w * scale};
  if (residual.has_value())
    FASTGEN_CHECK(residual->scalar_type() == dtype && sizes_of(*residual) == sizes, op, ": residual must have the dtype of input and shape [",
                  n, ", ", out_channels, ", ", h * scale, ", ", w * scale, "]");
  Tensor output = empty_strided(sizes, dense_strides(sizes, p.channels_last), dtype);
  if (output.numel() == 0) return output;
  const Tensor x = readable(input, p.channels_last);
  const OptionalTensor r = residual.has_value() ? OptionalTensor(readable(*residual, p.channels_last)) : std::nullopt;
  dispatch_tile<scale>(outputs_of<scale>(packed.size(0)), [&]<class G>() {
    const auto run = [&]<class T>() {
      p.silu ? forward<G, T, true>(p, x, packed, r ? &*r : nullptr, output) : forward<G, T, false>(p, x, packed, r ? &*r : nullptr, output);
    };
    if (dtype == ScalarType::Float) run.template operator()<float>();
    if (dtype == ScalarType::BFloat16) run.template operator()<BFloat16>();
    if (dtype == ScalarType::Half) run.template operator()<Float16>();
  });
  return output;
}

}  // namespace fastgen::convolution
