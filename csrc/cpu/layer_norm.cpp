// layer_norm, forward: a thread owns whole rows. A row is read once from memory; the statistics (common/moments.h) and the output
// find it, or its sum with the residual, in the first-level cache.
#include "layer_norm.h"

namespace fastgen::layer_norm {
namespace {

constexpr std::int64_t kPiece = 8192;  // elements of a long row whose moments are taken together

template <class T>
Moments row_moments(const T* x, std::int64_t count) {
  Moments moments = quick_moments(x, std::min(kPiece, count));
  for (std::int64_t first = kPiece; first < count; first += kPiece) moments.merge(quick_moments(x + first, std::min(kPiece, count - first)));
  return moments;
}

template <class T>
struct Pointers {
  const T *x, *residual;  // the latter null: nothing is added
  T *y, *sum;
  opmath_t<T> *mean, *rstd;  // null: not wanted
  SliceStrides x_rows, residual_rows;
};

template <class T>
void add_row(const T* x, const T* residual, const opmath_t<T>* gate, T* sum, std::int64_t count) {
  using A = opmath_t<T>;
  if (gate)
    for_vectors<A>(count, [&](std::int64_t i, auto at) { at.store(sum + i, madd<A>(at.load(x + i), at.load(gate + i), at.load(residual + i))); });
  else
    for_vectors<A>(count, [&](std::int64_t i, auto at) { at.store(sum + i, at.load(x + i) + at.load(residual + i)); });
}

template <class T>
void forward(const Problem& p, const Pointers<T>& at_row, double eps) {
  using A = opmath_t<T>;
  using V = Vec<A>;
  const auto [n_samples, tokens, size] = p.sizes;
  parallel(n_samples * tokens, p.sizes.elements(), [&, tokens = tokens, size = size](std::int64_t begin, std::int64_t end) {
    ModulationOfSample<A> modulation(p.modulation, size);
    std::vector<A> gate(p.gate.given() ? size : 0);
    for (std::int64_t row = begin; row < end; ++row) {
      const std::int64_t n = row / tokens, token = row % tokens;
      modulation.seek(n);
      if (p.gate.given() && (row == begin || token == 0)) p.gate.read(n, 0, size, A(1), gate.data());
      const T* x = at_row.x + n * at_row.x_rows.sample + token * at_row.x_rows.apart;
      if (at_row.residual) {
        const T* residual = at_row.residual + n * at_row.residual_rows.sample + token * at_row.residual_rows.apart;
        add_row(x, residual, p.gate.given() ? gate.data() : nullptr, at_row.sum + row * size, size);
        x = at_row.sum + row * size;
      }
      const Moments moments = row_moments(x, size);
      const double r = moments.rstd(eps);
      if (at_row.mean) at_row.mean[row] = static_cast<A>(moments.mean), at_row.rstd[row] = static_cast<A>(r);
      const A centre = static_cast<A>(moments.mean);  // what it rounds off is not lost
      const V m(centre), slope(static_cast<A>(r)), lost(static_cast<A>((static_cast<double>(centre) - moments.mean) * r));
      const A *k = modulation.k(), *b = modulation.b();
      T* const y = at_row.y + row * size;
      for_vectors<A>(size, [&](std::int64_t i, auto at) {
        const V normal = madd<A>(at.load(x + i) - m, slope, lost);
        at.store(y + i, madd<A>(normal, at.load(k + i), at.load(b + i)));
      });
    }
  });
}

// Returns (output, sum) and fills `mean` and `rstd` where they are wanted.
std::tuple<Tensor, Tensor> run(const Tensor& input, const OptionalTensor& residual, const OptionalTensor& gate,
                               const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& scale,
                               const OptionalTensor& shift, double eps, Tensor* mean, Tensor* rstd) {
  const Problem p(input, gate, weight, bias, scale, shift);
  const ScalarType dtype = input.scalar_type();
  FASTGEN_CHECK(!gate.has_value() || residual.has_value(), "layer_norm: gate needs a residual");
  if (residual.has_value()) check_same("residual", *residual, input);
  Tensor output = empty_dense(input, false, dtype), sum = residual.has_value() ? empty_dense(input, false, dtype) : none(dtype);
  if (mean) {
    auto sizes = sizes_of(input);
    sizes.pop_back();
    *mean = empty_contiguous(sizes, opmath_type(dtype)), *rstd = empty_contiguous(sizes, opmath_type(dtype));
  }
  Tensor x = input, added = residual.has_value() ? *residual : input;
  const std::int64_t axis = input.dim() - 1;
  dispatch_dtype("layer_norm", dtype, [&]<class T>() {
    using A = opmath_t<T>;
    A* const m = mean ? static_cast<A*>(mean->mutable_data_ptr()) : nullptr;
    A* const r = rstd ? static_cast<A*>(rstd->mutable_data_ptr()) : nullptr;
    if (p.sizes.elements() == 0) {  // no element has no mean
      if (m) std::fill_n(m, p.sizes.slices(), std::numeric_limits<A>::quiet_NaN());
      if (r) std::fill_n(r, p.sizes.slices(), std::numeric_limits<A>::quiet_NaN());
      return;
    }
    Pointers<T> at{nullptr, nullptr, static_cast<T*>(output.mutable_data_ptr()), nullptr, m, r, as_slices(x, axis, true), {}};
    at.x = static_cast<const T*>(x.data_ptr());
    if (residual.has_value()) {
      at.residual_rows = as_slices(added, axis, true);
      at.residual = static_cast<const T*>(added.data_ptr()), at.sum = static_cast<T*>(sum.mutable_data_ptr());
    }
    forward<T>(p, at, eps);
  });
  return {output, sum};
}

std::tuple<Tensor, Tensor> layer_norm(const Tensor& input, OptionalTensor residual, OptionalTensor gate, OptionalTensor weight,
                                      OptionalTensor bias, OptionalTensor scale, OptionalTensor shift, double eps) {
  return run(input, residual, gate, weight, bias, scale, shift, eps, nullptr, nullptr);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_fwd(const Tensor& input, OptionalTensor residual, OptionalTensor gate,
                                                          OptionalTensor weight, OptionalTensor bias, OptionalTensor scale,
                                                          OptionalTensor shift, double eps) {
  Tensor mean = input, rstd = input;  // to be replaced: a stable tensor cannot be empty
  auto [output, sum] = run(input, residual, gate, weight, bias, scale, shift, eps, &mean, &rstd);
  return {output, sum, mean, rstd};
}

}  // namespace
}  // namespace fastgen::layer_norm

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("layer_norm", TORCH_BOX(&fastgen::layer_norm::layer_norm));
  m.impl("layer_norm_fwd", TORCH_BOX(&fastgen::layer_norm::layer_norm_fwd));
}
