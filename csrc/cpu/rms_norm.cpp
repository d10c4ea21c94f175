// rms_norm, forward: one read for the mean squares and one, which the cache answers, for the output.
//
//   rows:    a thread owns whole rows.
//   planes:  a thread owns tiles of pixels and keeps their sums of squares in the first-level cache; kChannels channels are read side
//            by side, so that a sum is loaded and stored once for all of them.
#include "rms_norm.h"

namespace fastgen::rms_norm {
namespace {

constexpr std::int64_t kPiece = 8192;  // elements of a long row whose squares are summed in fp32
constexpr int kChannels = 8;

template <class T>
double mean_square(const T* x, std::int64_t count) {
  using A = opmath_t<T>;
  double total = 0;
  for (std::int64_t first = 0; first < count; first += kPiece)
    total += sum_vectors<A>(std::min(kPiece, count - first), [&](std::int64_t i, auto at) {
      const Vec<A> v = at.load(x + first + i);
      return v * v;
    });
  return total / static_cast<double>(count);
}

template <class T, bool kSilu>
void forward_rows(const Problem& p, const T* x, SliceStrides strides, T* y, opmath_t<T>* rstd, double eps) {
  using A = opmath_t<T>;
  using V = Vec<A>;
  const std::int64_t size = p.sizes.size, count = p.sizes.count;
  parallel(p.sizes.slices(), p.sizes.elements(), [&](std::int64_t begin, std::int64_t end) {
    ModulationOfSample<A> modulation(p.modulation, size);
    for (std::int64_t row = begin; row < end; ++row) {
      modulation.seek(row / count);
      const T* const in = x + row / count * strides.sample + row % count * strides.apart;
      const A r = static_cast<A>(rstd_of(mean_square(in, size), eps, p.largest));
      if (rstd) rstd[row] = r;
      const V slope(r);
      const A *k = modulation.k(), *b = modulation.b();
      T* const out = y + row * size;
      for_vectors<A>(size, [&](std::int64_t i, auto at) {
        V z = madd<A>(at.load(in + i) * slope, at.load(k + i), at.load(b + i));
        if constexpr (kSilu) z = silu<A, kLowPrecision<T>>(z);
        at.store(out + i, z);
      });
    }
  });
}

// sums[i] += the squares of pixel i in kCount neighbouring channels.
template <int kCount, class T>
void add_squares(const T* x, std::int64_t along, std::int64_t pixels, opmath_t<T>* sums) {
  using A = opmath_t<T>;
  for_vectors<A>(pixels, [&](std::int64_t i, auto at) {
    Vec<A> sum = at.load(sums + i);
    for (int c = 0; c < kCount; ++c) {
      const Vec<A> v = at.load(x + c * along + i);
      sum = madd<A>(v, v, sum);
    }
    at.store(sums + i, sum);
  });
}

template <class T, bool kSilu>
void forward_planes(const Problem& p, const T* x, SliceStrides strides, T* y, opmath_t<T>* rstd, double eps) {
  using A = opmath_t<T>;
  using V = Vec<A>;
  const std::int64_t channels = p.sizes.size, pixels = p.sizes.count, tile = tile_pixels(p), tiles = (pixels + tile - 1) / tile;
  parallel(p.sizes.n * tiles, p.sizes.elements(), [&](std::int64_t begin, std::int64_t end) {
    ModulationOfSample<A> modulation(p.modulation, channels);
    std::vector<A> slopes(tile);
    for (std::int64_t item = begin; item < end; ++item) {
      const std::int64_t n = item / tiles, first = item % tiles * tile, count = std::min(tile, pixels - first);
      modulation.seek(n);
      const T* const in = x + n * strides.sample + first;
      A* const slope = slopes.data();
      std::fill_n(slope, count, A(0));
      std::int64_t c = 0;
      for (; c + kChannels <= channels; c += kChannels) add_squares<kChannels>(in + c * strides.along, strides.along, count, slope);
      for (; c < channels; ++c) add_squares<1>(in + c * strides.along, strides.along, count, slope);
      const A share = A(1) / static_cast<A>(channels), added = static_cast<A>(eps), largest = static_cast<A>(p.largest);
      for (std::int64_t i = 0; i < count; ++i) slope[i] = std::min(A(1) / std::sqrt(slope[i] * share + added), largest);
      if (rstd) std::copy_n(slope, count, rstd + n * pixels + first);
      for (c = 0; c < channels; ++c) {
        const V k(modulation.k()[c]), b(modulation.b()[c]);
        const T* const from = in + c * strides.along;
        T* const to = y + (n * channels + c) * pixels + first;
        for_vectors<A>(count, [&](std::int64_t i, auto at) {
          V z = madd<A>(at.load(from + i) * at.load(slope + i), k, b);
          if constexpr (kSilu) z = silu<A, kLowPrecision<T>>(z);
          at.store(to + i, z);
        });
      }
    }
  });
}

// Fills `output`, and `rstd` where it is wanted.
void forward(const Problem& p, const Tensor& input, double eps, Tensor& output, Tensor* rstd) {
  dispatch_dtype("rms_norm", input.scalar_type(), [&]<class T>() {
    using A = opmath_t<T>;
    A* const r = rstd ? static_cast<A*>(rstd->mutable_data_ptr()) : nullptr;
    if (p.sizes.elements() == 0) {  // no element has no mean
      if (r) std::fill_n(r, p.sizes.slices(), std::numeric_limits<A>::quiet_NaN());
      return;
    }
    Tensor x = input;
    const SliceStrides strides = as_slices(x, p.axis, p.rows);
    const T* const in = static_cast<const T*>(x.data_ptr());
    T* const out = static_cast<T*>(output.mutable_data_ptr());
    if (p.rows && p.silu) forward_rows<T, true>(p, in, strides, out, r, eps);
    if (p.rows && !p.silu) forward_rows<T, false>(p, in, strides, out, r, eps);
    if (!p.rows && p.silu) forward_planes<T, true>(p, in, strides, out, r, eps);
    if (!p.rows && !p.silu) forward_planes<T, false>(p, in, strides, out, r, eps);
  });
}

Tensor rms_norm(const Tensor& input, bool over_channels, OptionalTensor weight, OptionalTensor scale, OptionalTensor shift, double eps,
                double min_norm, std::int64_t activation) {
  const Problem p(input, over_channels, weight, scale, shift, min_norm, activation);
  Tensor output = empty_dense(input, p.channels_last, input.scalar_type());
  forward(p, input, eps, output, nullptr);
  return output;
}

std::tuple<Tensor, Tensor> rms_norm_fwd(const Tensor& input, bool over_channels, OptionalTensor weight, OptionalTensor scale,
                                        OptionalTensor shift, double eps, double min_norm, std::int64_t activation) {
  const Problem p(input, over_channels, weight, scale, shift, min_norm, activation);
  Tensor output = empty_dense(input, p.channels_last, input.scalar_type());
  Tensor rstd = empty_contiguous(statistics_of(input, p.axis), opmath_type(input.scalar_type()));
  forward(p, input, eps, output, &rstd);
  return {output, rstd};
}

}  // namespace
}  // namespace fastgen::rms_norm

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&fastgen::rms_norm::rms_norm));
  m.impl("rms_norm_fwd", TORCH_BOX(&fastgen::rms_norm::rms_norm_fwd));
}
