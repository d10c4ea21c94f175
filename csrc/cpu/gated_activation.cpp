// gated_activation: act(a + c_a) sigmoid(b + c_b), a and b the halves of the channels, and its backward.
//
// A thread owns runs of a with those of b beside them (common/runs.h), reads each once and writes each result once. A condition is a
// number a channel, which a run of positions holds in a register, or it lies beside the input. The gradient of one a channel is summed
// by blocks that depend on the shape alone, in the dtype of the arithmetic, and over the blocks in fp64 (common/slice_sums.h).
#include <memory>

#include "common/runs.h"
#include "common/slice_sums.h"

namespace fastgen::gated_activation {
namespace {

// In the order of GATED_ACTIVATIONS of fastgen/_schema.py.
enum class Activation { kTanh, kIdentity };

constexpr std::int64_t kLongest = 1024;  // positions of a run: 128 additions to each lane of a sum in fp32
constexpr std::int64_t kWork = 4;        // two exponentials and a division are as much work as so many elements of a light operation

// In one fraction: one division.
template <class A, Activation kind>
FASTGEN_INLINE Vec<A> gated(Vec<A> a, Vec<A> b) {
  if constexpr (kind == Activation::kIdentity) {
    return a * sigmoid_of_any<A>(b);
  } else {
    const Vec<A> d = decay(stdx::abs(a) * A(2)).less_one, e = decay(stdx::abs(b)).power;
    Vec<A> over = stdx::copysign(d, a);
    stdx::where(b < A(0), over) = over * e;
    return over * reciprocal(Vec<A>((d + A(2)) * (e + A(1))));
  }
}

template <class A>
struct Gradients {
  Vec<A> a, b;
};

template <class A, Activation kind>
FASTGEN_INLINE Gradients<A> gradients(Vec<A> grad, Vec<A> a, Vec<A> b) {
  const WithSlope<A> sigma = sigmoid_with_slope<A>(b);
  if constexpr (kind == Activation::kIdentity) return {grad * sigma.value, grad * a * sigma.slope};
  const WithSlope<A> t = tanh_with_slope<A>(a);
  return {grad * t.slope * sigma.value, grad * t.value * sigma.slope};
}

struct Problem {
  const char* op;
  std::int64_t channels;
  bool channels_last, rows;
  bool beside;                // the condition is one a position
  Parameter of_channel;       // else one a channel, or none
  const Tensor* condition = nullptr;
  Runs runs;

  Problem(const char* op, const Tensor& input, const OptionalTensor& given, std::int64_t activation)
      : op(op), channels(channels_of(op, input)), channels_last(is_channels_last(input)), rows(in_rows(input)),
        beside(given.has_value() && given->dim() != 2),
        of_channel(op, "condition", beside ? OptionalTensor() : given, true, input.size(0), 2 * channels),
        runs(input, channels, rows, kLongest) {
    FASTGEN_CHECK(activation == 0 || activation == 1, op, ": activation must be 0 (tanh) or 1 (identity), got ", activation);
    if (!beside) return;
    condition = &*given;
    check_floating(op, "condition", *condition);
    FASTGEN_CHECK(sizes_of(*condition) == sizes_of(input), op, ": condition must be [N, 2 C], or have the shape of input");
  }

 private:
  static std::int64_t channels_of(const char* op, const Tensor& t) {
    check_floating(op, "input", t);
    FASTGEN_CHECK(t.dim() >= 2 && t.size(1) % 2 == 0 && t.size(1) >= 2, op, ": input must be [N, 2 C, *] with C >= 1");
    return t.size(1) / 2;
  }
};

// A tensor of the call in runs; a dense copy of it where it does not lie so, or in `dtype` where that is another.
template <class T>
struct Operand {
  Tensor tensor;
  SliceStrides strides;

  Operand(const Tensor& t, const Problem& p, ScalarType dtype) : tensor(t) {
    if (t.scalar_type() != dtype) tensor = empty_dense(t, p.channels_last, dtype), torch::stable::copy_(tensor, t);
    strides = as_slices(tensor, 1, p.rows);
  }
  const T* at(const Run& run) const { return static_cast<const T*>(tensor.data_ptr()) + run.offset(strides); }
  std::int64_t half(std::int64_t channels) const { return channels * strides.along; }
};

// The numbers of a sample, [2 C], in the dtype of the arithmetic; zeros where there is no condition.
template <class A>
class OfChannel {
 public:
  explicit OfChannel(const Problem& p) : p_(p), values_(2 * p.channels) {}

  const A* of_sample(std::int64_t n) {
    if (n != sample_ && (sample_ < 0 || p_.of_channel.given())) p_.of_channel.read(n, 0, 2 * p_.channels, A(0), values_.data());
    sample_ = n;
    return values_.data();
  }

