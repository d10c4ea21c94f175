// conv2d with packed weights (_convolution_packed.h): 3x3 by Winograd's F(4x4, 3x3) or F(2x2, 3x3), 1x1 as one matrix product; stride 1,
// the size kept. Its weights are [points, panels, C, kPanel].
#include "_convolution_pack.h"
#include "_convolution_packed.h"
#if FASTGEN_HAS_MATRIX_TILES
#include "_convolution_direct.h"
#endif

namespace fastgen::convolution {
namespace {

Tensor conv2d_pack(const Tensor& weight, std::int64_t outputs) { return pack_weight<1>("conv2d_pack", weight, outputs); }

Tensor conv2d_packed(const Tensor& input, const Tensor& packed, std::int64_t out_channels, OptionalTensor bias, OptionalTensor input_scale,
                     OptionalTensor input_shift, std::int64_t activation, OptionalTensor embedding, OptionalTensor residual,
                     double output_scale, OptionalTensor skip) {
  return forward_packed<1>("conv2d_packed", input, packed, out_channels, bias, input_scale, input_shift, activation, embedding, residual,
                           output_scale, skip);
}

std::tuple<Tensor, Tensor> conv2d_packed_moments(const Tensor& input, const Tensor& packed, std::int64_t out_channels, OptionalTensor bias,
                     OptionalTensor input_scale, OptionalTensor input_shift, std::int64_t activation, OptionalTensor embedding,
                     OptionalTensor residual, double output_scale, OptionalTensor skip) {
  return with_moments([&](Tensor* moments) {
    return forward_packed<1>("conv2d_packed_moments", input, packed, out_channels, bias, input_scale, input_shift, activation, embedding,
                     residual, output_scale, skip, moments);
  });
}

#if FASTGEN_HAS_MATRIX_TILES
Tensor conv2d_direct_pack(const Tensor& weight) { return pack_weight_direct<1>("conv2d_direct_pack", weight); }

Tensor conv2d_direct(const Tensor& input, const Tensor& packed, std::int64_t out_channels, OptionalTensor bias, OptionalTensor input_scale,
                     OptionalTensor input_shift, std::int64_t activation, OptionalTensor embedding, OptionalTensor residual,
                     double output_scale, OptionalTensor skip) {
  return forward_packed_direct<1>("conv2d_direct", input, packed, out_channels, bias, input_scale, input_shift, activation, embedding,
                                  residual, output_scale, skip);
}

std::tuple<Tensor, Tensor> conv2d_direct_moments(const Tensor& input, const Tensor& packed, std::int64_t out_channels, OptionalTensor bias,
                     OptionalTensor input_scale, OptionalTensor input_shift, std::int64_t activation, OptionalTensor embedding,
                     OptionalTensor residual, double output_scale, OptionalTensor skip) {
  return with_moments([&](Tensor* moments) {
    return forward_packed_direct<1>("conv2d_direct_moments", input, packed, out_channels, bias, input_scale, input_shift, activation, embedding,
                     residual, output_scale, skip, moments);
  });
}
#endif

}  // namespace
}  // namespace fastgen::convolution

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("conv2d_pack", TORCH_BOX(&fastgen::convolution::conv2d_pack));
  m.impl("conv2d_packed", TORCH_BOX(&fastgen::convolution::conv2d_packed));
  m.impl("conv2d_packed_moments", TORCH_BOX(&fastgen::convolution::conv2d_packed_moments));
#if FASTGEN_HAS_MATRIX_TILES
  m.impl("conv2d_direct_pack", TORCH_BOX(&fastgen::convolution::conv2d_direct_pack));
  m.impl("conv2d_direct", TORCH_BOX(&fastgen::convolution::conv2d_direct));
  m.impl("conv2d_direct_moments", TORCH_BOX(&fastgen::convolution::conv2d_direct_moments));
#endif
}
