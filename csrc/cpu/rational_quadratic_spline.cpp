// rational_quadratic_spline: monotone splines of neural spline flows, both ways, with their log-determinant.
//
// Bound by reading 3 K - 1 parameters an element, once. A thread owns a tile of elements; each vector of them is turned into columns that stay
// in the first cache, where all of the spline is computed. Log-determinants are summed up a sample of a tile at a time, and where a sample has
// several tiles those sums in fp64 in order, so threads change no bit.
#include "cpu/rational_quadratic_spline_columns.h"

namespace fastgen::rational_quadratic_spline {
namespace {

// The sum of some log-determinants, in an order that depends on their number alone.
template <class A>
A sum_of(const A* row, std::int64_t count) {
  if (count >= kWidth<A>) return sum_vectors<A>(count, [&](std::int64_t i, auto at) { return at.load(row + i); });
  A sum(0);
  for (std::int64_t i = 0; i < count; ++i) sum += row[i];
  return sum;
}

// One vector of elements, in and out through memory: compiled once for all dtypes of one arithmetic.
template <class A>
using Block = void (*)(const A* columns, const Form<A>& form, const Box<A>& box, const A* x, A* work, A* y, A* log);

template <class A, Parametrization kind, bool kInverse>
[[gnu::noinline]] void block(const A* columns, const Form<A>& form, const Box<A>& box, const A* x, A* work, A* y, A* log) {
  Vec<A> output, log_det;
  values<A, kind, kInverse>(columns, form, box, load(x), work, output, log_det);
  store(y, output), store(log, log_det);
}

template <class T>
void run(const Problem& p, Block<opmath_t<T>> spline, Tensor& output, Tensor& log_det) {
  using A = opmath_t<T>;
  constexpr int width = kWidth<A>;
  const Form<A> form = p.form<A>();
  const bool in_parts = p.tiles_of_sample > 1;
  std::vector<double> parts(in_parts && p.reduce ? p.tiles : 0);
  A* const sums = static_cast<A*>(log_det.mutable_data_ptr());
  parallel(p.tiles, p.work(), [&](std::int64_t begin, std::int64_t end) {
    Workspace<A> w(p);
    A *const x = w.row[0], *const y = w.row[1], *const log = w.row[2], *const half = p.bounds.empty() ? nullptr : w.row[3];
    for (std::int64_t item = begin; item < end; ++item) {
      const Tile tile(p, item);
      copy_others(p, tile, p.input, output);
      read_row<A>(p, tile, p.input, x);
      if (half != nullptr) read_bounds<A>(p, tile, half);
      for (std::int64_t e = 0; e < tile.count(); e += width) {
        read_parameters<T, A>(p, tile.first + e, static_cast<int>(std::min<std::int64_t>(width, tile.count() - e)), w.columns);
        spline(w.columns, form, box_of<A>(p, half == nullptr ? half : half + e), x + e, w.work, y + e, log + e);
      }
      write_row<A>(p, tile, output, y);
      if (!p.reduce) {
        write_row<A>(p, tile, log_det, log);
        zero_others<A>(p, tile, log_det);
      } else if (in_parts) {
        parts[item] = static_cast<double>(sum_of<A>(log, tile.count()));
      } else {
        for (std::int64_t n = tile.first_sample; n < tile.last_sample; ++n)
          sums[n] = sum_of<A>(log + (n - tile.first_sample) * p.elements, p.elements);
      }
    }
  });
  for (std::int64_t n = 0; n < (parts.empty() ? 0 : p.n); ++n) {
    double sum = 0;
    for (std::int64_t i = 0; i < p.tiles_of_sample; ++i) sum += parts[n * p.tiles_of_sample + i];
    sums[n] = static_cast<A>(sum);
  }
}

}  // namespace

std::tuple<Tensor, Tensor> rational_quadratic_spline_fwd(const Tensor& input, const Tensor& widths, const OptionalTensor& heights,
                                                         const OptionalTensor& derivatives, const OptionalTensor& mask,
                                                         const OptionalTensor& bounds, const Numbers& numbers, std::int64_t num_bins,
                                                         std::int64_t tails, std::int64_t parametrization, bool inverse, bool reduce) {
  const Problem p(input, widths, heights, derivatives, mask, bounds, numbers, num_bins, tails, parametrization, inverse, reduce);
  Tensor output = empty_dense(input, p.channels_last, input.scalar_type());
  const ScalarType wide = opmath_type(input.scalar_type());
  Tensor log_det = reduce ? empty_contiguous({p.n}, wide) : empty_dense(input, p.channels_last, wide);
  if (p.n > 0)
    dispatch_dtype(kOp, p.dtype(), [&]<class T>() {
      dispatch_form(p, [&](auto kind, auto way) { run<T>(p, block<opmath_t<T>, kind(), way()>, output, log_det); });
    });
  return {output, log_det};
}

}  // namespace fastgen::rational_quadratic_spline

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("rational_quadratic_spline_fwd", TORCH_BOX(&fastgen::rational_quadratic_spline::rational_quadratic_spline_fwd));
}