 private:
  const Problem& p_;
  std::vector<A> values_;
  std::int64_t sample_ = -1;
};

// What is added to a and b of a run: two numbers, or what stands beside them.
template <class A>
struct Numbers {
  Vec<A> to_a, to_b;
  template <class At>
  FASTGEN_INLINE Vec<A> a(std::int64_t, At) const { return to_a; }
  template <class At>
  FASTGEN_INLINE Vec<A> b(std::int64_t, At) const { return to_b; }
};
template <class Q>
struct Beside {
  const Q *to_a, *to_b;
  template <class At>
  FASTGEN_INLINE auto a(std::int64_t i, At at) const { return at.load(to_a + i); }
  template <class At>
  FASTGEN_INLINE auto b(std::int64_t i, At at) const { return at.load(to_b + i); }
};

// Calls f(run, condition) for runs [begin, end), the condition of each as it is stored.
template <class T>
class Conditions {
 public:
  using A = opmath_t<T>;

  Conditions(const Problem& p, ScalarType dtype) : p_(p) {
    if (!p.beside) return;
    if constexpr (!std::is_same_v<T, A>)
      if (p.condition->scalar_type() != dtype) wide_.emplace(*p.condition, p, opmath_type(dtype));
    if (!wide_) same_.emplace(*p.condition, p, dtype);
  }

  template <class F>
  void for_runs(std::int64_t begin, std::int64_t end, const F& f) const {
    if (same_) return from_memory(*same_, begin, end, f);
    if constexpr (!std::is_same_v<T, A>)
      if (wide_) return from_memory(*wide_, begin, end, f);
    if (p_.rows) for_rows(begin, end, f);
    else for_planes(begin, end, f);
  }

  // The same where there is no condition beside the input, and of one kind of runs alone.
  template <class F>
  void for_rows(std::int64_t begin, std::int64_t end, const F& f) const {
    for_numbers(begin, end, [&](std::int64_t i, const Run& run, const A* c) { f(i, run, Beside<A>{c, c + p_.channels}); });
  }
  template <class F>
  void for_planes(std::int64_t begin, std::int64_t end, const F& f) const {
    for_numbers(begin, end, [&](std::int64_t i, const Run& run, const A* c) {
      f(i, run, Numbers<A>{Vec<A>(c[run.channel]), Vec<A>(c[p_.channels + run.channel])});
    });
  }

 private:
  template <class F>
  void for_numbers(std::int64_t begin, std::int64_t end, const F& f) const {
    OfChannel<A> numbers(p_);
    for (std::int64_t i = begin; i < end; ++i) {
      const Run run = p_.runs[i];
      f(i, run, numbers.of_sample(run.n));
    }
  }

  template <class Q, class F>
  void from_memory(const Operand<Q>& condition, std::int64_t begin, std::int64_t end, const F& f) const {
    for (std::int64_t i = begin; i < end; ++i) {
      const Run run = p_.runs[i];
      const Q* const c = condition.at(run);
      f(i, run, Beside<Q>{c, c + condition.half(p_.channels)});
    }
  }

