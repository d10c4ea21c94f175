// The backward of affine_coupling: gradients of the input, of raw scale and shift where they lie, packed or not, and of the weight.
//
// Strips are those of the forward, and the multipliers are worked out again, so that nothing was kept of it. Where the scale has a center
// the mean of the gradients of the logarithms is taken from them, as the center's own gradient says. The gradient of a weight is summed
// by blocks that depend on the shape alone, and over the blocks in fp64 (common/slice_sums.h).
#include "common/slice_sums.h"
#include "cpu/affine_coupling_rows.h"

namespace fastgen::affine_coupling {
namespace {

template <class A>
struct Multiplier {
  Vec<A> value, by_a, by_weight;  // the derivatives are those of log s
};

// Those of n vectors of raw scales, side by side.
template <class A, Form form, int n, class At>
FASTGEN_INLINE void multipliers(const SideBySide<A, n>& raw, const Numbers<A>& numbers, const Besides<A>& beside, std::int64_t i, At at,
                                Multiplier<A> (&multiplier)[n]) {
  using V = Vec<A>;
  if constexpr (is_direct(form)) {
    DirectScale<A> s[n];
    direct_scales<A, form, true>(raw, numbers, s);
    for (int k = 0; k < n; ++k) multiplier[k] = {multiplier_of<A, form>(s[k], numbers), s[k].by_a_over_value, V(A(0))};
  } else {
    V value[n];
    for (int k = 0; k < n; ++k) {
      const std::int64_t from = i + k * kWidth<A>;
      const LogScale<A> log = log_scale<A, form>(V(raw[k] * numbers.gain), numbers, beside.weight.load(from, at));
      multiplier[k].by_a = log.by_a, multiplier[k].by_weight = log.by_weight;
      value[k] = madd<A>(log.value, V(numbers.power), V(beside.mean.load(from, at) * -numbers.power));
    }
    exp_of_any(value);
    for (int k = 0; k < n; ++k) multiplier[k].value = value[k];
  }
}

// The gradients of n elements side by side, of the gradient of their outputs.
template <class A>
struct Gradients {
  Vec<A> input, raw, shift, log;
};
template <class A>
FASTGEN_INLINE Gradients<A> gradients_of(Vec<A> grad, Vec<A> x, Vec<A> shift, const Multiplier<A>& m, Vec<A> added, const Numbers<A>& numbers) {
  using V = Vec<A>;
  const A shift_gain = numbers.sign * numbers.gain, scale_gain = numbers.power * numbers.gain;
  const V input = grad * m.value, along = numbers.shift_last ? x : madd<A>(shift, V(shift_gain), x), log = madd<A>(input, along, added);
  return {input, V(log * m.by_a * scale_gain), V((numbers.shift_last ? grad : input) * shift_gain), log};
}

// Writes the gradients of a strip, and those of the weights as values.
template <class T, Form form>
opmath_t<T> backward(const Spans<T>& at_, std::int64_t count, const Numbers<opmath_t<T>>& given, const Besides<opmath_t<T>>& besides,
                     opmath_t<T>* values, LogParts<opmath_t<T>>*) {
  using A = opmath_t<T>;
  using V = Vec<A>;
  const Spans<T> of = at_;
  const Besides<A> beside = besides;
  const Numbers<A> numbers = given;  // which no store can change
  for_groups<A>(count, [&]<int n, class At>(std::int64_t i, At at, std::integral_constant<int, n>) FASTGEN_LAMBDA {
    V raw[n];
    Multiplier<A> m[n];
    for (int k = 0; k < n; ++k) raw[k] = at.load(of.raw + i + k * kWidth<A>);
    multipliers<A, form>(raw, numbers, beside, i, at, m);
    for (int k = 0; k < n; ++k) {
      const std::int64_t to = i + k * kWidth<A>;
      const Gradients<A> by =
          gradients_of<A>(at.load(of.grad + to), at.load(of.x + to), numbers.shift_last ? V(A(0)) : at.load(of.shift + to), m[k], beside.added.load(to, at), numbers);
      at.store(of.y + to, by.input);
      at.store(of.d_raw + to, by.raw);
      at.store(of.d_shift + to, by.shift);
      if (values) at.store(values + to, V(by.log * m[k].by_weight * numbers.power));
    }
  });
  return A(0);
}

// The gradients of rows [begin, end).
template <Form form>
void backward_rows(const Rows& given, std::int64_t begin, std::int64_t end) {
  constexpr int width = kWidth<float>;
  const Rows rows = given;  // which no store can change
  const Numbers<float> numbers = given.walk.numbers;
  const float* const added = given.walk.added;
  const Besides<float> beside{{nullptr, numbers.bound}, {}, {}};
  rows.for_groups(begin, end - begin, [&]<class At, int vectors, int together>(std::int64_t n, const Rows::Row (&of)[together], std::int64_t i, At at,
                                                                               std::integral_constant<int, vectors>,
                                                                               std::integral_constant<int, together>) FASTGEN_LAMBDA {
    constexpr int each = vectors / together;
    VecF raw[vectors], t[vectors];
    Multiplier<float> m[vectors];
    for (int k = 0; k < vectors; ++k) rows.take_parameters(of[k / each], i + k % each * width, at, raw[k], t[k]);
    multipliers<float, form>(raw, numbers, beside, i, at, m);
    for (int k = 0; k < vectors; ++k) {
      const Rows::Row& row = of[k / each];
      const std::int64_t to = i + k % each * width;
      VecF chosen, unused(0.0f), of_output, others(0.0f);
      rows.take_features(row.x, to, at, chosen, unused);
      rows.take_features(row.grad, to, at, of_output, others);
      const Gradients<float> by = gradients_of<float>(of_output, chosen, t[k], m[k], VecF(added[n + k / each]), numbers);
      rows.put_features(row, to, at, by.input, others);
      if (rows.interleaved) rows.parameters.put(row.d_both + 2 * to, at, by.raw, by.shift);
      else at.store(row.d_raw + to, by.raw), at.store(row.d_shift + to, by.shift);
    }
  });
  for (std::int64_t n = begin; n < end; ++n) given.copy_rest(n);
}

// The gradients of the logarithms alone, as values.
template <class T, Form form>
opmath_t<T> by_logarithms(const Spans<T>& at_, std::int64_t count, const Numbers<opmath_t<T>>& given, const Besides<opmath_t<T>>& besides,
                          opmath_t<T>* values, LogParts<opmath_t<T>>*) {
  using A = opmath_t<T>;
  using V = Vec<A>;
  const Spans<T> of = at_;
  const Besides<A> beside = besides;
  const Numbers<A> numbers = given;  // which no store can change
  for_vectors<A>(count, [&](std::int64_t i, auto at) FASTGEN_LAMBDA {
    const SideBySide<A, 1> raw = {at.load(of.raw + i)};
    Multiplier<A> m[1];
    multipliers<A, form>(raw, numbers, beside, i, at, m);
    const Gradients<A> by = gradients_of<A>(at.load(of.grad + i), at.load(of.x + i), at.load(of.shift + i), m[0], V(A(0)), numbers);
    at.store(values + i, by.log);
  });
  return A(0);
}

// Items in blocks, each of which adds up the gradients of the weights, [C'].
struct WeightBlocks {
  SliceBlocks blocks;
  std::int64_t size;

