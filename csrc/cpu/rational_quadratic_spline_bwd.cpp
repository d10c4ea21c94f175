// The backward of rational_quadratic_spline: the parameters are read again, the spline computed again, and the gradients of all of them
// written once, as they lie.
//
// An element has gradients at the two knots of its bin alone: through a softmax they become three numbers, one for the bins below, one for its
// own and one for those above, times the share of each bin.
#include "cpu/rational_quadratic_spline_columns.h"

namespace fastgen::rational_quadratic_spline {
namespace {

// One vector of elements, in and out through memory: compiled once for all dtypes of one arithmetic.
template <class A>
using Block = void (*)(const A* columns, const Form<A>& form, const Box<A>& box, const A* x, const A* dy, const A* dlog, A* work, A* dx);

template <class A, Parametrization kind, bool kInverse, bool kParameters>
[[gnu::noinline]] void block(const A* columns, const Form<A>& form, const Box<A>& box, const A* x, const A* dy, const A* dlog, A* work, A* dx) {
  Vec<A> by_input;
  gradients<A, kind, kInverse, kParameters>(columns, form, box, load(x), load(dy), load(dlog), work, by_input);
  store(dx, by_input);
}

template <class T>
void run(const Problem& p, Block<opmath_t<T>> spline, const Tensor& grad_output, const Tensor& grad_log, Tensor& d_input,
         std::array<Tensor, 3>* d_parameters, const std::array<Lie, 3>& lies) {
  using A = opmath_t<T>;
  constexpr int width = kWidth<A>;
  const Form<A> form = p.form<A>();
  parallel(p.tiles, 2 * p.work(), [&](std::int64_t begin, std::int64_t end) {
    Workspace<A> w(p);
    A *const x = w.row[0], *const dy = w.row[1], *const dlog = w.row[2], *const half = p.bounds.empty() ? nullptr : w.row[3], *const dx = w.row[4];
    for (std::int64_t item = begin; item < end; ++item) {
      const Tile tile(p, item);
      copy_others(p, tile, grad_output, d_input);
      read_row<A>(p, tile, p.input, x);
      read_row<A>(p, tile, grad_output, dy);
      read_log_grads<A>(p, tile, grad_log, dlog);
      if (half != nullptr) read_bounds<A>(p, tile, half);
      for (std::int64_t e = 0; e < tile.count(); e += width) {
        const int count = static_cast<int>(std::min<std::int64_t>(width, tile.count() - e));
        read_parameters<T, A>(p, tile.first + e, count, w.columns);
        spline(w.columns, form, box_of<A>(p, half == nullptr ? half : half + e), x + e, dy + e, dlog + e, w.work, dx + e);
        for (std::int64_t i = 0; i < (d_parameters == nullptr ? 0 : p.count); ++i)
          write_columns<T, A>(static_cast<T*>((*d_parameters)[i].mutable_data_ptr()), lies[i], rows_of<A>(p, lies[i], tile.first + e, count), count,
                              w.work + first_column(p, i) * width);
      }
      write_row<A>(p, tile, d_input, dx);
    }
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> rational_quadratic_spline_bwd(
    const Tensor& grad_output, const Tensor& grad_log_det, const Tensor& input, const Tensor& widths, const OptionalTensor& heights,
    const OptionalTensor& derivatives, const OptionalTensor& mask, const OptionalTensor& bounds, const Numbers& numbers, std::int64_t num_bins,
    std::int64_t tails, std::int64_t parametrization, bool inverse, bool reduce, bool wants_parameters) {
  const Problem p(input, widths, heights, derivatives, mask, bounds, numbers, num_bins, tails, parametrization, inverse, reduce);
  check_floating(kOp, "grad_output", grad_output);
  check_floating(kOp, "grad_log_det", grad_log_det);
  FASTGEN_CHECK(sizes_of(grad_output) == sizes_of(input), kOp, ": grad_output must have the shape of input");
  const bool fits = reduce ? grad_log_det.dim() == 1 && grad_log_det.size(0) == p.n : sizes_of(grad_log_det) == sizes_of(input);
  FASTGEN_CHECK(fits, kOp, ": grad_log_det must be ", reduce ? "one per sample" : "of the shape of input");
  Tensor d_input = empty_dense(input, p.channels_last, input.scalar_type());
  const std::array<const Tensor*, 3> given{&widths, p.packed() ? nullptr : &*heights, p.packed() ? nullptr : &*derivatives};
  std::array<Tensor, 3> d_parameters, written;  // the latter in strides that a Lie can say
  std::array<Lie, 3> lies;
  for (std::int64_t i = 0; i < 3; ++i) {
    const bool wanted = wants_parameters && i < p.count;
    written[i] = d_parameters[i] = wanted ? empty_in_order_of(*given[i]) : empty_contiguous({0}, p.dtype());
    if (wanted) lies[i] = lie_of(written[i], p.positions);
  }
  if (p.n > 0) {
    const Tensor dy = as_dense(grad_output, p.channels_last), dlog = reduce ? grad_log_det : as_dense(grad_log_det, p.channels_last);
    dispatch_dtype(kOp, p.dtype(), [&]<class T>() {
      dispatch_form(p, [&](auto kind, auto way) {
        using A = opmath_t<T>;
        if (wants_parameters) run<T>(p, block<A, kind(), way(), true>, dy, dlog, d_input, &written, lies);
        else run<T>(p, block<A, kind(), way(), false>, dy, dlog, d_input, nullptr, lies);
      });
    });
  }
  for (std::int64_t i = 0; i < 3; ++i)
    if (written[i].data_ptr() != d_parameters[i].data_ptr()) torch::stable::copy_(d_parameters[i], written[i]);
  return {d_input, d_parameters[0], d_parameters[1], d_parameters[2]};
}

}  // namespace fastgen::rational_quadratic_spline

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("rational_quadratic_spline_bwd", TORCH_BOX(&fastgen::rational_quadratic_spline::rational_quadratic_spline_bwd));
}
