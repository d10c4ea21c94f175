// autoregressive_inverse_spline: the same with rational-quadratic splines, one vector of samples of a feature at a time.
#include "autoregressive_inverse.h"
#include "cpu/_spline_definition.h"

namespace fastgen::masked_network {
namespace {

namespace spline = rational_quadratic_spline;

// The inverse of a vector of elements, in and out through memory; adds nothing up.
template <class T, spline::Parametrization kind>
[[gnu::noinline]] void invert_vector(const T* columns, const spline::Form<T>& form, const spline::Box<T>& box, T* y, T* work, T* log) {
  Vec<T> output, log_det;
  spline::values<T, kind, true>(columns, form, box, load(y), work, output, log_det);
  store(y, output), store(log, log_det);
}

// x modulo the size of the box, with the sign of the size as torch has it, less half of it.
template <class T>
FASTGEN_INLINE Vec<T> turned(Vec<T> x, T half) {
  const T size = T(2) * half;
  if (stdx::any_of(stdx::abs(x) >= size)) [[unlikely]]
    x = Vec<T>([&](auto i) { return std::fmod(static_cast<T>(x[i]), size); });
  stdx::where(x < T(0), x) = x + size;
  return x - half;
}

// A Map of autoregressive_inverse.h.
template <class T>
struct Splines {
  spline::Definition& definition;
  bool turn;

  void check(const char* op, const Level& level) const {
    const std::int64_t each = definition.columns;
    FASTGEN_CHECK(level.outputs == each * level.features, op, ": program must have ", each, " outputs a feature");
  }

  std::int64_t scratch() const { return (definition.columns + 2 + 2 * definition.bins) * kWidth<T>; }

  void invert(const T* outputs, std::int64_t features, std::int64_t each, std::int64_t lanes, T* y, double* log_det, T* scratch) const {
    constexpr std::int64_t w = kWidth<T>;
    T *const columns = scratch, *const log = columns + (each + 1) * w, *const work = log + w;
    const auto form = definition.form<T>();
    const auto box = definition.box<T>();
    const auto one = definition.parametrization == spline::Parametrization::kZuko ? invert_vector<T, spline::Parametrization::kZuko>
                                                                                  : invert_vector<T, spline::Parametrization::kNflows>;
    store(columns + each * w, Vec<T>(static_cast<T>(definition.end())));
    for (std::int64_t f = 0; f < features; ++f)
      for (std::int64_t i = 0; i < lanes; i += w) {
        for (std::int64_t c = 0; c < each; ++c) store(columns + c * w, load(outputs + (f * each + c) * lanes + i));
        T* const at = y + f * lanes + i;
        one(columns, form, box, at, work, log);
        if (turn) store(at, turned<T>(load(at), static_cast<T>(definition.numbers[spline::kRight])));
        add<T>(load(log), log_det + i);
      }
  }
};

std::tuple<Tensor, Tensor> autoregressive_inverse_spline(const Tensor& input, const Tensor& program, const Tensor& weights, const Tensor& parameters,
                                                         OptionalTensor constants, std::vector<double> numbers, std::int64_t num_bins,
                                                         std::int64_t derivatives, std::int64_t tails, std::int64_t parametrization, bool turn) {
  const char* const op = "autoregressive_inverse_spline";
  check_input(op, "input", input);
  spline::Definition definition(op, numbers, num_bins, tails, parametrization);
  constexpr std::int64_t kMost = std::int64_t{1} << 24;  // more outputs no program has
  FASTGEN_CHECK(num_bins <= kMost, op, ": num_bins must be at most ", kMost, ", got ", num_bins);
  FASTGEN_CHECK(derivatives >= 0 && derivatives <= kMost && definition.takes(2 * num_bins + derivatives), op, ": derivatives must be ", definition.usual(), ", got ", derivatives);
  FASTGEN_CHECK(!turn || numbers[spline::kLeft] == -numbers[spline::kRight], op, ": turn must have a box of -bound to bound");
  definition.set_derivatives(derivatives);
  return dispatch(op, weights,
                  [&]<class T>() { return invert<T>(op, input, program, weights, parameters, constants, Splines<T>{definition, turn}); });
}

}  // namespace
}  // namespace fastgen::masked_network

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("autoregressive_inverse_spline", TORCH_BOX(&fastgen::masked_network::autoregressive_inverse_spline));
}