  explicit WeightBlocks(const Plan& plan, std::int64_t size = kBlockSlices)
      : blocks(1, (plan.items() + size - 1) / size, false), size(size) {}
};

std::tuple<Tensor, Tensor, Tensor, Tensor> affine_coupling_bwd(const Tensor& grad_output, const Tensor& grad_log_det, const Tensor& input,
                                                               const Tensor& raw_scale, OptionalTensor shift, OptionalTensor scale_weight,
                                                               OptionalTensor indices, std::vector<std::int64_t> codes, double bound,
                                                               double offset, double eps, double gain) {
  Problem p("affine_coupling_bwd", input, raw_scale, shift, scale_weight, indices, codes, bound, offset, eps, gain);
  const ScalarType dtype = input.scalar_type();
  FASTGEN_CHECK(sizes_of(grad_output) == sizes_of(input) && grad_output.scalar_type() == dtype, p.plan.op,
                ": grad_output must have the shape and dtype of input");
  const Parameter of_log_det(p.plan.op, "grad_log_det", grad_log_det, false, p.plan.n, p.plan.n);
  Tensor d_input = empty_dense(input, p.plan.channels_last, dtype), d_raw = empty_dense(raw_scale, p.plan.channels_last, dtype);
  Tensor d_shift = p.packed ? empty_contiguous({0}, dtype) : empty_dense(*shift, p.plan.channels_last, dtype);
  Tensor d_weight = empty_contiguous({p.weight.given() ? p.plan.transformed : 0}, opmath_type(dtype));
  dispatch_dtype(p.plan.op, dtype, [&]<class T>() {
    using A = opmath_t<T>;
    A* const by_weight = static_cast<A*>(d_weight.mutable_data_ptr());
    if (input.numel() == 0) return void(std::fill_n(by_weight, d_weight.numel(), A(0)));
    Inputs<T> inputs(p, input, raw_scale, shift, &grad_output);
    Walk<T>& walk = inputs.walk;
    std::vector<A> means, added(p.plan.n);
    Kernel<T> kernel = nullptr, logarithms = nullptr;
    dispatch_form(p.scale, p.eps, [&]<Form form>() {
      center<T, form>(walk, p.center, means);
      kernel = backward<T, form>;
      if constexpr (!is_direct(form)) logarithms = by_logarithms<T, form>;
    });
    of_log_det.read(0, 0, p.plan.n, A(0), added.data());
    if (p.center != Center::kNone) {
      added = means_of<T>(walk, p.center, logarithms);
      for (A& mean : added) mean = -mean;
    }
    walk.added = added.data();
    walk.y = place_of<T>(d_input, p.plan);
    if (p.packed) {
      unpack(place_of<T>(d_raw, p.plan), p, walk.d_raw, walk.d_shift);
    } else {
      walk.d_raw = place_of<T>(d_raw, p.plan), walk.d_shift = place_of<T>(d_shift, p.plan);
    }
    const std::int64_t work = p.plan.elements() * kWork;
    if constexpr (std::is_same_v<T, float>)
      if (const Rows rows(walk); rows.strip && !p.weight.given()) {
        dispatch_form(p.scale, p.eps, [&]<Form form>() {
          parallel(p.plan.n, work, [&](std::int64_t begin, std::int64_t end) { backward_rows<form>(rows, begin, end); });
        });
        return;
      }
    if (!p.weight.given()) {
      parallel(p.plan.items(), work, [&](std::int64_t begin, std::int64_t end) { walk.run(begin, end, true, kernel, {}); });
      return;
    }
    const WeightBlocks blocks(p.plan);
    const std::unique_ptr<A[]> parts(new A[blocks.blocks.count() * p.plan.transformed]);
    parallel(blocks.blocks.count(), work, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t block = begin; block < end; ++block) {
        A* const sums = parts.get() + block * p.plan.transformed;
        std::fill_n(sums, p.plan.transformed, A(0));
        const auto add = [&](std::int64_t, std::int64_t, const Strip& s, const A* values) {
          if (p.plan.rows) {
            for (std::int64_t i = 0; i < s.count; ++i) sums[s.raw + i] += values[i];
          } else {
            sums[s.raw] += sum_vectors<A>(s.count, [&](std::int64_t i, auto at) { return at.load(values + i); });
          }
        };
        walk.run(block * blocks.size, std::min((block + 1) * blocks.size, p.plan.items()), true, kernel, {nullptr, add});
      }
    });
    for_columns(blocks.blocks, 1, p.plan.transformed, parts.get(), [&](std::int64_t first, std::int64_t columns, const auto& totals_of) {
      const ColumnTotals totals = totals_of(0);
      for (std::int64_t c = 0; c < columns; ++c) by_weight[first + c] = static_cast<A>(totals[0][c]);
    });
  });
  return {d_input, d_raw, d_shift, d_weight};
}

}  // namespace
}  // namespace fastgen::affine_coupling

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("affine_coupling_bwd", TORCH_BOX(&fastgen::affine_coupling::affine_coupling_bwd));
}
