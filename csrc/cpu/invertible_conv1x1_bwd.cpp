// invertible_conv1x1, backward: dx = scale W^T dy by the product of the forward, and in the same pass P = sum dy x^T and g = sum dy, of
// which the gradients of the small tensors are made:
//
//   z = x scale + shift:    dW = P diag(scale) + g shift^T;   d scale = diag(W^T P),   d shift = W^T g,   d bias = g
//   z = (x + shift) scale:  the same of P + g shift^T for P, with d shift = scale W^T g
//
// P and g are summed over blocks of tiles, which depend on the shape alone, in the dtype of the arithmetic, and over the blocks in fp64.
#include "invertible_conv1x1.h"

#include <memory>

#include "common/scratch.h"

namespace fastgen::invertible_conv1x1 {
namespace {

// acc [padded, padded] += dy x^T over the positions of a tile: x [positions, padded], dy [padded, kTile].
template <class A>
void add_outer(const Problem& p, const A* dy, const A* x, std::int64_t count, A* acc) {
  constexpr std::int64_t w = kWidth<A>;
  for_lanes<A>(p.channels, [&](std::int64_t first, auto wide) {
    constexpr int kVectors = wide, tall = kTall<kVectors>;
    for (std::int64_t top = 0; top < p.channels; top += tall) {
      A* const to = acc + top * p.padded + first;
      Sums<A, kVectors> sum;
      for (int i = 0; i < tall; ++i)
        for (int v = 0; v < kVectors; ++v) sum[i][v] = load(to + i * p.padded + v * w);
      multiply<A, kVectors, kTile>(dy + top * kTile, 1, x + first, p.padded, count, sum);
      for (int i = 0; i < tall; ++i)
        for (int v = 0; v < kVectors; ++v) store(to + i * p.padded + v * w, sum[i][v]);
    }
  });
}

template <class A>
void add_sums(const Problem& p, const A* dy, std::int64_t count, A* sums) {
  for (std::int64_t c = 0; c < p.channels; ++c)
    sums[c] += sum_vectors<A>(count, [&](std::int64_t i, auto at) { return at.load(dy + c * kTile + i); });
}

// The totals of P [C, C], and behind them of g [C], over the blocks' [C + 1, C].
template <class A>
std::vector<double> add_up(const Problem& p, std::int64_t blocks, const A* parts) {
  const std::int64_t c = p.channels, size = (c + 1) * c;
  std::vector<double> totals(size);
  parallel(c + 1, blocks * size, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t block = 0; block < blocks; ++block)
      for (std::int64_t i = begin * c; i < end * c; ++i) totals[i] += parts[block * size + i];
  });
  return totals;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> invertible_conv1x1_bwd(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                                                          OptionalTensor scale, OptionalTensor shift, bool shift_first) {
  const char* const op = "invertible_conv1x1";
  Problem p(input);
  check_weight(p, weight);
  const ScalarType dtype = input.scalar_type(), opmath = opmath_type(dtype);
  FASTGEN_CHECK(sizes_of(grad_output) == sizes_of(input) && grad_output.scalar_type() == dtype,
                "invertible_conv1x1: grad_output must have the shape and the dtype of input");
  const std::int64_t c = p.channels;
  const Parameter slopes(op, "scale", scale, false, 0, c), shifts(op, "shift", shift, false, 0, c);
  Tensor d_input = empty_dense(input, p.channels_last, dtype), d_weight = empty_contiguous({c, c}, opmath);
  Tensor d_scale = empty_contiguous({c}, opmath), d_shift = empty_contiguous({c}, opmath), d_bias = empty_contiguous({c}, opmath);
  dispatch_dtype(op, dtype, [&]<class T>() {
    using A = opmath_t<T>;
    const std::vector<A> w = read_weight<A>(p, weight);
    std::vector<A> slope(c), moved(c);
    slopes.read(0, 0, c, A(1), slope.data());
    shifts.read(0, 0, c, A(0), moved.data());
    Tensor x = input, dy = grad_output;
    SliceStrides from = p.strides(x), of_grad = p.strides(dy), to = p.strides(d_input);
    p.merge({&from, &of_grad, &to});
    const std::int64_t count = p.tiles(), of_block = std::clamp<std::int64_t>(count / kBlocks, 1, kTiles);
    const std::int64_t blocks = (count + of_block - 1) / of_block;
    const std::unique_ptr<A[]> parts(new A[blocks * (c + 1) * c]);
    if (blocks > 0) {
      const Matrix<A> matrix(p, [&](std::int64_t o, std::int64_t k) { return w[k * c + o] * slope[o]; });
      const T *const in = static_cast<const T*>(x.data_ptr()), *const grad = static_cast<const T*>(dy.data_ptr());
      T* const out = static_cast<T*>(d_input.mutable_data_ptr());
      parallel(blocks, 2 * p.elements() * c, [&](std::int64_t begin, std::int64_t end) {
        const Scratch<A> dy_tile(p.padded * kTile), x_tile(p.padded * kTile), acc(p.padded * p.padded), sums(p.padded);
        std::fill_n(dy_tile.get(), p.padded * kTile, A(0));
        std::fill_n(x_tile.get(), p.padded * kTile, A(0));
        for (std::int64_t block = begin; block < end; ++block) {
          std::fill_n(acc.get(), p.padded * p.padded, A(0));
          std::fill_n(sums.get(), p.padded, A(0));
          for (std::int64_t tile = block * of_block; tile < std::min((block + 1) * of_block, count); ++tile) {
            const Piece part(p, tile);
            read_tile<A, T>(p, part, grad, of_grad, {}, dy_tile.get());
            write_product<A>(p, part, matrix, nullptr, dy_tile.get(), out, to);
            for (std::int64_t sample = 0; sample < part.samples; ++sample)
              tiles::read_panel<A>(part.in(in, from) + sample * from.sample, p.rows ? from.apart : 1, from.along, part.count, c,
                                   x_tile.get() + sample * p.pitch * p.padded, p.padded);
            add_outer<A>(p, dy_tile.get(), x_tile.get(), part.columns, acc.get());
            add_sums<A>(p, dy_tile.get(), part.columns, sums.get());
          }
          A* const to_parts = parts.get() + block * (c + 1) * c;
          for (std::int64_t o = 0; o < c; ++o) std::copy_n(acc.get() + o * p.padded, c, to_parts + o * c);
          std::copy_n(sums.get(), c, to_parts + c * c);
        }
      });
    }
    std::vector<double> outer = add_up<A>(p, blocks, parts.get());
    const double* const g = outer.data() + c * c;
    const auto data = [](Tensor& t) { return static_cast<A*>(t.mutable_data_ptr()); };
    std::vector<double> of_scale(c), of_shift(c);
    for (std::int64_t o = 0; o < c; ++o)
      for (std::int64_t k = 0; k < c; ++k) {
        double& sum = outer[o * c + k];
        const double through_shift = g[o] * moved[k];
        if (shift_first) sum += through_shift;
        of_scale[k] += w[o * c + k] * sum, of_shift[k] += w[o * c + k] * g[o];
        data(d_weight)[o * c + k] = static_cast<A>(shift_first ? sum * slope[k] : sum * slope[k] + through_shift);
      }
    for (std::int64_t k = 0; k < c; ++k) {
      data(d_scale)[k] = static_cast<A>(of_scale[k]), data(d_bias)[k] = static_cast<A>(g[k]);
      data(d_shift)[k] = static_cast<A>(shift_first ? of_shift[k] * slope[k] : of_shift[k]);
    }
  });
  return {d_input, d_weight, d_scale, d_shift, d_bias};
}

}  // namespace
}  // namespace fastgen::invertible_conv1x1

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) { m.impl("invertible_conv1x1_bwd", TORCH_BOX(&fastgen::invertible_conv1x1::invertible_conv1x1_bwd)); }
