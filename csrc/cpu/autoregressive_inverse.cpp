// autoregressive_inverse with affine maps, and the outputs of one level for maps that are neither that nor splines.
#include "autoregressive_inverse.h"

namespace fastgen::masked_network {
namespace {

enum class Scale { kNone, kExp, kTanh, kSoftTanh, kAtan, kSigmoidCentered, kSoftClip, kSigmoid, kSoftplus };  // AUTOREGRESSIVE_SCALES

template <class T>
struct Numbers {
  T bound, offset, eps, gain;
};

template <class T>
struct ScaleAndLog {
  Vec<T> s, log_s;
};

template <class T>
FASTGEN_INLINE Vec<T> log_of_any(Vec<T> s) {  // s >= 0, or not a number
  Vec<T> y = log(s);
  stdx::where(s == T(0), y) = -std::numeric_limits<T>::infinity();
  stdx::where(s == std::numeric_limits<T>::infinity(), y) = s;
  return y;
}

// max(x, 0) + log(1 + e) with e = exp(-|x|); the logarithm of the rounded 1 + e is mended by what the rounding took (Kahan).
template <class T>
FASTGEN_INLINE Vec<T> softplus(Vec<T> x) {
  const Vec<T> e = decay(stdx::abs(x)).power, u = e + T(1), taken = u - T(1);
  Vec<T> rest = log(u) * (e / taken);
  stdx::where(taken == T(0), rest) = e;
  stdx::where(x < T(0), x) = T(0);
  return x + rest;
}

// exp(x) of any x: the square of that of the half where it, or its power of two, leaves the range of normal numbers.
FASTGEN_INLINE VecF exp_of_any(VecF x) {
  VecF y = exp(x);
  const auto far = stdx::abs(x) > 86.0f;
  if (stdx::any_of(far)) [[unlikely]] {
    const VecF half = exp(x * 0.5f);
    stdx::where(far, y) = half * half;
  }
  return y;
}
FASTGEN_INLINE Vec<double> exp_of_any(Vec<double> x) { return exp(x); }

template <class T>
FASTGEN_INLINE ScaleAndLog<T> scale_of(Scale scale, Vec<T> a, const Numbers<T>& n) {
  const auto of_log = [](Vec<T> log_s) { return ScaleAndLog<T>{exp_of_any(log_s), log_s}; };
  const auto with_log = [](Vec<T> s) { return ScaleAndLog<T>{s, log_of_any<T>(s)}; };
  a *= n.gain;
  switch (scale) {
    case Scale::kNone: return {in_all_lanes(T(1)), in_all_lanes(T(0))};
    case Scale::kExp: return of_log(a);
    case Scale::kTanh: return of_log(tanh(a) * n.bound);
    case Scale::kSoftTanh: return of_log(tanh(Vec<T>(a / n.bound)) * n.bound);
    case Scale::kAtan: return of_log(Vec<T>([&](auto i) { return std::atan(static_cast<T>(a[i])); }) * (T(0.636) * n.bound));  // of FrEIA, not 2 / pi
    case Scale::kSigmoidCentered: return of_log(tanh(Vec<T>(a * T(0.5))) * n.bound);
    case Scale::kSoftClip: return of_log(a / (stdx::abs(a / n.bound) + T(1)));
    case Scale::kSigmoid: return with_log(sigmoid_of_any<T>(a + n.offset) + n.eps);
    case Scale::kSoftplus: {
      Vec<T> s = softplus<T>(a) + n.eps;
      stdx::where(s > n.bound, s) = n.bound;
      return with_log(s);
    }
  }
  return {a, a};
}

// A Map of autoregressive_inverse.h.
template <class T>
struct Affine {
  Scale scale;
  Numbers<T> numbers;
  bool shift_first, multiply;

  void check(const char* op, const Level& level) const {
    const bool one = scale == Scale::kNone;
    FASTGEN_CHECK(level.outputs == 2 * level.features || (one && level.outputs == level.features), op, ": program must have ", one ? 1 : 2,
                  " outputs a feature");
  }

  std::int64_t scratch() const { return 0; }