  const Problem& p_;
  std::optional<Operand<T>> same_;
  std::optional<Operand<A>> wide_;
};

// Calls f.template operator()<T, kind>().
template <class F>
void dispatch(const Problem& p, ScalarType dtype, std::int64_t activation, const F& f) {
  dispatch_dtype(p.op, dtype, [&]<class T>() {
    if (activation == 0) f.template operator()<T, Activation::kTanh>();
    else f.template operator()<T, Activation::kIdentity>();
  });
}

Tensor gated_activation_fwd(const Tensor& input, OptionalTensor condition, std::int64_t activation) {
  const Problem p("gated_activation_fwd", input, condition, activation);
  const ScalarType dtype = input.scalar_type();
  const auto sizes = with_channels(input, p.channels);
  Tensor output = empty_strided(sizes, dense_strides(sizes, p.channels_last), dtype);
  if (output.numel() == 0) return output;
  dispatch(p, dtype, activation, [&]<class T, Activation kind>() {
    using A = opmath_t<T>;
    const Operand<T> x(input, p, dtype);
    const Conditions<T> conditions(p, dtype);
    const SliceStrides out_strides = as_slices(output, 1, p.rows);
    T* const out = static_cast<T*>(output.mutable_data_ptr());
    const std::int64_t half = x.half(p.channels);
    parallel(p.runs.count(), p.runs.elements() * kWork, [&](std::int64_t begin, std::int64_t end) {
      conditions.for_runs(begin, end, [&](std::int64_t, const Run& run, const auto& add) {
        const T* const a = x.at(run);
        T* const to = out + run.offset(out_strides);
        for_vectors<A>(run.count, [&](std::int64_t i, auto at) {
          at.store(to + i, gated<A, kind>(at.load(a + i) + add.a(i, at), at.load(a + half + i) + add.b(i, at)));
        });
      });
    });
  });
  return output;
}

std::tuple<Tensor, Tensor> gated_activation_bwd(const Tensor& grad_output, const Tensor& input, OptionalTensor condition,
                                                std::int64_t activation) {
  const Problem p("gated_activation_bwd", input, condition, activation);
  const ScalarType dtype = input.scalar_type(), opmath = opmath_type(dtype);
  FASTGEN_CHECK(sizes_of(grad_output) == with_channels(input, p.channels) && grad_output.scalar_type() == dtype, p.op,
                ": grad_output must be [N, C, *] in the dtype of input");
  Tensor d_input = empty_dense(input, p.channels_last, dtype);
  const bool sums = p.of_channel.given() || (condition.has_value() && !p.beside);
  Tensor d_condition = empty_contiguous(sums ? std::vector{p.runs.n, 2 * p.channels} : std::vector<std::int64_t>{0}, opmath);
  dispatch(p, dtype, activation, [&]<class T, Activation kind>() {
    using A = opmath_t<T>;
    if (input.numel() == 0) {  // no element contributes nothing
      std::fill_n(static_cast<A*>(d_condition.mutable_data_ptr()), d_condition.numel(), A(0));
      return;
    }
    const Operand<T> x(input, p, dtype), dy(grad_output, p, dtype);
    const Conditions<T> conditions(p, dtype);
    const SliceStrides to_strides = as_slices(d_input, 1, p.rows);
    T* const d_x = static_cast<T*>(d_input.mutable_data_ptr());
    const std::int64_t half = x.half(p.channels), to_half = p.channels * to_strides.along;
    const SliceBlocks blocks = p.rows ? SliceBlocks(SliceSizes(input, 1), true, 1) : SliceBlocks(p.runs.n, p.runs.pieces, true);
    const std::unique_ptr<A[]> parts(sums ? new A[blocks.count() * 2 * p.channels] : nullptr);

    // The gradients of one run; total(i, at, d) takes those of a vector.
    const auto run_gradients = [&](const Run& run, const auto& add, const auto& total) {
      const T *const a = x.at(run), *const grad = dy.at(run);
      T* const to = d_x + run.offset(to_strides);
      for_vectors<A>(run.count, [&](std::int64_t i, auto at) {
        const auto d = gradients<A, kind>(at.load(grad + i), at.load(a + i) + add.a(i, at), at.load(a + half + i) + add.b(i, at));
        at.store(to + i, d.a);
        at.store(to + to_half + i, d.b);
        total(i, at, d);
      });
    };
    const std::int64_t work = p.runs.elements() * kWork;
    if (!sums) {
      parallel(p.runs.count(), work, [&](std::int64_t begin, std::int64_t end) {
        conditions.for_runs(begin, end, [&](std::int64_t, const Run& run, const auto& add) { run_gradients(run, add, [](auto&&...) {}); });
      });
      return;
    }
    if (p.rows) {
      parallel(blocks.count(), work, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t item = begin; item < end; ++item) {
          const auto [group, first, last] = blocks[item];
          A *const of_a = parts.get() + item * 2 * p.channels, *const of_b = of_a + p.channels;
          std::fill_n(of_a, 2 * p.channels, A(0));
          conditions.for_rows(first, last, [&](std::int64_t, const Run& run, const auto& add) {
            run_gradients(run, add, [&](std::int64_t i, auto at, const Gradients<A>& d) {
              at.store(of_a + i, at.load(of_a + i) + d.a);
              at.store(of_b + i, at.load(of_b + i) + d.b);
            });
          });
        }
      });
    } else {
      parallel(p.runs.count(), work, [&](std::int64_t begin, std::int64_t end) {
        conditions.for_planes(begin, end, [&](std::int64_t item, const Run& run, const auto& add) {
          Vec<A> of_a(A(0)), of_b(A(0));
          run_gradients(run, add, [&](std::int64_t, auto at, const Gradients<A>& d) { of_a += at.keep(d.a), of_b += at.keep(d.b); });
          A* const to = parts.get() + (run.n * p.runs.pieces + item % p.runs.pieces) * 2 * p.channels + run.channel;
          to[0] = sum_lanes<A>(of_a), to[p.channels] = sum_lanes<A>(of_b);
        });
      });
    }
    A* const to = static_cast<A*>(d_condition.mutable_data_ptr());
    for_columns(blocks, 2, p.channels, parts.get(), [&](std::int64_t first, std::int64_t columns, const auto& totals_of) {
      for (std::int64_t n = 0; n < p.runs.n; ++n) {
        const ColumnTotals totals = totals_of(n);
        for (std::int64_t k = 0; k < 2; ++k)
          for (std::int64_t c = 0; c < columns; ++c) to[(n * 2 + k) * p.channels + first + c] = static_cast<A>(totals[k][c]);
      }
    });
  });
  return {d_input, d_condition};
}

}  // namespace
}  // namespace fastgen::gated_activation

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("gated_activation_fwd", TORCH_BOX(&fastgen::gated_activation::gated_activation_fwd));
  m.impl("gated_activation_bwd", TORCH_BOX(&fastgen::gated_activation::gated_activation_bwd));
}
