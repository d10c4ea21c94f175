// rms_norm, backward. With x^ = x rstd, k = w (1 + scale), z = x^ k + shift and dz = dy act'(z):
//
//   dx = rstd (k dz - x^ mean(k dz x^)), without the second term where the norm was below the least one
//
// and the gradients of the small tensors are made of the sums of dz and dz x^ over the slices of a sample, or over all
// (common/slice_sums.h). Rows: a thread owns blocks of rows, and keeps dz of one row. Planes: it owns tiles of pixels; dz waits for its
// second use in dx where that is stored in the dtype of the arithmetic, and is computed twice where not.
#include <memory>

#include "common/slice_sums.h"
#include "rms_norm.h"

namespace fastgen::rms_norm {
namespace {

template <class T>
struct Pointers {
  const T *x, *dy;
  const opmath_t<T>* rstd;
  T* dx;
  SliceStrides x_strides, dy_strides;
};

template <class T, bool kSilu>
Vec<opmath_t<T>> grad_before_activation(Vec<opmath_t<T>> dy, Vec<opmath_t<T>> x_hat, Vec<opmath_t<T>> k, Vec<opmath_t<T>> b) {
  using A = opmath_t<T>;
  if constexpr (!kSilu) return dy;
  return dy * silu_grad<A>(madd<A>(x_hat, k, b));
}

template <class T, bool kSilu>
void backward_rows(const Problem& p, const Pointers<T>& ptr, const SliceBlocks& blocks, opmath_t<T>* parts) {
  using A = opmath_t<T>;
  using V = Vec<A>;
  const std::int64_t size = p.sizes.size, count = p.sizes.count;
  const A largest = static_cast<A>(p.largest);
  parallel(blocks.count(), p.sizes.elements(), [&](std::int64_t begin, std::int64_t end) {
    ModulationOfSample<A> modulation(p.modulation, size);
    std::vector<A> dz_row(size);
    for (std::int64_t item = begin; item < end; ++item) {
      const auto [group, first, last] = blocks[item];
      A *const dz_sum = parts + item * 2 * size, *const dz_x_sum = dz_sum + size;
      std::fill_n(dz_sum, 2 * size, A(0));
      modulation.seek(group);
      const A *k = modulation.k(), *b = modulation.b();
      for (std::int64_t row = first; row < last; ++row) {
        const T* const x = ptr.x + row / count * ptr.x_strides.sample + row % count * ptr.x_strides.apart;
        const T* const dy = ptr.dy + row / count * ptr.dy_strides.sample + row % count * ptr.dy_strides.apart;
        const V r(ptr.rstd[row]);
        const A total = sum_vectors<A>(size, [&](std::int64_t i, auto at) {
          const V slope = at.load(k + i), x_hat = at.load(x + i) * r;
          const V dz = at.keep(grad_before_activation<T, kSilu>(at.load(dy + i), x_hat, slope, at.load(b + i)));
          const V dz_x = dz * x_hat;
          at.store(dz_row.data() + i, dz);
          at.store(dz_sum + i, V(at.load(dz_sum + i) + dz));
          at.store(dz_x_sum + i, V(at.load(dz_x_sum + i) + dz_x));
          return dz_x * slope;
        });
        const V mean(ptr.rstd[row] < largest ? total / static_cast<A>(size) : A(0));
        T* const dx = ptr.dx + row * size;
        for_vectors<A>(size, [&](std::int64_t i, auto at) {
          at.store(dx + i, V(r * madd<A>(at.load(k + i), at.load(dz_row.data() + i), -(at.load(x + i) * r * mean))));
        });
      }
    }
  });
}

template <class T, bool kSilu>
void backward_planes(const Problem& p, const Pointers<T>& ptr, std::int64_t tile, opmath_t<T>* parts) {
  using A = opmath_t<T>;
  using V = Vec<A>;
  constexpr bool kStore = kSilu && std::is_same_v<T, A>;
  const std::int64_t channels = p.sizes.size, pixels = p.sizes.count, tiles = (pixels + tile - 1) / tile;
  const A largest = static_cast<A>(p.largest);
  parallel(p.sizes.n * tiles, p.sizes.elements(), [&](std::int64_t begin, std::int64_t end) {
    ModulationOfSample<A> modulation(p.modulation, channels);
    std::vector<A> means(tile);
    for (std::int64_t item = begin; item < end; ++item) {
      const std::int64_t n = item / tiles, first = item % tiles * tile, count = std::min(tile, pixels - first);
      modulation.seek(n);
      const T *const x = ptr.x + n * ptr.x_strides.sample + first, *const dy = ptr.dy + n * ptr.dy_strides.sample + first;
      const A* const rstd = ptr.rstd + n * pixels + first;
      T* const dx = ptr.dx + n * channels * pixels + first;
      A *const mean = means.data(), *const dz_sum = parts + item * 2 * channels, *const dz_x_sum = dz_sum + channels;
      std::fill_n(mean, count, A(0));
      for (std::int64_t c = 0; c < channels; ++c) {
        const V k(modulation.k()[c]), b(modulation.b()[c]);
        V dz_total(A(0)), dz_x_total(A(0));
        for_vectors<A>(count, [&](std::int64_t i, auto at) {
          const V x_hat = at.load(x + c * ptr.x_strides.along + i) * at.load(rstd + i);
          const V dz = at.keep(grad_before_activation<T, kSilu>(at.load(dy + c * ptr.dy_strides.along + i), x_hat, k, b));
          if constexpr (kStore) at.store(dx + c * pixels + i, dz);
          const V dz_x = dz * x_hat;
          dz_total += dz, dz_x_total += dz_x;
          at.store(mean + i, madd<A>(dz_x, k, at.load(mean + i)));
        });
        dz_sum[c] = sum_lanes<A>(dz_total), dz_x_sum[c] = sum_lanes<A>(dz_x_total);
      }
      for (std::int64_t i = 0; i < count; ++i) mean[i] = rstd[i] < largest ? mean[i] / static_cast<A>(channels) : A(0);
      for (std::int64_t c = 0; c < channels; ++c) {
        const V k(modulation.k()[c]), b(modulation.b()[c]);
        for_vectors<A>(count, [&](std::int64_t i, auto at) {
          const V r = at.load(rstd + i), x_hat = at.load(x + c * ptr.x_strides.along + i) * r;
          V dz;
          if constexpr (kStore) dz = at.load(dx + c * pixels + i);
          else dz = grad_before_activation<T, kSilu>(at.load(dy + c * ptr.dy_strides.along + i), x_hat, k, b);
          at.store(dx + c * pixels + i, V(r * madd<A>(k, dz, -(x_hat * at.load(mean + i)))));
        });
      }
    }
  });
}

// Where the gradients of the small tensors go; those of scale and shift null where neither is there.
template <class A>
struct SmallGradients {
  A *weight, *scale, *shift;
};

template <class A>
void small_gradients(const Problem& p, const SliceBlocks& blocks, const A* parts, const SmallGradients<A>& to) {
  const std::int64_t size = p.sizes.size;
  for_columns(blocks, 2, size, parts, [&](std::int64_t first, std::int64_t columns, const auto& totals_of) {
    double d_weight[kColumns] = {};
    A weight[kColumns], scale[kColumns];
    p.modulation.weight.read(0, first, columns, A(1), weight);
    for (std::int64_t group = 0; group < blocks.groups; ++group) {
      const ColumnTotals totals = totals_of(group);
      p.modulation.scale.read(group, first, columns, A(0), scale);
      for (std::int64_t c = 0; c < columns; ++c) {
        const std::int64_t at = group * size + first + c;
        d_weight[c] += (1.0 + scale[c]) * totals[1][c];
        if (to.scale) to.scale[at] = static_cast<A>(weight[c] * totals[1][c]), to.shift[at] = static_cast<A>(totals[0][c]);
      }
    }
    for (std::int64_t c = 0; c < columns; ++c) to.weight[first + c] = static_cast<A>(d_weight[c]);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> rms_norm_bwd(const Tensor& grad_output, const Tensor& input, const Tensor& rstd, bool over_channels,
                                                        OptionalTensor weight, OptionalTensor scale, OptionalTensor shift, double min_norm,
                                                        std::int64_t activation) {
  const Problem p(input, over_channels, weight, scale, shift, min_norm, activation);
  const ScalarType dtype = input.scalar_type(), opmath = opmath_type(dtype);
  FASTGEN_CHECK(sizes_of(grad_output) == sizes_of(input) && grad_output.scalar_type() == dtype,
                "rms_norm: grad_output must have the shape and the dtype of input");
  FASTGEN_CHECK(sizes_of(rstd) == statistics_of(input, p.axis) && rstd.scalar_type() == opmath, "rms_norm: rstd must be that of the forward");
  const bool modulated = scale.has_value() || shift.has_value();
  Tensor d_input = empty_dense(input, p.channels_last, dtype), d_weight = empty_contiguous({p.sizes.size}, opmath);
  const auto per_sample = [&] { return empty_contiguous(modulated ? std::vector{p.sizes.n, p.sizes.size} : std::vector<std::int64_t>{0}, opmath); };
  Tensor d_scale = per_sample(), d_shift = per_sample();
  dispatch_dtype("rms_norm", dtype, [&]<class T>() {
    using A = opmath_t<T>;
    if (p.sizes.elements() == 0) {  // no element contributes nothing
      for (Tensor* t : {&d_weight, &d_scale, &d_shift}) std::fill_n(static_cast<A*>(t->mutable_data_ptr()), t->numel(), A(0));
      return;
    }
    Tensor x = input, dy = grad_output;
    const Tensor rstd_dense = as_dense(rstd, false);
    Pointers<T> at{};
    at.x_strides = as_slices(x, p.axis, p.rows), at.dy_strides = as_slices(dy, p.axis, p.rows);
    at.x = static_cast<const T*>(x.data_ptr()), at.dy = static_cast<const T*>(dy.data_ptr());
    at.rstd = static_cast<const A*>(rstd_dense.data_ptr()), at.dx = static_cast<T*>(d_input.mutable_data_ptr());
    const std::int64_t tile = tile_pixels(p);
    const SliceBlocks blocks = p.rows ? SliceBlocks(p.sizes, modulated, 1) : SliceBlocks(p.sizes.n, (p.sizes.count + tile - 1) / tile, modulated);
    const std::unique_ptr<A[]> parts(new A[blocks.count() * 2 * p.sizes.size]);
    if (p.rows && p.silu) backward_rows<T, true>(p, at, blocks, parts.get());
    if (p.rows && !p.silu) backward_rows<T, false>(p, at, blocks, parts.get());
    if (!p.rows && p.silu) backward_planes<T, true>(p, at, tile, parts.get());
    if (!p.rows && !p.silu) backward_planes<T, false>(p, at, tile, parts.get());
    const auto data = [](Tensor& t) { return t.numel() ? static_cast<A*>(t.mutable_data_ptr()) : nullptr; };
    small_gradients<A>(p, blocks, parts.get(), {data(d_weight), data(d_scale), data(d_shift)});
  });
  return {d_input, d_weight, d_scale, d_shift};
}

}  // namespace
}  // namespace fastgen::rms_norm

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) { m.impl("rms_norm_bwd", TORCH_BOX(&fastgen::rms_norm::rms_norm_bwd)); }
