// invertible_conv1x1_log_det: log |det W| and, where a gradient is wanted, W^-T, by elimination with the largest pivot of a column, in
// fp64. The matrix is small and stays in the cache: rows in whole vectors, one thread.
//
// With the inverse: Gauss-Jordan in place, a row subtracted from all others, columns put back in their order at the end. Without: from
// the rows below alone, which leaves the same pivots, bit for bit.
#include "invertible_conv1x1.h"

#include <cmath>
#include <limits>
#include <numeric>
#include <utility>

#include "common/scratch.h"

namespace fastgen::invertible_conv1x1 {
namespace {

// A square matrix in rows of whole vectors, zero beyond the last column.
struct Square {
  std::int64_t size, row;
  Scratch<double> values;

  Square(const Parameter& rows, std::int64_t size)
      : size(size), row(tiles::round_up(size, kWidth<double>)), values(std::max<std::int64_t>(size * row, 1)) {
    std::fill_n(values.get(), size * row, 0.0);
    for (std::int64_t i = 0; i < size; ++i) rows.read(i, 0, size, 0.0, at(i));
  }
  double* at(std::int64_t i) const { return values.get() + i * row; }
  bool has_nan() const { return std::isnan(std::accumulate(values.get(), values.get() + size * row, 0.0)); }

  // Row i minus `factor` times row k, from the vector on that holds column `from`.
  void subtract(std::int64_t i, std::int64_t k, double factor, std::int64_t from) const {
    const Vec<double> negative(-factor);
    double *const to = at(i), *const by = at(k);
    for (std::int64_t j = from / kWidth<double> * kWidth<double>; j < row; j += kWidth<double>)
      store(to + j, madd<double>(negative, load(by + j), load(to + j)));
  }
};

// log |det|; the matrix is its inverse afterwards where `invert`, NaN where it is singular.
double eliminate(const Square& a, bool invert) {
  if (a.has_nan()) return std::numeric_limits<double>::quiet_NaN();  // infinities of both signs, too
  std::vector<std::int64_t> swapped(a.size);
  double log_det = 0;
  for (std::int64_t k = 0; k < a.size; ++k) {
    std::int64_t largest = k;
    for (std::int64_t i = k + 1; i < a.size; ++i)
      if (std::abs(a.at(i)[k]) > std::abs(a.at(largest)[k])) largest = i;
    if (largest != k) std::swap_ranges(a.at(k), a.at(k) + a.row, a.at(largest));
    swapped[k] = largest;
    const double pivot = a.at(k)[k];
    log_det += std::log(std::abs(pivot));
    if (pivot == 0) {
      std::fill_n(a.values.get(), a.size * a.row, std::numeric_limits<double>::quiet_NaN());  // there is no inverse
      return log_det;
    }
    if (invert) a.at(k)[k] = 1;
    for (std::int64_t i = invert ? 0 : k + 1; i < a.size; ++i) {
      if (i == k) continue;
      const double factor = a.at(i)[k] / pivot;
      if (invert) a.at(i)[k] = 0;
      a.subtract(i, k, factor, invert ? 0 : k);
    }
    for (std::int64_t j = 0; invert && j < a.size; ++j) a.at(k)[j] /= pivot;
  }
  for (std::int64_t k = a.size - 1; invert && k >= 0; --k) {
    for (std::int64_t i = 0; swapped[k] != k && i < a.size; ++i) std::swap(a.at(i)[k], a.at(i)[swapped[k]]);
  }
  return log_det;
}

std::tuple<Tensor, Tensor> invertible_conv1x1_log_det(const Tensor& weight, OptionalTensor scale, bool log_scale, std::int64_t n,
                                                      std::int64_t positions, bool wide, bool gradient) {
  const char* const op = "invertible_conv1x1";
  check_floating(op, "weight", weight);
  FASTGEN_CHECK(weight.dim() == 2 && weight.size(0) == weight.size(1), "invertible_conv1x1: weight must be [C, C]");
  FASTGEN_CHECK(n >= 0, "invertible_conv1x1: n must not be negative, got ", n);
  const std::int64_t c = weight.size(0);
  const Square matrix(Parameter(op, "weight", weight, true, c, c), c);
  std::vector<double> s(c);
  const Parameter scales(op, "scale", scale, false, 0, c);
  scales.read(0, 0, c, log_scale ? 0.0 : 1.0, s.data());
  double total = eliminate(matrix, gradient);
  for (const double each : s) total += log_scale ? each : std::log(std::abs(each));
  const double factor = static_cast<double>(positions);
  Tensor log_det = empty_contiguous({n}, wide ? ScalarType::Double : ScalarType::Float);
  dispatch_dtype(op, log_det.scalar_type(), [&]<class T>() {
    std::fill_n(static_cast<opmath_t<T>*>(log_det.mutable_data_ptr()), n, static_cast<opmath_t<T>>(total * factor));
  });
  Tensor inverse = empty_contiguous({gradient ? c : 0, gradient ? c : 0}, opmath_type(weight.scalar_type()));
  if (gradient) {
    dispatch_dtype(op, weight.scalar_type(), [&]<class T>() {
      auto* const to = static_cast<opmath_t<T>*>(inverse.mutable_data_ptr());
      for (std::int64_t i = 0; i < c; ++i)
        for (std::int64_t j = 0; j < c; ++j) to[i * c + j] = static_cast<opmath_t<T>>(factor * matrix.at(j)[i]);
    });
  }
  return {log_det, inverse};
}

}  // namespace
}  // namespace fastgen::invertible_conv1x1

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) { m.impl("invertible_conv1x1_log_det", TORCH_BOX(&fastgen::invertible_conv1x1::invertible_conv1x1_log_det)); }
