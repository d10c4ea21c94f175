// actnorm: one read and one write an element, forward or inverse, and its backward with the sums of dy and dy (x + before) a channel.
//
// The sums are taken by blocks that depend on the shape alone, in the dtype of the arithmetic, and over the blocks in fp64
// (common/slice_sums.h).
#include "actnorm.h"

#include <memory>

#include "common/slice_sums.h"

namespace fastgen::actnorm {
namespace {

std::tuple<Tensor, Tensor> actnorm_fwd(const Tensor& input, const Tensor& scale, const Tensor& shift, bool log_scale, bool shift_first,
                                       bool inverse) {
  const Problem p("actnorm", input);
  Tensor output = empty_dense(input, p.channels_last, input.scalar_type());
  Tensor log_det = empty_contiguous({input.size(0)}, opmath_type(input.scalar_type()));
  dispatch_dtype(p.op, input.scalar_type(), [&]<class T>() {
    using A = opmath_t<T>;
    using V = Vec<A>;
    Affine<A> affine(p.op, p.channels, scale, shift, log_scale, shift_first, inverse);
    const double log_slopes = affine.log_slopes * static_cast<double>(p.vectors ? 1 : p.positions);
    std::fill_n(static_cast<A*>(log_det.mutable_data_ptr()), log_det.numel(), static_cast<A>(log_slopes));
    if (p.elements() == 0) return;
    Tensor x = input;
    const SliceStrides from = p.strides(x), to = p.strides(output);
    const T* const in = static_cast<const T*>(x.data_ptr());
    T* const out = static_cast<T*>(output.mutable_data_ptr());
    if (p.rows) {
      const RowBlocks blocks(p, {&from, &to});
      affine.repeat(blocks.together);
      parallel(p.n * blocks.a_sample, p.elements(), [&](std::int64_t begin, std::int64_t end) {
        const A *const before = affine.before.data(), *const slope = affine.slope.data(), *const after = affine.after.data();
        for (std::int64_t item = begin; item < end; ++item) {
          const std::int64_t n = item / blocks.a_sample;
          blocks.for_rows(item, [&](std::int64_t position, std::int64_t count) {
            const T* const x_row = in + n * from.sample + position * from.apart;
            T* const y = out + n * to.sample + position * to.apart;
            for_vectors<A>(count * p.channels, [&](std::int64_t i, auto at) {
              at.store(y + i, madd<A>(at.load(x_row + i) + at.load(before + i), at.load(slope + i), at.load(after + i)));
            });
          });
        }
      });
      return;
    }
    const Runs runs(input, p.channels, false, kLongest);
    parallel(runs.count(), p.elements(), [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t item = begin; item < end; ++item) {
        const Run run = runs[item];
        const V before(affine.before[run.channel]), slope(affine.slope[run.channel]), after(affine.after[run.channel]);
        const T* const x_run = in + run.offset(from);
        T* const y = out + run.offset(to);
        for_vectors<A>(run.count, [&](std::int64_t i, auto at) { at.store(y + i, madd<A>(at.load(x_run + i) + before, slope, after)); });
      }
    });
  });
  return {output, log_det};
}

template <class T>
struct Pointers {
  const T *x, *dy;
  T* dx;
  SliceStrides x_strides, dy_strides, dx_strides;
};

// parts [blocks, 2, C]: the sums of dy and of dy (x + before).
template <class T>
void backward_rows(const Problem& p, const Pointers<T>& ptr, const RowBlocks& blocks, const Affine<opmath_t<T>>& affine, opmath_t<T>* parts) {
  using A = opmath_t<T>;
  const std::int64_t row = blocks.together * p.channels;
  parallel(p.n * blocks.a_sample, p.elements(), [&](std::int64_t begin, std::int64_t end) {
    std::vector<A> sums(2 * row);
    A *const of_dy = sums.data(), *const of_dy_x = of_dy + row;
    const A *const before = affine.before.data(), *const slope = affine.slope.data();
    for (std::int64_t item = begin; item < end; ++item) {
      const std::int64_t n = item / blocks.a_sample;
      std::fill(sums.begin(), sums.end(), A(0));
      blocks.for_rows(item, [&](std::int64_t position, std::int64_t count) {
        const T* const x = ptr.x + n * ptr.x_strides.sample + position * ptr.x_strides.apart;
        const T* const dy = ptr.dy + n * ptr.dy_strides.sample + position * ptr.dy_strides.apart;
        T* const dx = ptr.dx + n * ptr.dx_strides.sample + position * ptr.dx_strides.apart;
        for_vectors<A>(count * p.channels, [&](std::int64_t i, auto at) {
          const Vec<A> grad = at.load(dy + i);
          at.store(of_dy + i, Vec<A>(at.load(of_dy + i) + grad));
          at.store(of_dy_x + i, madd<A>(grad, at.load(x + i) + at.load(before + i), at.load(of_dy_x + i)));
          at.store(dx + i, Vec<A>(grad * at.load(slope + i)));
        });
      });
      A* const to = parts + item * 2 * p.channels;
      std::fill_n(to, 2 * p.channels, A(0));
      for (std::int64_t k = 0; k < 2; ++k)
        for (std::int64_t i = 0; i < blocks.together; ++i)
          for (std::int64_t c = 0; c < p.channels; ++c) to[k * p.channels + c] += sums[k * row + i * p.channels + c];
    }
  });
}

template <class T>
void backward_planes(const Problem& p, const Pointers<T>& ptr, const Runs& runs, const Affine<opmath_t<T>>& affine, opmath_t<T>* parts) {
  using A = opmath_t<T>;
  using V = Vec<A>;
  parallel(runs.count(), p.elements(), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t item = begin; item < end; ++item) {
      const Run run = runs[item];
      const V before(affine.before[run.channel]), slope(affine.slope[run.channel]);
      const T *const x = ptr.x + run.offset(ptr.x_strides), *const dy = ptr.dy + run.offset(ptr.dy_strides);
      T* const dx = ptr.dx + run.offset(ptr.dx_strides);
      V of_dy(A(0)), of_dy_x(A(0));
      for_vectors<A>(run.count, [&](std::int64_t i, auto at) {
        const V grad = at.load(dy + i);
        of_dy += grad;
        of_dy_x += at.keep(V(grad * (at.load(x + i) + before)));
        at.store(dx + i, V(grad * slope));
      });
      A* const to = parts + (run.n * runs.pieces + item % runs.pieces) * 2 * p.channels + run.channel;
      to[0] = sum_lanes<A>(of_dy), to[p.channels] = sum_lanes<A>(of_dy_x);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> actnorm_bwd(const Tensor& grad_output, OptionalTensor grad_log_det, const Tensor& input, const Tensor& scale,
                                               const Tensor& shift, bool log_scale, bool shift_first, bool inverse) {
  const Problem p("actnorm", input);
  const ScalarType dtype = input.scalar_type(), opmath = opmath_type(dtype);
  FASTGEN_CHECK(sizes_of(grad_output) == sizes_of(input) && grad_output.scalar_type() == dtype,
                "actnorm: grad_output must have the shape and the dtype of input");
  double of_log_det = 0;  // the gradient of sum log |slope|, as of all samples
  if (grad_log_det.has_value()) {
    FASTGEN_CHECK(grad_log_det->dim() == 1 && grad_log_det->size(0) == input.size(0), "actnorm: grad_log_det must be [N]");
    std::vector<double> values(input.size(0));
    Parameter(p.op, "grad_log_det", grad_log_det, false, 0, input.size(0)).read(0, 0, input.size(0), 0.0, values.data());
    for (const double value : values) of_log_det += value;
    of_log_det *= static_cast<double>(p.vectors ? 1 : p.positions);
  }
  Tensor d_input = empty_dense(input, p.channels_last, dtype);
  Tensor d_scale = empty_contiguous({p.channels}, opmath), d_shift = empty_contiguous({p.channels}, opmath);
  dispatch_dtype(p.op, dtype, [&]<class T>() {
    using A = opmath_t<T>;
    Affine<A> affine(p.op, p.channels, scale, shift, log_scale, shift_first, inverse);
    std::vector<double> s(p.channels);
    Parameter(p.op, "scale", scale, false, 0, p.channels).read(0, 0, p.channels, 1.0, s.data());
    Tensor x = input, dy = grad_output;
    Pointers<T> ptr{};
    ptr.x_strides = p.strides(x), ptr.dy_strides = p.strides(dy), ptr.dx_strides = p.strides(d_input);
    ptr.x = static_cast<const T*>(x.data_ptr()), ptr.dy = static_cast<const T*>(dy.data_ptr());
    ptr.dx = static_cast<T*>(d_input.mutable_data_ptr());
    const RowBlocks row_blocks(p, {&ptr.x_strides, &ptr.dy_strides, &ptr.dx_strides});
    const Runs runs(input, p.channels, false, kLongest);
    const SliceBlocks blocks(p.n, p.elements() == 0 ? 0 : p.rows ? row_blocks.a_sample : runs.pieces, false);
    const std::unique_ptr<A[]> parts(new A[blocks.count() * 2 * p.channels]);
    if (blocks.count() > 0 && p.rows) {
      affine.repeat(row_blocks.together);
      backward_rows<T>(p, ptr, row_blocks, affine, parts.get());
    } else if (blocks.count() > 0) {
      backward_planes<T>(p, ptr, runs, affine, parts.get());
    }
    A *const to_scale = static_cast<A*>(d_scale.mutable_data_ptr()), *const to_shift = static_cast<A*>(d_shift.mutable_data_ptr());
    for_columns(blocks, 2, p.channels, parts.get(), [&](std::int64_t first, std::int64_t columns, const auto& totals_of) {
      const ColumnTotals totals = totals_of(0);
      for (std::int64_t i = 0; i < columns; ++i) {
        const std::int64_t c = first + i;
        const double slope = affine.slope[c], sign = inverse ? -1 : 1, of_log = sign * (totals[1][i] * slope + of_log_det);
        to_scale[c] = static_cast<A>(log_scale ? of_log : of_log / s[c]);
        to_shift[c] = static_cast<A>(sign * totals[0][i] * (shift_first != inverse ? slope : 1.0));
      }
    });
  });
  return {d_input, d_scale, d_shift};
}

}  // namespace
}  // namespace fastgen::actnorm

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("actnorm_fwd", TORCH_BOX(&fastgen::actnorm::actnorm_fwd));
  m.impl("actnorm_bwd", TORCH_BOX(&fastgen::actnorm::actnorm_bwd));
}