  void invert(const T* outputs, std::int64_t features, std::int64_t each, std::int64_t lanes, T* y, double* log_det, T*) const {
    const std::int64_t at_shift = shift_first || each == 1 ? 0 : 1, at_scale = each == 1 ? 0 : 1 - at_shift;
    for (std::int64_t f = 0; f < features; ++f)
      for (std::int64_t i = 0; i < lanes; i += kWidth<T>) {
        const T* const of = outputs + f * each * lanes + i;
        const ScaleAndLog<T> with = scale_of<T>(scale, load(of + at_scale * lanes), numbers);
        const Vec<T> shift = load(of + at_shift * lanes) * numbers.gain, given = load(y + f * lanes + i);
        store(y + f * lanes + i, multiply ? Vec<T>(given * with.s + shift) : Vec<T>((given - shift) / with.s));
        add<T>(multiply ? with.log_s : Vec<T>(-with.log_s), log_det + i);
      }
  }
};

std::tuple<Tensor, Tensor> autoregressive_inverse(const Tensor& input, const Tensor& program, const Tensor& weights, const Tensor& parameters,
                                                  OptionalTensor constants, std::int64_t scale, std::vector<double> numbers, bool shift_first,
                                                  bool multiply) {
  const char* const op = "autoregressive_inverse";
  check_input(op, "input", input);
  FASTGEN_CHECK(scale >= 0 && scale <= static_cast<std::int64_t>(Scale::kSoftplus), op, ": scale must be an index of AUTOREGRESSIVE_SCALES, got ", scale);
  FASTGEN_CHECK(numbers.size() == 4 && numbers[0] > 0, op, ": numbers must be bound > 0, offset, eps and gain");
  return dispatch(op, weights, [&]<class T>() {
    const Affine<T> affine{static_cast<Scale>(scale),
                           {static_cast<T>(numbers[0]), static_cast<T>(numbers[1]), static_cast<T>(numbers[2]), static_cast<T>(numbers[3])},
                           shift_first,
                           multiply};
    return invert<T>(op, input, program, weights, parameters, constants, affine);
  });
}

Tensor autoregressive_inverse_advance(Tensor state, const Tensor& known, const Tensor& program, const Tensor& weights, const Tensor& parameters,
                                      OptionalTensor constants, std::int64_t level_index, std::int64_t outputs) {
  const char* const op = "autoregressive_inverse_advance";
  check_input(op, "known", known);
  const std::int64_t samples = known.size(0);
  constexpr std::int64_t kLanes = 16;  // LANES of fastgen/reference/_masked_network.py
  return dispatch(op, weights, [&]<class T>() {
    const ScalarType dtype = weights.scalar_type();
    const Program p(op, program, weights, parameters, constants, samples);
    const Header& h = p.header;
    FASTGEN_CHECK(level_index >= 0 && level_index < h.levels, op, ": level must be in [0, ", h.levels, "), got ", level_index);
    const Level& level = p.levels[level_index];
    p.check(op, level);
    if (level_index == 0) p.check_constants(op, constants, samples, dtype);
    FASTGEN_CHECK(outputs == level.outputs, op, ": outputs must be those of the level, ", level.outputs, ", got ", outputs);
    const Level before = level_index == 0 ? Level{} : p.levels[level_index - 1];
    FASTGEN_CHECK(known.size(1) == before.features && known.is_contiguous() && known.scalar_type() == dtype, op,
                  ": known must be contiguous [N, ", before.features, "] in the dtype of weights");
    FASTGEN_CHECK(state.dim() == 1 && state.is_contiguous() && state.scalar_type() == dtype &&
                      state.numel() >= h.rows * ((samples + kLanes - 1) / kLanes * kLanes),
                  op, ": state must be a contiguous vector of the rows of ", samples, " samples in the dtype of weights");
    Tensor output = empty_contiguous({samples, outputs}, dtype);
    const Blocks<T> blocks(samples, 1);  // the same for all levels, whatever the number of threads becomes
    T *const values = static_cast<T*>(state.mutable_data_ptr()), *const to = static_cast<T*>(output.mutable_data_ptr());
    parallel(blocks.count, samples * weights.numel() / std::max<std::int64_t>(h.levels, 1), [&](std::int64_t begin, std::int64_t end) {
      const Scratch<T> made(outputs * kMostVectors * kWidth<T>);
      for (std::int64_t b = begin; b < end; ++b) {
        const auto block = blocks[b];
        T* const rows = values + block.sample * h.rows;
        read_rows<T>(static_cast<const T*>(known.data_ptr()) + block.sample * before.features, before.features, block.samples, before.features,
                     block.lanes, [&](std::int64_t c) { return before.feature + c; }, rows);
        if (level_index == 0 && h.constants > 0)
          read_rows<T>(static_cast<const T*>(p.constants) + block.sample * h.constants, h.constants, block.samples, h.constants, block.lanes,
                       [&](std::int64_t c) { return h.features + c; }, rows);
        run<T>(p, level, block.lanes, rows, made.get());
        write_rows<T>(made.get(), block.lanes, block.samples, outputs, [](std::int64_t c) { return c; }, to + block.sample * outputs, outputs);
      }
    });
    return output;
  });
}

}  // namespace
}  // namespace fastgen::masked_network

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("autoregressive_inverse", TORCH_BOX(&fastgen::masked_network::autoregressive_inverse));
  m.impl("autoregressive_inverse_advance", TORCH_BOX(&fastgen::masked_network::autoregressive_inverse_advance));
}
