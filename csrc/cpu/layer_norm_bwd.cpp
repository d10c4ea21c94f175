// layer_norm, backward, of s = gate branch + residual and y = (x^ w + bias) (1 + scale) + shift, x^ = (s - mean) rstd:
//
//   ds = rstd (k dy - mean(k dy) - x^ mean(k dy x^)) + grad_sum,  k = w (1 + scale)
//
// and every gradient of a small tensor is made of three sums over the tokens of a sample, or over all where none is the sample's own:
// dy, dy x^ and ds branch. A thread owns blocks of rows, whose sums are taken in fp32 and added in fp64 in a fixed order; blocks depend
// on the shape alone. kTogether rows go through their first pass side by side, so that sums and k are loaded once for all of them.
#include <memory>

#include "common/slice_sums.h"
#include "layer_norm.h"

namespace fastgen::layer_norm {
namespace {

constexpr int kTogether = 2;

template <class T>
struct Pointers {
  const T *dy, *d_sum, *s, *branch;  // d_sum and branch may be null
  SliceStrides dy_rows, d_sum_rows, s_rows, branch_rows;
  const opmath_t<T> *mean, *rstd;
  T *ds, *d_branch;
};

template <class A>
struct Row {
  A mean, rstd, mean_dx, mean_dx_x;  // the latter of k dy and of k dy x^
};

// The first pass over `kRows` rows: their means, and what they add to the sums of dy and dy x^.
template <class T, int kRows>
void take_sums(const T* const* dy, const T* const* s, const opmath_t<T>* k, opmath_t<T>* dy_sum, opmath_t<T>* dy_x_sum, std::int64_t size,
               Row<opmath_t<T>>* rows) {
  using A = opmath_t<T>;
  using V = Vec<A>;
  V dx_total[kRows], dx_x_total[kRows];
  for (int j = 0; j < kRows; ++j) dx_total[j] = dx_x_total[j] = V(A(0));
  for_vectors<A>(size, [&](std::int64_t i, auto at) {
    const V slope = at.load(k + i);
    V a = at.load(dy_sum + i), b = at.load(dy_x_sum + i);
    for (int j = 0; j < kRows; ++j) {
      const V d = at.load(dy[j] + i), x = at.keep(V((at.load(s[j] + i) - rows[j].mean) * rows[j].rstd)), dx = d * slope;
      a += d, b = madd<A>(d, x, b);
      dx_total[j] += dx, dx_x_total[j] = madd<A>(dx, x, dx_x_total[j]);
    }
    at.store(dy_sum + i, a), at.store(dy_x_sum + i, b);
  });
  for (int j = 0; j < kRows; ++j)
    rows[j].mean_dx = sum_lanes<A>(dx_total[j]) / static_cast<A>(size), rows[j].mean_dx_x = sum_lanes<A>(dx_x_total[j]) / static_cast<A>(size);
}

// The second pass over a row: ds, and with a gate the gradient of the branch and what the row adds to the sum of ds branch. What lies
// `ahead` elements further on is read next, in an order that no prefetcher foresees.
template <class T>
void finish_row(const T* dy, const T* s, const T* d_sum, const T* branch, const opmath_t<T>* k, const opmath_t<T>* gate, const Row<opmath_t<T>>& row,
                T* ds, T* d_branch, opmath_t<T>* gate_sum, std::int64_t size, std::int64_t ahead) {
  using A = opmath_t<T>;
  using V = Vec<A>;
  const V m(row.mean), r(row.rstd), mean_dx(row.mean_dx), mean_dx_x(row.mean_dx_x);
  for_vectors<A>(size, [&](std::int64_t i, auto at) {
    prefetch(dy + i + ahead), prefetch(s + i + ahead), prefetch_to_write(ds + i + ahead);
    const V x = (at.load(s + i) - m) * r;
    V d = madd<A>(at.load(dy + i), at.load(k + i), -madd<A>(x, mean_dx_x, mean_dx)) * r;
    if (d_sum) d += at.load(d_sum + i);
    at.store(ds + i, d);
    if (!gate) return;
    at.store(d_branch + i, V(d * at.load(gate + i)));
    at.store(gate_sum + i, madd<A>(d, at.load(branch + i), at.load(gate_sum + i)));
  });
}

// `parts`: the sums of each block, [blocks, sums, size].
template <class T>
void rows_backward(const Problem& p, const Pointers<T>& at, const SliceBlocks& blocks, std::int64_t sums, opmath_t<T>* parts) {
  using A = opmath_t<T>;
  const std::int64_t tokens = p.sizes.count, size = p.sizes.size;
  const auto row_of = [&](const T* t, const SliceStrides& strides, std::int64_t row) {
    return t ? t + row / tokens * strides.sample + row % tokens * strides.apart : nullptr;
  };
  parallel(blocks.count(), p.sizes.elements(), [&](std::int64_t begin, std::int64_t end) {
    ModulationOfSample<A> modulation(p.modulation, size);
    std::vector<A> gate(p.gate.given() ? size : 0);
    for (std::int64_t item = begin; item < end; ++item) {
      const auto [group, first, last] = blocks[item];
      A* const part = parts + item * sums * size;
      std::fill_n(part, sums * size, A(0));
      modulation.seek(group);
      if (p.gate.given()) p.gate.read(group, 0, size, A(1), gate.data());
      const auto take = [&]<int kRows>(std::integral_constant<int, kRows>, std::int64_t row) {
        const T *dy[kRows], *s[kRows];
        Row<A> rows[kRows];
        for (int j = 0; j < kRows; ++j) {
          dy[j] = row_of(at.dy, at.dy_rows, row + j), s[j] = row_of(at.s, at.s_rows, row + j);
          rows[j].mean = at.mean[row + j], rows[j].rstd = at.rstd[row + j];
        }
        take_sums<T, kRows>(dy, s, modulation.k(), part, part + size, size, rows);
        for (int j = 0; j < kRows; ++j)
          finish_row<T>(dy[j], s[j], row_of(at.d_sum, at.d_sum_rows, row + j), row_of(at.branch, at.branch_rows, row + j), modulation.k(),
                        p.gate.given() ? gate.data() : nullptr, rows[j], at.ds + (row + j) * size, at.d_branch + (row + j) * size,
                        part + 2 * size, size, kRows * size);
      };
      std::int64_t row = first;
      for (; row + kTogether <= last; row += kTogether) take(std::integral_constant<int, kTogether>{}, row);
      for (; row < last; ++row) take(std::integral_constant<int, 1>{}, row);
    }
  });
}

// Where the gradients of the small tensors go; null where they are not wanted.
template <class A>
struct SmallGradients {
  A *weight, *bias, *scale, *shift, *gate;
};

template <class A>
void small_gradients(const Problem& p, const SliceBlocks& blocks, std::int64_t sums, const A* parts, const SmallGradients<A>& to) {
  const std::int64_t size = p.sizes.size;
  for_columns(blocks, sums, size, parts, [&](std::int64_t first, std::int64_t columns, const auto& totals_of) {
    double d_weight[kColumns] = {}, d_bias[kColumns] = {};
    A weight[kColumns], bias[kColumns], scale[kColumns];
    p.modulation.weight.read(0, first, columns, A(1), weight);
    p.modulation.bias.read(0, first, columns, A(0), bias);
    for (std::int64_t group = 0; group < blocks.groups; ++group) {
      const ColumnTotals totals = totals_of(group);
      p.modulation.scale.read(group, first, columns, A(0), scale);
      for (std::int64_t c = 0; c < columns; ++c) {
        const std::int64_t at = group * size + first + c;
        const double modulation = 1.0 + scale[c], dy = totals[0][c], dy_x = totals[1][c];
        d_weight[c] += modulation * dy_x, d_bias[c] += modulation * dy;
        if (to.scale) to.scale[at] = static_cast<A>(weight[c] * dy_x + bias[c] * dy), to.shift[at] = static_cast<A>(dy);
        if (to.gate) to.gate[at] = static_cast<A>(totals[2][c]);
      }
    }
    for (std::int64_t c = 0; c < columns; ++c) to.weight[first + c] = static_cast<A>(d_weight[c]), to.bias[first + c] = static_cast<A>(d_bias[c]);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> layer_norm_bwd(
    const Tensor& grad_output, OptionalTensor grad_sum, const Tensor& normalized, const Tensor& mean, const Tensor& rstd,
    OptionalTensor branch, OptionalTensor gate, OptionalTensor weight, OptionalTensor bias, OptionalTensor scale, OptionalTensor shift) {
  const Problem p(normalized, gate, weight, bias, scale, shift);
  const ScalarType dtype = normalized.scalar_type(), opmath = opmath_type(dtype);
  check_same("grad_output", grad_output, normalized);
  if (grad_sum.has_value()) check_same("grad_sum", *grad_sum, normalized);
  FASTGEN_CHECK(gate.has_value() == branch.has_value(), "layer_norm: gate and branch come together");
  if (branch.has_value()) check_same("branch", *branch, normalized);
  auto statistics = sizes_of(normalized);
  statistics.pop_back();
  for (const Tensor* t : {&mean, &rstd})
    FASTGEN_CHECK(sizes_of(*t) == statistics && t->scalar_type() == opmath, "layer_norm: mean and rstd must be those of the forward");

  Tensor ds = empty_dense(normalized, false, dtype), d_branch = gate.has_value() ? empty_dense(normalized, false, dtype) : none(dtype);
  const auto per_sample = [&](bool wanted) { return wanted ? empty_contiguous({p.sizes.n, p.sizes.size}, opmath) : none(opmath); };
  Tensor d_weight = empty_contiguous({p.sizes.size}, opmath), d_bias = empty_contiguous({p.sizes.size}, opmath);
  const bool modulated = scale.has_value() || shift.has_value();
  Tensor d_gate = per_sample(gate.has_value()), d_scale = per_sample(modulated), d_shift = per_sample(modulated);
  std::vector<Tensor> kept;  // the rows that are read, dense copies of those that lie otherwise among them
  kept.reserve(4);
  const std::int64_t axis = normalized.dim() - 1;
  dispatch_dtype("layer_norm", dtype, [&]<class T>() {
    using A = opmath_t<T>;
    const auto rows = [&](const Tensor& t, const T*& data, SliceStrides& strides) {
      kept.push_back(t);
      strides = as_slices(kept.back(), axis, true);
      data = static_cast<const T*>(kept.back().data_ptr());
    };
    const auto data = [](Tensor& t) { return t.numel() ? static_cast<A*>(t.mutable_data_ptr()) : nullptr; };
    const SmallGradients<A> small{data(d_weight), data(d_bias), data(d_scale), data(d_shift), data(d_gate)};
    if (p.sizes.elements() == 0) {  // no element contributes nothing
      for (Tensor* t : {&d_weight, &d_bias, &d_gate, &d_scale, &d_shift}) std::fill_n(static_cast<A*>(t->mutable_data_ptr()), t->numel(), A(0));
      return;
    }
    const Tensor mean_dense = as_dense(mean, false), rstd_dense = as_dense(rstd, false);
    Pointers<T> at{};
    at.mean = static_cast<const A*>(mean_dense.data_ptr()), at.rstd = static_cast<const A*>(rstd_dense.data_ptr());
    at.ds = static_cast<T*>(ds.mutable_data_ptr());
    rows(grad_output, at.dy, at.dy_rows);
    rows(normalized, at.s, at.s_rows);
    if (grad_sum.has_value()) rows(*grad_sum, at.d_sum, at.d_sum_rows);
    if (gate.has_value()) rows(*branch, at.branch, at.branch_rows), at.d_branch = static_cast<T*>(d_branch.mutable_data_ptr());
    const SliceBlocks blocks(p.sizes, p.modulation.by_sample() || p.gate.given(), kTogether);
    const std::int64_t sums = gate.has_value() ? 3 : 2;
    const std::unique_ptr<A[]> parts(new A[blocks.count() * sums * p.sizes.size]);
    rows_backward<T>(p, at, blocks, sums, parts.get());
    small_gradients<A>(p, blocks, sums, parts.get(), small);
  });
  return {ds, d_branch, d_gate, d_weight, d_bias, d_scale, d_shift};
}

}  // namespace
}  // namespace fastgen::layer_norm

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) { m.impl("layer_norm_bwd", TORCH_BOX(&fastgen::layer_norm::layer_norm_bwd)); }
