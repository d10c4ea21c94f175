// affine_coupling: y = x s + t or (x + t) s, its inverse, and the sum of log s of every sample; affine_coupling_additive: y = x + t.
//
// A thread owns items of some thousand elements of one sample (affine_coupling.h), reads each number once and writes each result once.
// Sums of log s are made in the dtype of the arithmetic for an item and in fp64 over items, in an order that depends on the shape alone.
#include "cpu/affine_coupling_rows.h"

namespace fastgen::affine_coupling {
namespace {

// What log s is summed from: s itself where that comes first.
template <class A, Form form>
using Logarithm = std::conditional_t<is_direct(form), DirectScale<A>, Vec<A>>;

// The multipliers of n vectors of raw scales, side by side.
template <class A, Form form, int n, class At>
FASTGEN_INLINE void multipliers(const SideBySide<A, n>& raw, const Numbers<A>& numbers, const Besides<A>& beside, std::int64_t i, At at,
                                SideBySide<A, n>& multiplier, Logarithm<A, form> (&logarithm)[n]) {
  using V = Vec<A>;
  if constexpr (is_direct(form)) {
    direct_scales<A, form, false>(raw, numbers, logarithm);
    for (int k = 0; k < n; ++k) multiplier[k] = multiplier_of<A, form>(logarithm[k], numbers);
  } else {
    for (int k = 0; k < n; ++k) {
      const std::int64_t from = i + k * kWidth<A>;
      const V log = log_scale<A, form>(V(raw[k] * numbers.gain), numbers, beside.weight.load(from, at)).value;
      // a multiply-add that is said: the compiler's own depend on what stands around
      multiplier[k] = logarithm[k] = madd<A>(log, V(numbers.power), V(beside.mean.load(from, at) * -numbers.power));
    }
    exp_of_any(multiplier);
  }
}

// Adds the logarithms of n vectors, of which the last may be part of one, to a sum.
template <class A, Form form, int n, class At>
FASTGEN_INLINE void add_to(LogSum<A, form>& sum, const Logarithm<A, form> (&logarithm)[n], At at) {
  if constexpr (std::is_same_v<At, Whole>) {
    sum.add(logarithm);
  } else {
    static_assert(n == 1);
    SideBySide<A, 1> part;
    if constexpr (is_direct(form)) part[0] = at.template keep<A>(log_of<A, form>(logarithm[0]));
    else part[0] = at.template keep<A>(logarithm[0]);
    sum.add(part);
  }
}

template <class A>
FASTGEN_INLINE Vec<A> moved(Vec<A> x, Vec<A> multiplier, Vec<A> t, A shift_gain, bool shift_last) {
  return shift_last ? madd<A>(x, multiplier, Vec<A>(t * shift_gain)) : Vec<A>(madd<A>(t, Vec<A>(shift_gain), x) * multiplier);
}

// Writes y of a strip, and the logarithms of its multipliers or returns their sum.
template <class T, Form form>
opmath_t<T> forward(const Spans<T>& at_, std::int64_t count, const Numbers<opmath_t<T>>& given, const Besides<opmath_t<T>>& besides,
                    opmath_t<T>* values, LogParts<opmath_t<T>>* parts) {
  using A = opmath_t<T>;
  using V = Vec<A>;
  const Spans<T> of = at_;
  const Besides<A> beside = besides;
  const Numbers<A> numbers = given;  // which no store can change
  const A shift_gain = numbers.sign * numbers.gain;
  LogSum<A, form> sum(numbers.eps);
  const auto strip = [&](const auto& take) FASTGEN_LAMBDA {
    for_groups<A>(count, [&]<int n, class At>(std::int64_t i, At at, std::integral_constant<int, n>) FASTGEN_LAMBDA {
      V raw[n], multiplier[n];
      Logarithm<A, form> logarithm[n];
      for (int k = 0; k < n; ++k) raw[k] = at.load(of.raw + i + k * kWidth<A>);
      multipliers<A, form>(raw, numbers, beside, i, at, multiplier, logarithm);
      for (int k = 0; k < n; ++k) {
        const std::int64_t to = i + k * kWidth<A>;
        at.store(of.y + to, moved<A>(at.load(of.x + to), multiplier[k], at.load(of.shift + to), shift_gain, numbers.shift_last));
      }
      take(i, at, logarithm);
    });
  };
  const auto keep = [&]<int n>(std::int64_t i, auto at, const Logarithm<A, form> (&logarithm)[n]) FASTGEN_LAMBDA {
    for (int k = 0; k < n; ++k) {
      A* const to = values + i + k * kWidth<A>;
      if constexpr (is_direct(form)) at.store(to, V(log_of<A, form>(logarithm[k]) * numbers.power));
      else at.store(to, logarithm[k]);
    }
  };
  const auto add = [&]<int n>(std::int64_t, auto at, const Logarithm<A, form> (&logarithm)[n]) FASTGEN_LAMBDA {
    add_to<A, form>(sum, logarithm, at);
  };
  if constexpr (form == Form::kExp && std::is_same_v<T, float>) {  // a loop so short that the question would be seen in it
    if (values) strip(keep);
    else strip(add);
  } else {
    strip([&](std::int64_t i, auto at, const auto& logarithm) FASTGEN_LAMBDA { values ? keep(i, at, logarithm) : add(i, at, logarithm); });
  }
  if (values) return A(0);
  if constexpr (!is_direct(form)) return sum.total();
  if constexpr (!LogSum<A, form>::kProduct) return sum.total() * numbers.power;
  *parts = sum.parts();
  if (sum.is_exact()) [[likely]] return A(0);
  const A exact = sum_vectors<A>(count, [&](std::int64_t i, auto at) {
    return log_of<A, form>(direct_scale<A, form, false>(at.load(of.raw + i), numbers));
  });
  *parts = {V([&](auto lane) { return lane == 0 ? exact : A(0); })};
  return A(0);
}

// The sum of a row's logarithms where their product does not say it.
template <Form form>
[[gnu::noinline]] LogParts<float> rows_exactly(const Rows& rows, std::int64_t n, const Numbers<float>& numbers) {
  float exact = 0;
  const Rows::Row of = rows.row(n);
  if constexpr (is_direct(form))
    for_vectors<float>(rows.count, [&](std::int64_t i, auto at) {
      VecF raw, t;
      rows.take_parameters(of, i, at, raw, t);
      exact += sum_lanes<float>(at.template keep<float>(log_of<float, form>(direct_scale<float, form, false>(raw, numbers))));
    });
  return {VecF([&](auto lane) { return lane == 0 ? exact : 0.0f; })};
}

// Rows [begin, end): y, and the sums of the logarithms.
template <Form form>
void forward_rows(const Rows& given, std::int64_t begin, std::int64_t end, float* sums) {
  constexpr int width = kWidth<float>;
  const Rows rows = given;  // which no store can change
  const Walk<float>& walk = given.walk;
  const Numbers<float> numbers = walk.numbers;
  const Besides<float> beside{walk.weight ? Beside<float>{walk.weight, 0.0f} : Beside<float>{nullptr, numbers.bound}, {}, {}};
  const float shift_gain = numbers.sign * numbers.gain;
  LogParts<float> parts[kWaiting];
  LogSum<float, form> sum[2] = {LogSum<float, form>(numbers.eps), LogSum<float, form>(numbers.eps)};
  for (std::int64_t block = begin; block < end; block += kWaiting) {
    const int some = static_cast<int>(std::min<std::int64_t>(end - block, kWaiting));
    rows.for_groups(block, some, [&]<class At, int vectors, int together>(std::int64_t n, const Rows::Row (&of)[together], std::int64_t i, At at,
                                                                          std::integral_constant<int, vectors>,
                                                                          std::integral_constant<int, together>) FASTGEN_LAMBDA {
      constexpr int each = vectors / together;
      VecF raw[vectors], t[vectors], multiplier[vectors];
      Logarithm<float, form> logarithm[vectors];
      for (int k = 0; k < vectors; ++k) rows.take_parameters(of[k / each], i + k % each * width, at, raw[k], t[k]);
      multipliers<float, form>(raw, numbers, beside, i, at, multiplier, logarithm);
      for (int k = 0; k < vectors; ++k) {
        const std::int64_t from = i + k % each * width;
        VecF chosen, others(0.0f);
        rows.take_features(of[k / each].x, from, at, chosen, others);
        rows.put_features(of[k / each], from, at, moved<float>(chosen, multiplier[k], t[k], shift_gain, numbers.shift_last), others);
      }
      for (int r = 0; r < together; ++r) {
        if (i == 0) sum[r] = LogSum<float, form>(numbers.eps);
        Logarithm<float, form> of_row[each];
        for (int k = 0; k < each; ++k) of_row[k] = logarithm[r * each + k];
        add_to<float, form>(sum[r], of_row, at);
        if (i + each * width < rows.count) continue;  // there is more of the row
        parts[n + r - block] = sum[r].parts();
        if (!sum[r].is_exact()) [[unlikely]] parts[n + r - block] = rows_exactly<form>(given, n + r, numbers);
      }
    });
    for (std::int64_t n = block; n < block + some; ++n) given.copy_rest(n);
    // what is no product has the power in its logarithms
    finish_sums<float, form>(parts, some, is_direct(form) ? numbers.power : 1.0f, sums + block);
  }
}

template <class T>
opmath_t<T> add(const Spans<T>& of, std::int64_t count, const Numbers<opmath_t<T>>& numbers, const Besides<opmath_t<T>>&, opmath_t<T>*,
                LogParts<opmath_t<T>>*) {
  using A = opmath_t<T>;
  for_vectors<A>(count, [&](std::int64_t i, auto at) { at.store(of.y + i, at.load(of.x + i) + at.load(of.shift + i) * numbers.sign); });
  return A(0);
}

std::tuple<Tensor, Tensor> affine_coupling_fwd(const Tensor& input, const Tensor& raw_scale, OptionalTensor shift, OptionalTensor scale_weight,
                                               OptionalTensor indices, std::vector<std::int64_t> codes, double bound, double offset, double eps,
                                               double gain) {
  Problem p("affine_coupling_fwd", input, raw_scale, shift, scale_weight, indices, codes, bound, offset, eps, gain);
  const ScalarType dtype = input.scalar_type();
  Tensor output = empty_dense(input, p.plan.channels_last, dtype), log_det = empty_contiguous({p.plan.n}, opmath_type(dtype));
  dispatch_dtype(p.plan.op, dtype, [&]<class T>() {
    using A = opmath_t<T>;
    A* const total = static_cast<A*>(log_det.mutable_data_ptr());
    if (input.numel() == 0) return void(std::fill_n(total, p.plan.n, A(0)));
    Inputs<T> inputs(p, input, raw_scale, shift);
    Walk<T>& walk = inputs.walk;
    std::vector<A> means;
    Kernel<T> kernel = nullptr;
    dispatch_form(p.scale, p.eps, [&]<Form form>() {
      center<T, form>(walk, p.center, means);
      kernel = forward<T, form>;
      if constexpr (LogSum<A, form>::kProduct) walk.finish = finish_sums<A, form>;
    });
    walk.y = place_of<T>(output, p.plan);
    if constexpr (std::is_same_v<T, float>)
      if (const Rows rows(walk); rows.strip) {
        dispatch_form(p.scale, p.eps, [&]<Form form>() {
          parallel(p.plan.n, p.plan.elements() * kWork, [&](std::int64_t begin, std::int64_t end) { forward_rows<form>(rows, begin, end, total); });
        });
        return;
      }
    const std::int64_t a_sample = p.plan.a_sample;
    const std::unique_ptr<A[]> parts(a_sample > 1 ? new A[p.plan.items()] : nullptr);
    A* const sums = a_sample > 1 ? parts.get() : total;
    parallel(p.plan.items(), p.plan.elements() * kWork, [&](std::int64_t begin, std::int64_t end) {
      std::fill(sums + begin, sums + end, A(0));
      walk.run(begin, end, true, kernel, {sums});
    });
    if (p.center == Center::kNone && a_sample == 1) return;
    for (std::int64_t n = 0; n < p.plan.n; ++n) {
      double sum = 0;
      for (std::int64_t i = n * a_sample; i < (n + 1) * a_sample; ++i) sum += static_cast<double>(sums[i]);
      total[n] = static_cast<A>(p.center == Center::kNone ? sum : 0 * sum);  // NaN where a scale is
    }
  });
  return {output, log_det};
}

Tensor affine_coupling_additive(const Tensor& input, const Tensor& shift, OptionalTensor indices, std::int64_t mask, bool inverse) {
  Plan plan("affine_coupling_additive", input, indices, mask);
  const ScalarType dtype = input.scalar_type();
  FASTGEN_CHECK(sizes_of(shift) == with_channels(input, plan.transformed) && shift.scalar_type() == dtype, plan.op,
                ": shift must be [N, C', *] with C' = ", plan.transformed, ", in the dtype of input");
  Tensor output = empty_dense(input, plan.channels_last, dtype), x = input, t = shift;
  if (input.numel() == 0) return output;
  dispatch_dtype(plan.op, dtype, [&]<class T>() {
    using A = opmath_t<T>;
    Numbers<A> numbers{};
    numbers.sign = inverse ? A(-1) : A(1);
    Walk<T> walk{plan, numbers, 1, {}, {}, {}, {}, {}, {}, {}};
    walk.x = place_of<const T>(x, plan), walk.raw = walk.shift = place_of<const T>(t, plan), walk.y = place_of<T>(output, plan);
    const bool copied = plan.channels == 1 || walk.x.channel == plan.positions;
    plan.cut(1, copied, copied && (plan.transformed == 1 || walk.shift.channel == plan.positions));
    parallel(plan.items(), plan.elements(), [&](std::int64_t begin, std::int64_t end) {
      walk.run(begin, end, true, add<T>, {});
    });
  });
  return output;
}

}  // namespace
}  // namespace fastgen::affine_coupling

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("affine_coupling_fwd", TORCH_BOX(&fastgen::affine_coupling::affine_coupling_fwd));
  m.impl("affine_coupling_additive", TORCH_BOX(&fastgen::affine_coupling::affine_coupling_additive));
}
