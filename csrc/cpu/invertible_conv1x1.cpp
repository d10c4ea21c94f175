// invertible_conv1x1, forward: one read and one write an element; the numbers of an actnorm before the matrix are taken on the way.
#include "invertible_conv1x1.h"

#include "common/scratch.h"

namespace fastgen::invertible_conv1x1 {
namespace {

Tensor invertible_conv1x1_fwd(const Tensor& input, const Tensor& weight, OptionalTensor scale, OptionalTensor shift, OptionalTensor bias,
                              bool shift_first) {
  const char* const op = "invertible_conv1x1";
  Problem p(input);
  check_weight(p, weight);
  const Parameter slopes(op, "scale", scale, false, 0, p.channels), shifts(op, "shift", shift, false, 0, p.channels),
      biases(op, "bias", bias, false, 0, p.channels);
  Tensor output = empty_dense(input, p.channels_last, input.scalar_type());
  if (p.elements() == 0) return output;
  dispatch_dtype(op, input.scalar_type(), [&]<class T>() {
    using A = opmath_t<T>;
    const std::vector<A> w = read_weight<A>(p, weight);
    const Matrix<A> matrix(p, [&](std::int64_t o, std::int64_t c) { return w[o * p.channels + c]; });
    std::vector<A> before(p.channels), slope(p.channels), after(p.channels), added(p.padded);
    slopes.read(0, 0, p.channels, A(1), slope.data());
    shifts.read(0, 0, p.channels, A(0), (shift_first ? before : after).data());
    biases.read(0, 0, p.channels, A(0), added.data());
    const Affine<A> affine = slopes.given() || shifts.given() ? Affine<A>{before.data(), slope.data(), after.data()} : Affine<A>();
    Tensor x = input;
    SliceStrides from = p.strides(x), to = p.strides(output);
    p.merge({&from, &to});
    const T* const in = static_cast<const T*>(x.data_ptr());
    T* const out = static_cast<T*>(output.mutable_data_ptr());
    parallel(p.tiles(), p.elements() * p.channels, [&](std::int64_t begin, std::int64_t end) {
      const Scratch<A> z(p.channels * kTile);
      for (std::int64_t tile = begin; tile < end; ++tile) {
        const Piece part(p, tile);
        read_tile<A>(p, part, in, from, affine, z.get());
        write_product<A>(p, part, matrix, biases.given() ? added.data() : nullptr, z.get(), out, to);
      }
    });
  });
  return output;
}

}  // namespace
}  // namespace fastgen::invertible_conv1x1

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) { m.impl("invertible_conv1x1_fwd", TORCH_BOX(&fastgen::invertible_conv1x1::invertible_conv1x1_fwd)); }
