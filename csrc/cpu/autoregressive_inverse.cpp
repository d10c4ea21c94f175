// autoregressive_inverse: the features level by level, each unit of the network once, and the outputs of one level for maps other than
// affine. A thread owns blocks of samples, whose y are replaced by x in place as they become known; log-dets are summed in fp64.
#include "_masked_network.h"
#include "common/scratch.h"

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

// How the features of a level follow from their outputs.
template <class T>
struct Affine {
  Scale scale;
  Numbers<T> numbers;
  bool shift_first, multiply;

  // In place: y of the features, [features][lanes], becomes x. Adds to the log-dets.
  void invert(const T* outputs, std::int64_t features, std::int64_t each, std::int64_t lanes, T* y, double* log_det) const {
    const std::int64_t at_shift = shift_first || each == 1 ? 0 : 1, at_scale = each == 1 ? 0 : 1 - at_shift;
    for (std::int64_t f = 0; f < features; ++f)
      for (std::int64_t i = 0; i < lanes; i += kWidth<T>) {
        const T* const of = outputs + f * each * lanes + i;
        const ScaleAndLog<T> with = scale_of<T>(scale, load(of + at_scale * lanes), numbers);
        const Vec<T> shift = load(of + at_shift * lanes) * numbers.gain, given = load(y + f * lanes + i);
        store(y + f * lanes + i, multiply ? Vec<T>(given * with.s + shift) : Vec<T>((given - shift) / with.s));
        alignas(64) T log_s[kWidth<T>];
        store(log_s, with.log_s);
        for (int k = 0; k < kWidth<T>; ++k) log_det[i + k] += static_cast<double>(log_s[k]);
      }
  }
};

void check_input(const char* op, const char* name, const Tensor& t) {
  check_floating(op, name, t);
  FASTGEN_CHECK(t.dim() == 2, op, ": ", name, " must be [N, D]");
}

std::tuple<Tensor, Tensor> autoregressive_inverse(const Tensor& input, const Tensor& program, const Tensor& weights, const Tensor& parameters,
                                                  OptionalTensor constants, std::int64_t scale, std::vector<double> numbers, bool shift_first,
                                                  bool multiply) {
  const char* const op = "autoregressive_inverse";
  check_input(op, "input", input);
  const std::int64_t samples = input.size(0);
  FASTGEN_CHECK(scale >= 0 && scale <= static_cast<std::int64_t>(Scale::kSoftplus), op, ": scale must be an index of AUTOREGRESSIVE_SCALES, got ", scale);
  FASTGEN_CHECK(numbers.size() == 4 && numbers[0] > 0, op, ": numbers must be bound > 0, offset, eps and gain");
  return dispatch(op, weights, [&]<class T>() {
    const Program p(op, program, weights, parameters, constants, samples);
    p.check_constants(op, constants, samples, weights.scalar_type());
    const Header& h = p.header;
    FASTGEN_CHECK(input.size(1) == h.features, op, ": input must be [N, ", h.features, "]");
    const bool one = static_cast<Scale>(scale) == Scale::kNone;
    for (std::int64_t l = 0; l < h.levels; ++l) {
      const Level& level = p.levels[l];
      FASTGEN_CHECK(level.outputs == 2 * level.features || (one && level.outputs == level.features), op, ": program must have ", one ? 1 : 2,
                    " outputs a feature");
      p.check(op, level);
    }
    const Affine<T> affine{static_cast<Scale>(scale),
                           {static_cast<T>(numbers[0]), static_cast<T>(numbers[1]), static_cast<T>(numbers[2]), static_cast<T>(numbers[3])},
                           shift_first,
                           multiply};
    Tensor output = empty_contiguous({samples, h.features}, input.scalar_type());
    Tensor log_dets = empty_contiguous({samples}, weights.scalar_type());
    const Tensor y = h.features <= 1 || input.stride(1) == 1 ? input : copy_dense(input, false);
    const Blocks<T> blocks(samples, static_cast<std::int64_t>(torch::stable::get_num_threads()));
    dispatch_dtype(op, input.scalar_type(), [&]<class S>() {
      const S* const from = static_cast<const S*>(y.data_ptr());
      S* const to = static_cast<S*>(output.mutable_data_ptr());
      T* const to_log_det = static_cast<T*>(log_dets.mutable_data_ptr());
      const auto place = [&](std::int64_t c) { return p.feature_places[static_cast<std::size_t>(c)]; };
      parallel(blocks.count, samples * weights.numel(), [&](std::int64_t begin, std::int64_t end) {
        const Scratch<T> values(h.rows * kMostVectors * kWidth<T>), made(p.most_outputs * kMostVectors * kWidth<T>);
        for (std::int64_t b = begin; b < end; ++b) {
          const auto block = blocks[b];
          const std::int64_t lanes = block.lanes;
          read_rows<T>(from + block.sample * y.stride(0), y.stride(0), block.samples, h.features, lanes, place, values.get());
          if (h.constants > 0)
            read_rows<T>(static_cast<const T*>(p.constants) + block.sample * h.constants, h.constants, block.samples, h.constants, lanes,
                         [&](std::int64_t c) { return h.features + c; }, values.get());
          double log_det[kMostVectors * kWidth<T>] = {};
          for (std::int64_t l = 0; l < h.levels; ++l) {
            const Level& level = p.levels[l];
            run<T>(p, level, lanes, values.get(), made.get());
            if (level.features > 0)
              affine.invert(made.get(), level.features, level.outputs / level.features, lanes, values.get() + level.feature * lanes, log_det);
          }
          write_rows<T>(values.get(), lanes, block.samples, h.features, place, to + block.sample * h.features, h.features);
          for (std::int64_t i = 0; i < block.samples; ++i) to_log_det[block.sample + i] = static_cast<T>(multiply ? log_det[i] : -log_det[i]);
        }
      });
    });
    return std::tuple(output, log_dets);
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
